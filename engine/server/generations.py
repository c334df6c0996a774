"""All requests of the engine process: taken in, counted, waited for.

Owns which requests there are, the queue's bound, draining, and what requests share: models, backend, pictures,
adapters, formats, and the threads in which long prompts are tokenized. What becomes of one request is its own affair
(`generation.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from aiexport_edge.engine.backends.base import Backend
from aiexport_edge.engine.server.adapters import AdapterRegistry
from aiexport_edge.engine.server.admission import Admission
from aiexport_edge.engine.server.generation import Generation
from aiexport_edge.engine.server.models import Model
from aiexport_edge.engine.server.outbox import Outbox
from aiexport_edge.engine.server.pictures import Pictures, check_images, hold_all, image_blocks
from aiexport_edge.engine.server.prompt import INLINE_CHARACTERS, check_model, encode_prompt, num_characters
from aiexport_edge.engine.server.response_format import ResponseFormats
from aiexport_edge.engine.server.tracing import RequestTracer
from aiexport_edge.proto import engine_pb2 as pb

T = TypeVar("T")


class Generations:
    """All requests of this process."""

    def __init__(
        self,
        models: Sequence[Model],
        backend: Backend,
        admission: Admission,
        pictures: Pictures,
        adapters: AdapterRegistry,
        tracer: RequestTracer | None = None,
    ) -> None:
        self.tracer = tracer
        self.adapters = adapters
        self.pictures = pictures
        self.models = {model.facts.name: model for model in models}
        self.backend = backend
        self.admission = admission
        self.draining = False
        self.formats = ResponseFormats()
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._live: set[Generation] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, request: pb.GenerateRequest, outbox: Outbox, tag: int, on_end: Callable[[], None]) -> Generation:
        """Takes a request in; everything about it goes into `outbox` under `tag`, and then `on_end` is called."""
        generation = Generation(self, request, outbox, tag, on_end)
        self._live.add(generation)
        self._idle.clear()
        generation.begin(request)
        return generation

    async def count_tokens(self, request: pb.CountTokensRequest) -> int:
        """Tokens of a prompt, template included. Raises `RequestError`."""
        model, text = check_model(self.models, request.model)
        blocks = image_blocks(request.chat)
        check_images(blocks, model, self.pictures)
        held = await hold_all(blocks, model.facts.vision, self.pictures)
        try:
            pictures = [picture.picture for picture in held]
            if num_characters(request) <= INLINE_CHARACTERS:
                return len(encode_prompt(request, model, text, pictures).ids)
            return len((await self.in_thread(encode_prompt, request, model, text, pictures)).ids)
        finally:
            for picture in held:
                picture.release()

    async def idle(self) -> None:
        """Returns when no request is left."""
        await self._idle.wait()

    def close(self) -> None:
        """Frees the threads and processes."""
        self.pictures.close()
        self.formats.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def start_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def ended(self, generation: Generation) -> None:
        self._live.discard(generation)
        if not self._live:
            self._idle.set()
