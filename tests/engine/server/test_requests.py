"""What the engine says to requests of every kind: refusals, budgets, seeds, stop sequences, resumes, queues."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.engine_server import (
    CONTEXT_WINDOW,
    MAX_OUTPUT_TOKENS,
    Engine,
    Reply,
    SessionClient,
    chat,
    engine,
    run,
    until,
)

from aiexport_edge.engine.text.template import Message
from aiexport_edge.proto import engine_pb2 as pb

S = pb.SamplingParams


def message(role: Any, *texts: str) -> pb.Message:
    return pb.Message(role=role, content=[pb.ContentBlock(text=text) for text in texts])


async def ask(served: Engine, request: pb.GenerateRequest) -> Reply:
    """One request over a session of its own, to its end."""
    session = await SessionClient(served.stub).hello()
    try:
        return await session.end(await session.submit(1, request))
    finally:
        session.cancel()


NO_MESSAGES = pb.GenerateRequest(model="m0", chat=pb.Chat())
NO_ROLE = pb.GenerateRequest(model="m0", chat=pb.Chat(messages=[message(pb.ROLE_USER, "a"), message(0, "b")]))
NO_BLOCK = pb.GenerateRequest(
    model="m0", chat=pb.Chat(messages=[pb.Message(role=pb.ROLE_USER, content=[pb.ContentBlock()])])
)

REFUSALS: list[tuple[pb.GenerateRequest, Any, str]] = [
    (chat("a", model="m1"), pb.ERROR_NOT_FOUND, "model"),
    (chat("a", model=""), pb.ERROR_NOT_FOUND, "model"),
    (pb.GenerateRequest(model="m0"), pb.ERROR_INVALID, "prompt"),
    (NO_MESSAGES, pb.ERROR_INVALID, "chat.messages"),
    (NO_ROLE, pb.ERROR_INVALID, "chat.messages.1.role"),
    (NO_BLOCK, pb.ERROR_INVALID, "chat.messages.0.content.0"),
    (pb.GenerateRequest(model="m0", text=""), pb.ERROR_INVALID, "text"),
    (pb.GenerateRequest(model="m0", token_ids=pb.TokenIds()), pb.ERROR_INVALID, "token_ids"),
    (pb.GenerateRequest(model="m0", token_ids=pb.TokenIds(ids=[1, 600])), pb.ERROR_INVALID, "token_ids"),
    (chat("a", max_tokens=0), pb.ERROR_INVALID, "max_tokens"),
    (chat("a", max_tokens=MAX_OUTPUT_TOKENS + 1), pb.ERROR_INVALID, "max_tokens"),
    (chat("a", sampling=S(temperature=-1)), pb.ERROR_INVALID, "sampling.temperature"),
    (chat("a", sampling=S(temperature=float("nan"))), pb.ERROR_INVALID, "sampling.temperature"),
    (chat("a", sampling=S(temperature=float("inf"))), pb.ERROR_INVALID, "sampling.temperature"),
    (chat("a", sampling=S(top_p=0)), pb.ERROR_INVALID, "sampling.top_p"),
    (chat("a", sampling=S(top_p=1.5)), pb.ERROR_INVALID, "sampling.top_p"),
    (chat("a", sampling=S(top_k=0)), pb.ERROR_INVALID, "sampling.top_k"),
    (chat("a", sampling=S(top_k=1 << 31)), pb.ERROR_INVALID, "sampling.top_k"),
    (chat("a", sampling=S(stop_sequences=["x"] * 17)), pb.ERROR_INVALID, "sampling.stop_sequences"),
    (chat("a", sampling=S(stop_sequences=["ok", ""])), pb.ERROR_INVALID, "sampling.stop_sequences.1"),
    (chat("a", sampling=S(stop_sequences=["x" * 257])), pb.ERROR_INVALID, "sampling.stop_sequences.0"),
    (chat("a", priority=9), pb.ERROR_INVALID, "priority"),
    (chat("a", tenant=pb.Tenant(weight=-1)), pb.ERROR_INVALID, "tenant.weight"),
    (chat("a", tenant=pb.Tenant(weight=float("nan"))), pb.ERROR_INVALID, "tenant.weight"),
]


def test_refusals_name_code_and_field(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            session = await SessionClient(served.stub).hello()
            for tag, (request, code, field) in enumerate(REFUSALS):
                reply = await session.end(await session.submit(tag, request))
                assert reply.refused is not None, request
                assert (reply.refused.code, reply.refused.field) == (code, field), request
                assert reply.refused.message.endswith(".")
            good = await session.end(await session.submit(999, chat("a", max_tokens=1)))
            assert good.finished is not None

    run(test())


def test_prompts_that_do_not_fit(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            ids = list(range(50)) * 100
            for length in (CONTEXT_WINDOW, CONTEXT_WINDOW + 900):
                exact = pb.GenerateRequest(model="m0", token_ids=pb.TokenIds(ids=ids[:length]))
                refused = (await ask(served, exact)).refused
                assert refused is not None
                assert refused.code == pb.ERROR_CONTEXT_LENGTH
                assert (refused.limit, refused.actual) == (CONTEXT_WINDOW, length)
                assert str(CONTEXT_WINDOW) in refused.message
                assert str(length) in refused.message
            for text in ("xyzzy qwop " * 1500, "xyzzy qwop " * 300_000):  # the second is not tokenized to its end
                refused = (await ask(served, chat(text))).refused
                assert refused is not None
                assert refused.code == pb.ERROR_CONTEXT_LENGTH
                assert refused.actual > refused.limit == CONTEXT_WINDOW

    run(test())


def test_budgets(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            ids = list(range(50)) * 100

            async def budget(num_prompt_tokens: int, max_tokens: int | None) -> int:
                request = pb.GenerateRequest(model="m0", token_ids=pb.TokenIds(ids=ids[:num_prompt_tokens]))
                if max_tokens is not None:
                    request.max_tokens = max_tokens
                session = await SessionClient(served.stub).hello()
                reply = await session.submit(1, request)
                await session.wait(lambda: reply.accepted)
                session.cancel()
                assert reply.accepted is not None
                assert reply.accepted.prompt_tokens == num_prompt_tokens
                return reply.accepted.max_tokens

            assert await budget(10, None) == 1024
            assert await budget(CONTEXT_WINDOW - 700, None) == 700
            assert await budget(10, MAX_OUTPUT_TOKENS) == MAX_OUTPUT_TOKENS
            assert await budget(CONTEXT_WINDOW - 300, 900) == 300
            assert await budget(CONTEXT_WINDOW - 1, 900) == 1

    run(test())


def test_prompts_of_the_three_kinds(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            by_chat = await ask(served, chat("Hello"))
            rendered = served.template.encode([Message("user", "Hello")])
            by_ids = await ask(
                served, pb.GenerateRequest(model="m0", token_ids=pb.TokenIds(ids=rendered), max_tokens=20)
            )
            assert by_chat.ids == by_ids.ids == served.expected(chat("Hello"), 20)
            by_text = await ask(served, pb.GenerateRequest(model="m0", text="Hello <|im_end|>", max_tokens=20))
            same = pb.TokenIds(ids=served.tokenizer.encode("Hello <|im_end|>"))
            assert by_text.ids == (await ask(served, pb.GenerateRequest(model="m0", token_ids=same, max_tokens=20))).ids
            blocks = pb.Chat(messages=[message(pb.ROLE_USER, "Hel", "lo")])
            joined = await ask(served, pb.GenerateRequest(model="m0", chat=blocks, max_tokens=20))
            assert joined.ids == served.expected(chat("Hel\nlo"), 20)

    run(test())


def test_seeds(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            seeds = set()
            for _ in range(3):
                reply = await ask(served, chat("a", max_tokens=1, sampling=S(temperature=1.0)))
                assert reply.accepted is not None
                seeds.add(reply.accepted.seed)
            assert len(seeds) == 3
            for seed in (0, 2**64 - 1):
                reply = await ask(served, chat("a", max_tokens=1, sampling=S(temperature=1.0, seed=seed)))
                assert reply.accepted is not None
                assert reply.accepted.seed == seed

    run(test())


def test_stop_sequences(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.001) as served:
            request = chat("Tell me", max_tokens=200)
            ids = served.expected(request, 200)
            text = served.text(ids)
            stop = text[50:54]
            start = text.index(stop)
            assert len(text) == 200, "each id is one character"
            request.sampling.stop_sequences.extend(["not in it at all", stop])
            reply = await ask(served, request)
            assert reply.finished is not None
            assert reply.text == text[:start]
            assert reply.finished.reason == pb.FINISH_STOP_SEQUENCE
            assert reply.finished.stop_sequence == stop
            # Billed is up to the token that completes the sequence, whatever the core had computed besides.
            assert reply.finished.output_tokens == start + len(stop)
            assert reply.ids == ids[: start + len(stop)]
            assert reply.emitted_bytes == len(reply.text.encode())
            await until(served.is_idle)

    run(test())


def test_held_back_text_comes_at_the_end(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            request = chat("Tell me", max_tokens=30)
            text = served.text(served.expected(request, 30))
            request.sampling.stop_sequences.append(text[-3:] + "never")
            reply = await ask(served, request)
            assert reply.finished is not None
            assert reply.finished.reason == pb.FINISH_MAX_TOKENS
            assert reply.text == text

    run(test())


@pytest.mark.parametrize("stops", [[], ["never"], ["stop"]])
def test_resume_gives_the_rest(directory: Path, stops: list[str]) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            request = chat("Go on", max_tokens=60, sampling=S(seed=5))
            text = served.text(served.expected(request, 60))
            request.sampling.stop_sequences.extend([text[40:43]] if stops == ["stop"] else stops)
            whole = await ask(served, request)
            assert whole.accepted is not None
            for received in (0, 1, 20, 39):
                for emitted in {0, received // 2, received}:
                    resumed = pb.GenerateRequest()
                    resumed.CopyFrom(request)
                    resumed.ClearField("max_tokens")
                    resumed.resume.CopyFrom(
                        pb.Resume(
                            attempt=1,
                            forced_ids=whole.ids[:received],
                            emitted_bytes=emitted,
                            prompt_tokens=whole.accepted.prompt_tokens,
                            max_tokens=whole.accepted.max_tokens,
                            model_revision=whole.accepted.model_revision,
                        )
                    )
                    rest = await ask(served, resumed)
                    assert rest.text == whole.text[emitted:]
                    assert rest.ids == whole.ids[received:]
                    assert rest.finished is not None
                    assert whole.finished is not None
                    assert rest.finished.output_tokens == whole.finished.output_tokens
                    assert rest.finished.reason == whole.finished.reason
                    assert rest.emitted_bytes == whole.emitted_bytes

    run(test())


def test_a_resume_whose_ids_end_the_reply_already(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            request = chat("Go on", max_tokens=20, sampling=S(seed=5))
            whole = await ask(served, request)
            assert whole.accepted is not None
            stop = whole.text[10:14]
            end_of_turn = served.tokenizer.eos_id
            assert end_of_turn is not None

            async def resume(forced: list[int], **fields: Any) -> Reply:
                resumed = chat("Go on", max_tokens=None, sampling=S(seed=5, **fields))
                accepted = whole.accepted
                assert accepted is not None
                resumed.resume.CopyFrom(
                    pb.Resume(
                        attempt=2,
                        forced_ids=forced,
                        prompt_tokens=accepted.prompt_tokens,
                        max_tokens=20,
                        model_revision=accepted.model_revision,
                    )
                )
                return await ask(served, resumed)

            by_length = await resume(whole.ids)
            assert by_length.finished is not None
            assert by_length.finished.reason == pb.FINISH_MAX_TOKENS
            assert by_length.text == whole.text
            by_stop = await resume(whole.ids, stop_sequences=[stop])
            assert by_stop.finished is not None
            assert by_stop.finished.reason == pb.FINISH_STOP_SEQUENCE
            assert by_stop.text == whole.text[: whole.text.index(stop)]
            assert by_stop.finished.output_tokens == whole.text.index(stop) + 4
            by_turn = await resume([*whole.ids[:5], end_of_turn])
            assert by_turn.finished is not None
            assert by_turn.finished.reason == pb.FINISH_END_TURN
            assert by_turn.finished.output_tokens == 6  # the end of turn counts and is no text
            assert by_turn.text == whole.text[:5]

    run(test())


def test_a_resume_of_something_else_is_refused(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            whole = await ask(served, chat("Go on", max_tokens=20, sampling=S(seed=5)))
            assert whole.accepted is not None
            good = pb.Resume(
                attempt=1,
                forced_ids=whole.ids[:4],
                prompt_tokens=whole.accepted.prompt_tokens,
                max_tokens=20,
                model_revision=whole.accepted.model_revision,
            )
            cases: list[tuple[dict[str, Any], Any, str]] = [
                ({"model_revision": "another"}, pb.ERROR_REVISION_CHANGED, "resume.model_revision"),
                ({"prompt_tokens": 3}, pb.ERROR_REVISION_CHANGED, "resume.prompt_tokens"),
                ({"max_tokens": CONTEXT_WINDOW}, pb.ERROR_REVISION_CHANGED, "resume.max_tokens"),
                ({"max_tokens": 0}, pb.ERROR_INVALID, "resume.max_tokens"),
                ({"max_tokens": 3}, pb.ERROR_INVALID, "resume.forced_ids"),
                ({"forced_ids": [999_999]}, pb.ERROR_INVALID, "resume.forced_ids"),
            ]
            for fields, code, field in cases:
                resume = pb.Resume()
                resume.CopyFrom(good)
                for name, value in fields.items():
                    resume.ClearField(name)
                    resume.MergeFrom(pb.Resume(**{name: value}))
                refused = (await ask(served, chat("Go on", max_tokens=None, resume=resume))).refused
                assert refused is not None, fields
                assert (refused.code, refused.field) == (code, field)
            drawn = chat("Go on", max_tokens=None, resume=good, sampling=S(temperature=1.0))
            refused = (await ask(served, drawn)).refused
            assert refused is not None
            assert refused.field == "sampling.seed"

    run(test())


def test_the_queue_is_bounded_and_shared(directory: Path) -> None:
    async def test() -> None:
        async with engine(
            directory, "--step-s", 0.005, queue_size=6, tenant_queue_share=0.5, max_num_running=1
        ) as served:
            session = await SessionClient(served.stub).hello()
            first = await session.submit(0, chat("runs", max_tokens=2000, tenant=pb.Tenant(id="a")))
            await session.wait(lambda: first.started)
            tags = iter(range(1, 100))

            async def submit(tenant: str) -> Reply:
                request = chat("waits", max_tokens=2, tenant=pb.Tenant(id=tenant))
                reply = await session.submit(next(tags), request)
                await session.wait(lambda: reply.accepted or reply.refused)
                return reply

            accepted = [await submit("a") for _ in range(3)]
            assert all(reply.accepted for reply in accepted)
            refused = (await submit("a")).refused
            assert refused is not None
            assert (refused.code, refused.limit, refused.actual) == (pb.ERROR_TENANT_QUEUE_FULL, 3, 3)
            assert refused.retry_after_ms > 0
            accepted += [await submit("b") for _ in range(3)]  # the others' places
            refused = (await submit("c")).refused
            assert refused is not None
            assert (refused.code, refused.limit, refused.actual) == (pb.ERROR_QUEUE_FULL, 6, 6)
            await session.abort(0)
            for reply in accepted:
                await session.end(reply)
                assert reply.finished is not None
            assert (await submit("c")).accepted  # places are free again

    run(test())


def test_places_of_aborted_waiters_are_free_again(directory: Path) -> None:
    async def test() -> None:
        async with engine(
            directory, "--step-s", 0.005, queue_size=2, tenant_queue_share=1.0, max_num_running=1
        ) as served:
            session = await SessionClient(served.stub).hello()
            first = await session.submit(0, chat("runs", max_tokens=2000))
            await session.wait(lambda: first.started)
            for round_ in range(5):
                replies = [await session.submit(10 * round_ + n, chat("waits", max_tokens=2)) for n in (1, 2)]
                for n, reply in zip((1, 2), replies, strict=True):
                    await session.wait(lambda reply=reply: reply.accepted)  # type: ignore[misc]
                    await session.abort(10 * round_ + n)
                    await session.end(reply)

    run(test())


def test_a_model_that_loads_or_has_failed(directory: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--load-s", 0.4, wait=False) as served:
            refused = (await ask(served, chat("a"))).refused
            assert refused is not None
            assert refused.code == pb.ERROR_QUEUE_FULL
            assert "loading" in refused.message
            await served.until_ready()
            assert (await ask(served, chat("a"))).finished
        reason = tmp_path / "reason"
        reason.write_text("/secret/place has no weights.")
        async with engine(directory, "--fail-load", reason, wait=False) as served:

            async def failed() -> bool:
                return (await served.models())[0].state == pb.MODEL_FAILED

            await until(failed)
            assert (await served.models())[0].message == "/secret/place has no weights."
            refused = (await ask(served, chat("a"))).refused
            assert refused is not None
            assert "could not be loaded" in refused.message
            assert "/secret" not in refused.message

    run(test())


def test_long_prompts_do_not_hold_up_the_others(directory: Path) -> None:
    """They are tokenized in threads: a short request submitted after long ones does not wait for all of them."""

    async def test() -> None:
        async with engine(directory) as served:
            session = await SessionClient(served.stub).hello()
            order: list[str] = []
            text = "xyzzy qwop " * 250_000
            long = [await session.submit(tag, chat(text)) for tag in range(1, 7)]
            short = await session.submit(7, chat("short", max_tokens=1))

            async def note(reply: Reply, name: str) -> None:
                await session.end(reply)
                order.append(name)

            await asyncio.gather(note(short, "short"), *(note(reply, "long") for reply in long))
            assert order[-1] == "long"

    run(test())
