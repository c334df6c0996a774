"""What a step brought, put back into its requests: ids, ends, prefix hashes, charges; and what the parent is told.

Owns the rules for when the core ends a request, and what becomes of ids that come after its end. Stop sequences are
text: the engine process finds those.
"""

from __future__ import annotations

from aiexport_edge.engine.core.fairness import OUTPUT_COST
from aiexport_edge.engine.core.plan import StepPlan, StepResult
from aiexport_edge.engine.core.protocol import Finished, FinishReason, Started, StepReport, Tokens
from aiexport_edge.engine.core.request import Request, Status
from aiexport_edge.engine.core.scheduler import Scheduler

_END_OF_CUT = {False: FinishReason.END_TURN, True: FinishReason.MAX_TOKENS}


def end_of(request: Request) -> FinishReason | None:
    """Why a request whose output came from an earlier attempt has ended already, or None."""
    output = request.token_ids[request.num_prompt_tokens :]
    if not request.stop_ids.isdisjoint(output[: request.max_tokens]):
        return FinishReason.END_TURN
    return FinishReason.MAX_TOKENS if len(output) >= request.max_tokens else None


def commit(scheduler: Scheduler, plan: StepPlan, result: StepResult) -> StepReport:
    """Give every request of `plan` the ids drawn for it. Plans are committed in the order in which they were made.

    Ids past a stop id or past the budget are dropped: never part of the request, hashed, charged or reported. So is all
    that a step brings for a request that has ended since the step was planned; its pages go back with the last such.
    A request whose logits are faulty ends without an id, and nobody finds its pages again.
    """
    scheduler.settle()
    report = StepReport([], [], [])
    finished_status, faulty = Status.FINISHED, result.faulty
    for model_plan in plan.models:
        model = model_plan.model
        tokens_per_page = scheduler.tokens_per_page[model]
        for chunk in model_plan.chunks:
            request, draft = chunk.request, chunk.draft
            end = chunk.start + chunk.num_tokens - len(draft)
            request.num_in_flight -= 1
            if request.status is finished_status:
                scheduler.admission.release_late(request)
                continue
            if end // tokens_per_page > request.num_published_pages:
                scheduler.prefix.publish(request, end)
            if not request.started:
                request.started = True
                scheduler.num_prompt_tokens[model] += request.num_prompt_tokens
                scheduler.num_cached_tokens[model] += request.num_cached_tokens
                report.started.append(Started(request.handle, request.num_cached_tokens))
            if faulty and chunk.samples and request.handle in faulty:
                scheduler.pool.forget(request.pages)
                scheduler.finish(request)
                report.finished.append(Finished(request.handle, FinishReason.FAULTY))
            elif chunk.samples:
                ids, reason = _own_ids(request, end, result.ids[request.handle])
                if request.constraint is not None:
                    taken = request.constraint.advance(ids)
                    ids, reason = taken.ids, _END_OF_CUT[taken.cut] if taken.over else reason
                if len(ids) == 1:
                    request.token_ids[end] = ids[0]  # in the place of PENDING_ID
                else:
                    request.token_ids[end : end + 1] = ids
                if draft:
                    _settle_draft(scheduler, request, end, draft, ids)
                request.probation = False
                scheduler.num_output_tokens[model] += len(ids)
                scheduler.ranking.charge(request, OUTPUT_COST * len(ids))
                report.tokens.append(Tokens(request.handle, ids))
                if reason is not None:
                    scheduler.finish(request)
                    report.finished.append(Finished(request.handle, reason))
    return report


def _settle_draft(scheduler: Scheduler, request: Request, end: int, draft: tuple[int, ...], ids: list[int]) -> None:
    """Count the guesses that came true, from position `end` on, as computed: they are what the pages hold."""
    num_true = 0
    while num_true < len(draft) and num_true < len(ids) and draft[num_true] == ids[num_true]:
        num_true += 1
    request.is_drafted = False
    request.num_computed_tokens = end + num_true
    scheduler.num_guessed_tokens[request.model] += len(draft)
    scheduler.num_accepted_tokens[request.model] += num_true
    if request.num_computed_tokens // scheduler.tokens_per_page[request.model] > request.num_published_pages:
        scheduler.prefix.publish(request, request.num_computed_tokens)


def _own_ids(request: Request, end: int, ids: list[int]) -> tuple[list[int], FinishReason | None]:
    """The ids, drawn for position `end` on, that belong to the output, and why it ends with them if it does."""
    assert ids, "a chunk that samples brings an id"
    assert len(ids) == 1 or not request.num_in_flight, "nothing is planned while it is not known how many come"
    left = request.num_prompt_tokens + request.max_tokens - end
    if not request.stop_ids.isdisjoint(ids):
        for index, id_ in enumerate(ids[:left]):
            if id_ in request.stop_ids:
                return ids[: index + 1], FinishReason.END_TURN
    return (ids, None) if len(ids) < left else (ids[:left], FinishReason.MAX_TOKENS)
