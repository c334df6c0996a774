"""The engine process put together: backend, models, service, listener; from the first health check to the last reply.

Owns the order in which they start and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiexport_edge.engine.backends.base import Backend, ModelState
from aiexport_edge.engine.images.limits import ImageLimits
from aiexport_edge.engine.images.pool import ImagePool
from aiexport_edge.engine.models.facts import ModelFacts
from aiexport_edge.engine.server.adapters import AdapterRegistry
from aiexport_edge.engine.server.admission import Admission
from aiexport_edge.engine.server.generations import Generations
from aiexport_edge.engine.server.listener import Listener, ListenerConfig, open_listener
from aiexport_edge.engine.server.models import Model, any_ready, load_text
from aiexport_edge.engine.server.outbox import DEFAULT_BOUND, OutboxBound
from aiexport_edge.engine.server.pictures import Pictures
from aiexport_edge.engine.server.service import EngineService
from aiexport_edge.engine.server.tracing import RequestTracer
from aiexport_edge.engine.text.tokenizer import TokenizerError

log = logging.getLogger(__name__)

LAST_WORDS_S = 0.2  # for the end of calls to reach their clients


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What pictures may be and take: `limits` of one, `max_count` of a request, `held_bytes` over all requests,
    `timeout_s` for decoding one in one of `num_workers` processes.
    """

    limits: ImageLimits = field(default_factory=ImageLimits)
    max_count: int = 20
    held_bytes: int = 512 << 20
    num_workers: int = 1
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the server needs to know. `drain_s`: how long running requests may go on after SIGTERM. `ready_fd`: told one
    line when the first model serves; None: nobody asks. Adapters lie below `adapter_roots`; without there are none.
    """

    listener: ListenerConfig
    models: Sequence[ModelFacts]
    queue_size: int
    tenant_queue_share: float
    drain_s: float
    outbox: OutboxBound = DEFAULT_BOUND
    ready_fd: int | None = None
    otlp_endpoint: str | None = None
    images: ImageConfig = field(default_factory=ImageConfig)
    adapter_roots: Sequence[Path] = ()


class Server:
    """A listening engine. `start`, then `drain`, then `stop`; the port is `listener.port`."""

    def __init__(self, config: ServerConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._models = [Model(index, facts, backend) for index, facts in enumerate(config.models)]
        admission = Admission(config.queue_size, config.tenant_queue_share)
        self._tracer = None if config.otlp_endpoint is None else RequestTracer(config.otlp_endpoint)
        images = config.images
        pool = ImagePool(images.limits, num_workers=images.num_workers, timeout_s=images.timeout_s)
        pictures = Pictures(pool, held_bytes=images.held_bytes, max_count=images.max_count)
        adapters = AdapterRegistry(self._models, roots=config.adapter_roots, on_status=backend.on_status)
        self._generations = Generations(self._models, backend, admission, pictures, adapters, self._tracer)
        self._service = EngineService(self._generations, config.outbox)
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: Listener | None = None

    @property
    def listener(self) -> Listener:
        """The open listener, after `start`."""
        assert self._listener is not None
        return self._listener

    async def start(self) -> None:
        """Listens at once; models load on. Raises `ListenerError`."""
        await self._backend.start()
        self._listener = await open_listener(self._config.listener, self._service)
        readiness = _Readiness(self._models, self.listener, self._config.ready_fd)
        self._backend.on_status(readiness.changed.set)
        self._tasks = [
            asyncio.create_task(readiness.follow(), name="readiness"),
            asyncio.create_task(_load_texts(self._models, readiness.changed), name="tokenizers"),
        ]

    async def drain(self) -> None:
        """Takes nothing new and says so; returns when what runs has ended, or after the configured time."""
        log.info("draining")
        self._service.drain()
        await self._end_tasks()
        await self.listener.set_serving(False)
        try:
            await asyncio.wait_for(self._generations.idle(), self._config.drain_s)
        except TimeoutError:
            log.warning("requests still run after %.0f s; they are ended", self._config.drain_s)

    async def stop(self) -> None:
        """Ends every call and the core; also after a `start` that failed."""
        await self._end_tasks()
        if self._listener is not None:
            await self._listener.close(grace_s=LAST_WORDS_S)
        self._generations.close()
        await self._backend.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    async def _end_tasks(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def serve(config: ServerConfig, backend: Backend) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises `ListenerError` where it cannot listen, `TracingError`."""
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    server = Server(config, backend)
    try:
        await server.start()
        await asked_to_stop.wait()
        await server.drain()
    finally:
        await server.stop()


async def _load_texts(models: Sequence[Model], changed: asyncio.Event) -> None:
    """Tokenizers and templates, each model's in a thread of its own."""

    async def load(model: Model) -> None:
        try:
            model.set_text(await asyncio.to_thread(load_text, model.facts))
        except TokenizerError as error:
            log.error("%s: %s", model.facts.name, error)
            model.set_text(error)
        except Exception as error:  # a file of the directory that nobody has foreseen
            log.exception("tokenizer or template of %s", model.facts.name)
            model.set_text(TokenizerError(f"its tokenizer or template cannot be read ({type(error).__name__})."))
        changed.set()

    await asyncio.gather(*map(load, models))


class _Readiness:
    """Says what the models' states come to: to the health service, to the log, and once to whoever started us."""

    def __init__(self, models: Sequence[Model], listener: Listener, ready_fd: int | None) -> None:
        self.changed = asyncio.Event()
        self._models = models
        self._listener = listener
        self._ready_fd = ready_fd
        self._states: dict[str, ModelState] = {}

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            self.changed.clear()
            for model in self._models:
                name, status = model.facts.name, model.status
                if self._states.get(name) is not status.state:
                    self._states[name] = status.state
                    log.info("model %s is %s", name, status.state.value)
                    if status.state is ModelState.READY and model.context_window < model.facts.context_window:
                        log.warning(
                            "the page pool holds %d tokens of model %s, less than its context window of %d; "
                            "raise engine.pool_bytes",
                            model.context_window,
                            name,
                            model.facts.context_window,
                        )
            ready = any_ready(self._models)
            await self._listener.set_serving(ready)
            if ready and self._ready_fd is not None:
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                    os.write(self._ready_fd, b"ready\n")
                os.close(self._ready_fd)
                self._ready_fd = None
            await self.changed.wait()
