"""vLLM sees what the native backend sees: the demo model with its eyes open, on both.

AIEXPORT_TEST_VLLM_PYTHON names an interpreter that has vLLM and the torchvision that belongs to its torch, which vLLM
wants for models that see; skipped where it does not.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from support.backend_driver import Listener, new_core, request, run, state
from support.edge import VLLM_PYTHON
from support.scripted_vllm import worker_config

from aiexport_edge.engine.backends.base import Backend, BackendRequest, ModelState
from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.backends.vllm.launch import VllmBackend
from aiexport_edge.engine.backends.vllm.shape import load_shape
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel, FinishReason, ImageInput
from aiexport_edge.engine.demo import evaluate_eyes
from aiexport_edge.engine.demo.eyes import PATCHES
from aiexport_edge.engine.demo.looking import fit
from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.text.template import ChatTemplate, Message, Picture
from aiexport_edge.engine.text.tokenizer import Tokenizer
from aiexport_edge.proto.config import source_directory

DEMO = source_directory("demo")
STOP = (2,)
MODEL = CoreModel(
    name="demo", path=str(DEMO), dtype="float32", context_window=4096, deterministic=False, revision="demo"
)


def test_the_shape_of_a_model_that_sees() -> None:
    shape, config = load_shape(DEMO), ModelConfig.load(DEMO)
    assert shape.vision == config.vision is not None


@cache
def interpreter() -> str:
    """Skips where there is none that can serve models with eyes."""
    python = os.environ.get(VLLM_PYTHON)
    if not python:
        pytest.skip(f"{VLLM_PYTHON} names no interpreter that has vLLM: nothing to test")
    found = subprocess.run([python, "-c", "import vllm, torchvision"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"the environment of {VLLM_PYTHON} has no torchvision that works: {found.stderr[-200:]}")
    return python


@cache
def template() -> ChatTemplate:
    return ChatTemplate.load(DEMO, Tokenizer.load(DEMO), image_token_id=load_shape(DEMO).vision.image_token_id)  # type: ignore[union-attr]


def picture(image: Image.Image) -> ImageInput:
    pixels = np.asarray(fit(image))
    rows, columns = pixels.shape[0] // PATCHES.patch_size, pixels.shape[1] // PATCHES.patch_size
    data = pixels.tobytes()
    digest = blake2b(rows.to_bytes(4, "little") + columns.to_bytes(4, "little") + data, digest_size=32).digest()
    return ImageInput(0, rows, columns, digest, data)


def ask(messages: Sequence[Message], pictures: Sequence[ImageInput], salt: bytes = b"") -> BackendRequest:
    encoded = template().encode_chat(messages)
    images = [msgspec.structs.replace(each, start=start) for each, start in zip(pictures, encoded.starts, strict=True)]
    return dataclasses.replace(request(encoded.ids, 40, stop_ids=STOP, salt=salt), images=tuple(images))


def place(image: ImageInput) -> Picture:
    return Picture(image.rows * image.columns // PATCHES.merge_size**2)


def asks() -> list[BackendRequest]:
    """One picture and two, of several sizes, in a first turn and in an earlier one, and text alone between them."""
    found = []
    for cases in evaluate_eyes.cases(8).values():
        for case in cases:
            images = [picture(Image.open(BytesIO(data)).convert("RGB")) for data, _ in case.files]
            places: list[str | Picture] = [place(image) for image in images]
            content = [*places, case.question] if case.before else [case.question, *places]
            found.append(ask([Message("user", tuple(content))], images))
    turns = [
        Message("user", (place(images[0]), "Hello!")),
        Message("assistant", "Hello! How can I help?"),
        Message("user", "What is in the picture?"),
    ]
    found.append(ask(turns, images[:1]))
    found.append(ask([Message("user", "What are you?")], []))
    return found


@asynccontextmanager
async def native() -> AsyncIterator[NativeBackend]:
    config = CoreConfig(
        models=[MODEL],
        device="cpu",
        page_bytes=0,
        pool_bytes=64 << 20,
        max_num_running=16,
        max_step_tokens=512,
        num_threads=1,
        batch_floor_share=0.05,
    )
    backend = NativeBackend(config)
    await backend.start()
    try:
        await state(backend, ModelState.READY)
        yield backend
    finally:
        await backend.stop()


async def answers(backend: Backend, requests: Sequence[BackendRequest]) -> list[list[int]]:
    listeners = [Listener() for _ in requests]
    for one, listener in zip(requests, listeners, strict=True):
        backend.submit(one, listener)
    for listener in listeners:
        assert isinstance(await listener.end(), FinishReason), listener.outcome
    return [listener.ids for listener in listeners]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_sees_as_the_native_backend_does() -> None:
    python = interpreter()
    requests = asks()

    async def test() -> None:
        async with native() as backend:
            expected = await answers(backend, requests)
        config = msgspec.structs.replace(
            worker_config(), model=MODEL, memory_share=0.3, kv_cache_bytes=256 << 20, max_pictures=20
        )
        backend = VllmBackend(config, python=Path(python))
        await backend.start()
        try:
            await state(backend, ModelState.READY)
            assert await answers(backend, requests) == expected
            await check_salt(backend)
            await check_kill(backend, requests, expected)
        finally:
            await backend.stop()

    run(test(), 800)


async def check_salt(backend: Backend) -> None:
    """A prompt with a picture is found again by its workspace alone, and not where the picture is another."""
    red, blue = (picture(Image.new("RGB", (96, 96), color)) for color in ("red", "blue"))
    cached = []
    for image, salt in ((red, b"one"), (red, b"one"), (blue, b"one"), (red, b"two"), (red, b"two")):
        listener = Listener()
        words = "The fox and the bear went to the river. " * 10
        backend.submit(ask([Message("user", (place(image), words))], [image], salt), listener)
        await listener.end()
        cached.append(listener.cached)
    assert cached[0] == cached[2] == cached[3] == 0
    assert cached[1] == cached[4] > 32


async def check_kill(backend: Backend, requests: Sequence[BackendRequest], expected: list[list[int]]) -> None:
    """The worker is killed in the middle of an answer about a picture: it goes on."""
    listeners = [Listener() for _ in requests]
    for one, listener in zip(requests, listeners, strict=True):
        backend.submit(one, listener)
    await listeners[-1].count(2)
    worker = backend.stats().core_pid
    os.kill(worker, signal.SIGKILL)
    await new_core(backend, worker)
    for listener, whole in zip(listeners, expected, strict=True):
        assert isinstance(await listener.end(), FinishReason), listener.outcome
        assert listener.ids == whole
