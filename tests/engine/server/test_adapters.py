"""Adapters over gRPC with a real core: loaded, named by requests, changed and unloaded while they run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support.engine_server import Reply, SessionClient, run, until
from support.peft_adapters import load_adapter, save_adapter
from support.tiny_models import greedy, make, prompts, save
from support.tiny_tokenizers import save_tokenizer

from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
from aiexport_edge.engine.models.facts import ModelFacts
from aiexport_edge.engine.server.errors import DETAIL_TRAILER
from aiexport_edge.engine.server.listener import ListenerConfig
from aiexport_edge.engine.server.process import Server, ServerConfig
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub

NUM_TOKENS = 12
PROMPT = prompts([40])[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, adapters `one` and `two` in `adapters`."""
    directory = tmp_path_factory.mktemp("adapted")
    save_tokenizer("qwen3", save("qwen3", directory / "base"))
    for seed, name in enumerate(("one", "two")):
        save_adapter(make("qwen3"), directory / "adapters" / name, seed=seed, r=4 + 8 * seed)
    return directory


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, list[int]]:
    """What `peft` and `transformers` generate for PROMPT, by adapter."""
    ids = {"": greedy(make("qwen3"), PROMPT, NUM_TOKENS)[0]}
    for name in ("one", "two"):
        ids[name] = greedy(load_adapter(make("qwen3"), place / "adapters" / name), PROMPT, NUM_TOKENS)[0]
    assert len(set(map(tuple, ids.values()))) == 3
    return ids


@asynccontextmanager
async def engine(
    place: Path, *, roots: Sequence[Path], slots: int = 2
) -> AsyncIterator[tuple[EngineStub, NativeBackend]]:
    facts = ModelFacts("m0", place / "base", "revision", 397, 256, 128, False, ())
    core = CoreConfig(
        models=[CoreModel("m0", str(place / "base"), "float32", 256, False, "revision")],
        device="cpu",
        page_bytes=0,
        pool_bytes=16 << 20,
        max_num_running=16,
        max_step_tokens=64,
        num_threads=1,
        batch_floor_share=0.1,
        adapter_slots=slots,
        max_adapter_rank=16,
        adapter_host_bytes=1 << 20,
    )
    backend = NativeBackend(core)
    config = ServerConfig(
        listener=ListenerConfig("127.0.0.1:0"),
        models=[facts],
        queue_size=64,
        tenant_queue_share=1.0,
        drain_s=5.0,
        adapter_roots=roots,
    )
    server = Server(config, backend)
    try:
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.listener.port}") as channel:
            stub = EngineStub(channel)

            async def ready() -> bool:
                models = (await stub.ListModels(pb.ListModelsRequest())).models
                return all(model.state == pb.MODEL_READY for model in models)

            await until(ready)
            yield stub, backend
    finally:
        await server.stop()


def ask(adapter: str = "", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="r",
        model="m0",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(temperature=0.0, ignore_eos=True),
        max_tokens=NUM_TOKENS,
        adapter=adapter,
        **fields,
    )


async def generate(stub: EngineStub, request: pb.GenerateRequest) -> Reply:
    reply = Reply()
    async for event in stub.Generate(request):
        reply.hear(event)
    return reply


async def load(stub: EngineStub, name: str, path: Path) -> pb.Adapter:
    adapter: pb.Adapter = await stub.LoadAdapter(pb.LoadAdapterRequest(name=name, model="m0", path=str(path)))
    return adapter


async def refusal(call: Any) -> pb.ErrorDetail:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailers: Any = caught.value.trailing_metadata()
    return pb.ErrorDetail.FromString(dict(trailers)[DETAIL_TRAILER])


def test_requests_name_adapters(place: Path, expected: dict[str, list[int]]) -> None:
    """Each as `peft` has it, side by side, found again by their prefix, and by nobody else's."""

    async def test() -> None:
        async with engine(place, roots=[place / "adapters"]) as (stub, _):
            loaded = await load(stub, "ft-a", place / "adapters" / "one")
            assert (loaded.name, loaded.model, loaded.rank, len(loaded.digest)) == ("ft-a", "m0", 4, 32)
            await load(stub, "ft-b", place / "adapters" / "two")
            listed = await stub.ListAdapters(pb.ListAdaptersRequest())
            assert [adapter.name for adapter in listed.adapters] == ["ft-a", "ft-b"]
            assert listed.adapters[0] == loaded
            names = {"": "", "ft-a": "one", "ft-b": "two"}
            replies = await asyncio.gather(*(generate(stub, ask(name)) for name in names))
            for (name, of), reply in zip(names.items(), replies, strict=True):
                assert reply.ids == expected[of], name
                assert reply.started is not None
                assert reply.started.cached_tokens == 0
                assert reply.accepted is not None
                assert reply.accepted.adapter_digest == (
                    loaded.digest if name == "ft-a" else reply.accepted.adapter_digest
                )
            again = await generate(stub, ask("ft-a"))
            assert again.ids == expected["one"]
            assert again.started is not None
            assert again.started.cached_tokens > 0

    run(test())


def test_another_content_under_the_same_name(place: Path, expected: dict[str, list[int]]) -> None:
    """What runs keeps what it began with; what comes after has the new one, and none of the old one's prefixes."""

    async def test() -> None:
        async with engine(place, roots=[place]) as (stub, _):
            await load(stub, "ft", place / "adapters" / "one")
            session = await SessionClient(stub).hello()
            running = await session.submit(1, ask("ft"))
            await session.wait(lambda: running.accepted is not None)
            await load(stub, "ft", place / "adapters" / "two")
            after = await session.submit(2, ask("ft"))
            for reply, name in ((running, "one"), (after, "two")):
                assert (await session.end(reply)).ids == expected[name]
            assert running.accepted is not None
            resumed = ask(
                "ft",
                resume=pb.Resume(
                    attempt=1,
                    forced_ids=running.ids[:3],
                    prompt_tokens=len(PROMPT),
                    max_tokens=NUM_TOKENS,
                    model_revision="revision",
                    adapter_digest=running.accepted.adapter_digest,
                ),
            )
            detail = (await session.end(await session.submit(3, resumed))).refused
            assert detail is not None
            assert (detail.code, detail.field) == (pb.ERROR_REVISION_CHANGED, "resume.adapter_digest")

            running = await session.submit(4, ask("ft"))
            await session.wait(lambda: running.accepted is not None)
            await stub.UnloadAdapter(pb.UnloadAdapterRequest(name="ft"))
            assert (await session.end(running)).ids == expected["two"]
            detail = (await session.end(await session.submit(5, ask("ft")))).refused
            assert detail is not None
            assert (detail.code, detail.field) == (pb.ERROR_NOT_FOUND, "adapter")

    run(test())


def test_more_adapters_than_places_and_a_killed_core(place: Path, expected: dict[str, list[int]]) -> None:
    async def test() -> None:
        async with engine(place, roots=[place], slots=1) as (stub, backend):
            await load(stub, "a", place / "adapters" / "one")
            await load(stub, "b", place / "adapters" / "two")
            session = await SessionClient(stub).hello()
            names = ["a", "b", "a", "", "b", "a"]
            replies = [await session.submit(tag, ask(name)) for tag, name in enumerate(names)]
            await session.wait(lambda: any(reply.ids for reply in replies))
            os.kill(backend.stats().core_pid, signal.SIGKILL)
            for name, reply in zip(names, replies, strict=True):
                assert (await session.end(reply)).ids == expected[{"a": "one", "b": "two", "": ""}[name]]

    run(test())


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    async def test() -> None:
        one = place / "adapters" / "one"
        (tmp_path / "link").symlink_to(one)
        async with engine(place, roots=[tmp_path]) as (stub, _):
            for path in (one, tmp_path / "link", tmp_path / ".." / "x", tmp_path / "none", Path("\0")):
                detail = await refusal(load(stub, "ft", path))
                assert (detail.code, detail.field) == (pb.ERROR_INVALID, "path"), path
            assert (await refusal(load(stub, "", one))).field == "name"
            empty = tmp_path / "empty"
            empty.mkdir()
            assert "adapter_config.json does not exist" in (await refusal(load(stub, "ft", empty))).message
            unknown = pb.LoadAdapterRequest(name="ft", model="m9", path=str(empty))
            assert (await refusal(stub.LoadAdapter(unknown))).code == pb.ERROR_NOT_FOUND
            await stub.UnloadAdapter(pb.UnloadAdapterRequest(name="never loaded"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(stub, ask("ft"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        async with engine(place, roots=[]) as (stub, _):
            assert "serves no adapters" in (await refusal(load(stub, "ft", one))).message

    run(test())
