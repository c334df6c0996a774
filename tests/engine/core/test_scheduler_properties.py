"""Thousands of random arrivals, aborts, priorities, models and page famines through the real scheduler and page pool.

After every step the harness checks the books of the pool, the shape of the plan, and that every request reads exactly
its own prefix; at the end, that everybody has answered what it would have answered alone. All of it with steps one
after the other and with steps that overlap.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_core import STOP_ID, FakeCore, Reply, add_request, prompt_of, undisturbed

from aiexport_edge.engine.core.fairness import INPUT_COST, OUTPUT_COST
from aiexport_edge.engine.core.protocol import AddRequest, FinishReason, Priority

TENANTS = 4
SALTS = [b"", b"one", b"two"]


@dataclass(frozen=True)
class World:
    """A core, and how rough it is treated."""

    seed: int
    num_pages: int
    tokens_per_page: list[int]
    max_num_running: int
    max_step_tokens: int
    batch_floor_share: float
    num_requests: int
    arrivals_per_step: float
    longest: int
    abort_rate: float
    probation_rate: float
    resume_rate: float
    guess_rate: float | None
    overlaps: bool = False
    constrained_rate: float = 0.0


worlds = st.builds(
    World,
    seed=st.integers(0, 2**32 - 1),
    num_pages=st.integers(2, 40),
    tokens_per_page=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    max_num_running=st.integers(1, 12),
    max_step_tokens=st.integers(1, 40),
    batch_floor_share=st.sampled_from([0.0, 0.1, 0.5]),
    num_requests=st.integers(1, 40),
    arrivals_per_step=st.sampled_from([0.05, 0.3, 1.0, 10.0]),
    longest=st.integers(2, 60),
    abort_rate=st.sampled_from([0.0, 0.02, 0.2]),
    probation_rate=st.sampled_from([0.0, 0.0, 0.3]),
    resume_rate=st.sampled_from([0.0, 0.3]),
    guess_rate=st.sampled_from([None, None, 0.3, 0.9, 1.0]),
    overlaps=st.booleans(),
    constrained_rate=st.sampled_from([0.0, 0.3]),
)


def make_request_of(
    world: World, rng: random.Random, handle: int, stems: list[list[int]], *, constrained: bool = False
) -> AddRequest | None:
    """A random request that fits the pool; prompts often share a stem."""
    model = rng.randrange(len(world.tokens_per_page))
    room = min((world.num_pages - 1) * world.tokens_per_page[model], world.longest)
    if room < 2:
        return None
    num_prompt = rng.randint(1, room - 1)
    max_tokens = rng.randint(1, room - num_prompt)
    stem = rng.choice(stems)[:num_prompt]
    prompt = stem if len(stem) == num_prompt else stem + prompt_of(rng, num_prompt - len(stem))
    message = add_request(
        handle,
        prompt,
        model=model,
        max_tokens=max_tokens,
        stop_ids=[STOP_ID] if rng.random() < 0.5 else [],
        tenant=f"tenant {rng.randrange(TENANTS)}",
        weight=rng.choice([0.5, 1.0, 4.0]),
        salt=rng.choice(SALTS),
        priority=rng.choice(list(Priority)),
        probation=rng.random() < world.probation_rate,
    )
    if rng.random() >= world.resume_rate:
        return message
    output = undisturbed(message, constrained=constrained)[0]
    forced = output[: rng.randint(0, len(output))]
    return add_request(
        handle,
        prompt,
        output=forced,
        model=model,
        max_tokens=max_tokens,
        stop_ids=message.stop_ids,
        tenant=message.tenant,
        salt=message.salt,
        priority=Priority(message.priority),
        probation=message.probation,
    )


def ids_of(reply: Reply) -> list[int]:
    return [*memoryview(reply.message.prompt_ids).cast("I"), *reply.output]


def may_share(one: Reply, other: Reply) -> bool:
    return (one.message.model, one.message.salt) == (other.message.model, other.message.salt)


def common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_cache(core: FakeCore) -> None:
    """What can be found again is what some request has for its prompt or its answer."""
    known = set()
    for handle, (ids, prefixes) in core.runner._prefixes.items():
        reply = core.replies[handle]
        upto = common_prefix(ids, ids_of(reply))
        known |= {(reply.message.model, reply.message.salt, prefix) for prefix in prefixes[:upto]}
    for page in core.pool._pages.values():
        content = [value for (of_page, _), value in core.runner.memory.items() if of_page == page]
        assert content[0] in known, "an id that came after the end can be found"


def check_draws(core: FakeCore) -> None:
    """Ids in vain: none but where a stop is seen a step late, and then one. None of them is counted."""
    counted = [0] * len(core.scheduler.tokens_per_page)
    for handle, reply in core.replies.items():
        counted[reply.message.model] += len(reply.ids)
        in_vain = core.runner.num_drawn[handle] - len(reply.ids)
        if reply.reason is FinishReason.MAX_TOKENS or not core.runner.overlaps:
            assert in_vain == 0
        assert in_vain <= 1 + (reply.reason is FinishReason.ABORTED)
    assert core.scheduler.num_output_tokens == counted


@settings(max_examples=300, deadline=None)
@given(world=worlds)
def test_nothing_leaks_nothing_is_lost_everybody_finishes(world: World) -> None:
    rng = random.Random(world.seed)
    core = FakeCore(
        num_pages=world.num_pages,
        tokens_per_page=world.tokens_per_page,
        max_num_running=world.max_num_running,
        max_step_tokens=world.max_step_tokens,
        batch_floor_share=world.batch_floor_share,
        guess_rate=world.guess_rate,
        overlaps=world.overlaps,
    )
    stems = [prompt_of(rng, world.longest) for _ in range(3)]
    handle, due, work = 0, 1.0, 0
    while handle < world.num_requests or core.pipeline.busy:
        while due >= 1.0 and handle < world.num_requests:
            constrained = rng.random() < world.constrained_rate
            message = make_request_of(world, rng, handle, stems, constrained=constrained)
            handle += 1
            due -= 1.0
            if message is not None:
                core.add(message, constrained=constrained)
                work += len(message.prompt_ids) // 4 + message.max_tokens
        due += world.arrivals_per_step
        if rng.random() < world.abort_rate and core.replies:
            core.abort(rng.choice(list(core.replies)))
        if core.pipeline.busy:
            core.step()
        assert core.num_steps <= 20 * work + 10, "no progress"
    assert core.pool.num_used == 0
    core.check_outputs()
    check_cache(core)
    if world.guess_rate is None:
        check_draws(core)
    for reply in core.replies.values():
        sources = [other for other in core.replies.values() if other is not reply and may_share(other, reply)]
        known = max((common_prefix(ids_of(other), ids_of(reply)) for other in sources), default=0)
        assert reply.cached_tokens <= known, "found what nobody of its salt and model has computed"


@pytest.mark.parametrize(("seed", "overlaps"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_long_life(seed: int, overlaps: bool) -> None:
    """Two thousand requests through one small pool of three models."""
    rng = random.Random(seed)
    world = World(seed, 40, [4, 7, 3], 8, 24, 0.1, 2000, 0.0, 70, 0.0, 0.05, 0.1, 0.8)
    core = FakeCore(
        num_pages=40,
        tokens_per_page=[4, 7, 3],
        max_step_tokens=24,
        guess_rate=0.8,
        overlaps=overlaps,
    )
    stems = [prompt_of(rng, 70) for _ in range(2)]
    for handle in range(2000):
        message = make_request_of(world, rng, handle, stems)
        assert message is not None
        core.add(message)
        while core.scheduler.num_waiting > 30:
            core.step()
        if rng.random() < 0.1:
            core.abort(rng.randrange(handle + 1))
    core.run()
    core.check_outputs()
    check_cache(core)
    assert core.scheduler.num_preemptions > 20, "the pool was small enough to matter"
    assert sum(core.scheduler.num_cached_tokens) > 1000, "and prefixes were found"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_pages=st.integers(12, 60),
    max_num_running=st.integers(2, 12),
    max_step_tokens=st.integers(4, 40),
    num_tenants=st.integers(1, 5),
    lasting=st.integers(10, 40),
    overlaps=st.booleans(),
)
def test_no_starvation_within_a_class(
    seed: int,
    num_pages: int,
    max_num_running: int,
    max_step_tokens: int,
    num_tenants: int,
    lasting: int,
    overlaps: bool,
) -> None:
    """However many others keep coming, of its own tenant or not, a request of nearly the whole pool ends."""
    rng = random.Random(seed)
    core = FakeCore(
        num_pages=num_pages, max_num_running=max_num_running, max_step_tokens=max_step_tokens, overlaps=overlaps
    )
    capacity = core.scheduler.capacity_tokens(0)

    def crowd(handle: int) -> AddRequest:
        num_prompt = rng.randint(1, max(1, capacity // 3))
        max_tokens = rng.randint(1, min(lasting, capacity - num_prompt))
        tenant = f"t{rng.randrange(num_tenants)}"
        return add_request(handle, prompt_of(rng, num_prompt), max_tokens=max_tokens, tenant=tenant)

    for handle in range(1, 20):
        core.add(crowd(handle))
    core.step()
    core.add(add_request(0, prompt_of(rng, capacity - 12), max_tokens=10, tenant="t0"))
    handle = 100
    # Its tenant is served no less than others, to within the bound below, and it is its tenant's oldest soon.
    bound = 40 * num_tenants * OUTPUT_COST * capacity
    while core.replies[0].reason is None:
        while core.scheduler.num_waiting < 20:
            core.add(crowd(handle))
            handle += 1
        core.step()
        assert core.num_steps < bound, "starved"
    assert core.replies[0].output == undisturbed(core.replies[0].message)[0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    max_step_tokens=st.integers(4, 40),
    longest=st.sampled_from([20, 100, 200]),
    arrivals_per_step=st.sampled_from([0.2, 1.0, 3.0]),
    overlaps=st.booleans(),
)
def test_a_tenants_prompt_waits_for_twice_what_stood_before_it_at_most(
    seed: int, max_step_tokens: int, longest: int, arrivals_per_step: float, overlaps: bool
) -> None:
    """Short ones that keep coming may overtake, but only so much; pages are not what anyone waits for here."""
    rng = random.Random(seed)
    core = FakeCore(
        num_pages=40 * longest // 4 * 2,
        tokens_per_page=[4],
        max_num_running=100,
        max_step_tokens=max_step_tokens,
        overlaps=overlaps,
    )
    ahead: dict[int, int] = {}  # by handle, tokens of itself and of what came before it and is not computed
    served: dict[int, int] = {}  # tokens of prompts that have been planned since it came, until its own are
    handle, due = 0, 1.0
    while handle < 40 or core.pipeline.busy:
        while due >= 1.0 and handle < 40:
            due -= 1.0
            length = rng.choice([rng.randint(1, 8), rng.randint(1, longest)])
            waiting = [r for r in core.scheduler.requests.values() if r.num_computed_tokens < r.num_prompt_tokens]
            ahead[handle] = length + sum(r.num_prompt_tokens - r.num_computed_tokens for r in waiting)
            core.add(add_request(handle, prompt_of(rng, length), max_tokens=1))
            served[handle] = 0
            handle += 1
        due += arrivals_per_step
        if not core.pipeline.busy:
            continue
        core.step()
        chunks = [chunk for model in core.plan.models for chunk in model.chunks]
        num_tokens = sum(chunk.num_tokens for chunk in chunks if chunk.start < chunk.request.num_prompt_tokens)
        for other in list(served):
            served[other] += num_tokens
            assert served[other] <= 2 * ahead[other] + 2 * max_step_tokens, "overtaken too often"
        for chunk in chunks:
            if chunk.end >= chunk.request.num_prompt_tokens:
                served.pop(chunk.request.handle, None)
    core.check_outputs()


class Service:
    """What each tenant has been served, counted apart from the scheduler: cost over weight, from plans and reports."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.served = dict.fromkeys(weights, 0.0)
        self._computed: dict[int, int] = {}

    def count(self, core: FakeCore, tokens: dict[int, int]) -> None:
        for model in core.plan.models:
            for chunk in model.chunks:
                handle, tenant = chunk.request.handle, chunk.request.tenant
                end = min(chunk.start + chunk.num_tokens, chunk.request.num_prompt_tokens)
                fresh = max(0, end - max(self._computed.get(handle, 0), chunk.start))
                self._computed[handle] = max(self._computed.get(handle, 0), end)
                self.served[tenant] += INPUT_COST * fresh / self.weights[tenant]
        for handle, count in tokens.items():
            tenant = core.replies[handle].message.tenant
            self.served[tenant] += OUTPUT_COST * count / self.weights[tenant]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tenants=st.integers(2, 4),
    equal_weights=st.booleans(),
    tokens_per_page=st.integers(1, 8),
    num_pages=st.integers(40, 120),
    max_num_running=st.integers(1, 12),
    max_step_tokens=st.integers(8, 64),
    probe=st.sampled_from([0, 0, 5]),
    overlaps=st.booleans(),
)
def test_service_differs_by_no_more_than_the_papers_bound(
    seed: int,
    num_tenants: int,
    equal_weights: bool,
    tokens_per_page: int,
    num_pages: int,
    max_num_running: int,
    max_step_tokens: int,
    probe: int,
    overlaps: bool,
) -> None:
    """Sheng et al., of backlogged clients: |W_f - W_g| while both wait is at most 2·max(w_p·L_input, w_q·M).

    With weights the service is divided by them, so the bound is that of the lightest tenant. Tenants differ in the size
    of their requests; some run out of pages and are preempted; visitors that come and go change nothing.
    """
    rng = random.Random(seed)
    core = FakeCore(
        num_pages=num_pages,
        tokens_per_page=[tokens_per_page],
        max_num_running=max_num_running,
        max_step_tokens=max_step_tokens,
        overlaps=overlaps,
    )
    capacity = core.scheduler.capacity_tokens(0)
    weights = {f"t{i}": 1.0 if equal_weights else rng.choice([0.5, 1.0, 3.0]) for i in range(num_tenants)}
    sizes = {t: (rng.randint(1, capacity // 3), rng.randint(1, capacity // 3)) for t in weights}
    service = Service({**weights, "visitor": 1.0})
    waiting = dict.fromkeys(weights, 0)
    handle = longest_input = most_running = 0
    differences: list[tuple[float, ...]] = []
    names = sorted(weights)
    for step in range(400):
        for tenant in names:
            while waiting[tenant] <= max_num_running:  # more than a step can admit: never without one that waits
                num_prompt = rng.randint(1, sizes[tenant][0])
                max_tokens = rng.randint(1, sizes[tenant][1])
                longest_input = max(longest_input, num_prompt)
                prompt = prompt_of(rng, num_prompt)
                core.add(add_request(handle, prompt, max_tokens=max_tokens, tenant=tenant, weight=weights[tenant]))
                handle += 1
                waiting[tenant] += 1
        if probe and step % probe == 0:
            core.add(add_request(handle, prompt_of(rng, 3), max_tokens=3, tenant="visitor"))
            handle += 1
        report = core.step()
        service.count(core, {t.handle: len(t.ids) for t in report.tokens})
        running = [r for r in core.scheduler.requests.values() if r.pages]
        most_running = max(most_running, sum(len(r.token_ids) for r in running) + max_num_running)
        waiting = dict.fromkeys(weights, 0)
        for request in core.scheduler.requests.values():
            if not request.pages and request.tenant in waiting:
                waiting[request.tenant] += 1
        differences.append(tuple(service.served[f] - service.served[g] for f in names for g in names))
    bound = 2 * max(INPUT_COST * longest_input, OUTPUT_COST * most_running) / min(weights.values())
    for of_pair in zip(*differences, strict=True):
        assert max(of_pair) - min(of_pair) <= bound


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), probation=st.booleans(), overlaps=st.booleans(), drafts=st.booleans())
def test_resumed_anywhere_equals_undisturbed(seed: int, probation: bool, overlaps: bool, drafts: bool) -> None:
    """A core dies between two steps, any two: what a fresh one answers to ids and prompt goes on where it stopped."""
    rng = random.Random(seed)
    messages = [
        add_request(
            handle,
            prompt_of(rng, rng.randint(1, 20)),
            max_tokens=rng.randint(1, 20),
            stop_ids=[STOP_ID],
            tenant=f"t{handle % 3}",
            priority=rng.choice(list(Priority)),
        )
        for handle in range(10)
    ]
    ids: dict[int, list[int]] = {message.handle: [] for message in messages}
    reasons: dict[int, FinishReason] = {}
    while len(reasons) < len(messages):
        core = FakeCore(
            num_pages=14,
            max_num_running=4,
            guess_rate=0.6 if drafts else None,
            overlaps=overlaps,
        )
        for message in messages:
            if message.handle in reasons:
                continue
            prompt = list(memoryview(message.prompt_ids).cast("I"))
            core.add(
                add_request(
                    message.handle,
                    prompt,
                    output=ids[message.handle],
                    max_tokens=message.max_tokens,
                    stop_ids=message.stop_ids,
                    tenant=message.tenant,
                    priority=Priority(message.priority),
                    probation=probation and bool(ids[message.handle]),
                )
            )
        for _ in range(rng.randint(2, 12)):  # one step alone would tell nothing where steps overlap
            if core.scheduler.requests:
                core.step()
        for reply in core.replies.values():
            ids[reply.message.handle] += reply.ids
            if reply.reason is not None:
                reasons[reply.message.handle] = reply.reason
    for message in messages:
        assert (ids[message.handle], reasons[message.handle]) == undisturbed(message)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.05, 0.2]), overlaps=st.booleans())
def test_batch_never_starves(seed: int, share: float, overlaps: bool) -> None:
    rng = random.Random(seed)
    core = FakeCore(num_pages=31, max_num_running=4, max_step_tokens=8, batch_floor_share=share, overlaps=overlaps)
    for handle in range(3):
        prompt = prompt_of(rng, rng.randint(1, 80))
        core.add(add_request(handle, prompt, max_tokens=rng.randint(1, 30), priority=Priority.BATCH))
    handle = 10
    while any(core.replies[i].reason is None for i in range(3)):
        while core.scheduler.num_waiting < 6:
            prompt = prompt_of(rng, rng.randint(1, 40))
            core.add(add_request(handle, prompt, max_tokens=rng.randint(1, 40), tenant=f"t{rng.randrange(3)}"))
            handle += 1
        core.step()
        assert core.num_steps < 330 * OUTPUT_COST / share, "starved"
    for handle in range(3):
        assert core.replies[handle].output == undisturbed(core.replies[handle].message)[0]
