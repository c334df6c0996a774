"""The engine process put together: backend, models, service, listener; from the first health check to the last reply.

Owns the order in which they start and end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from aiexport_edge.engine.backends.base import Backend, ModelState
from aiexport_edge.engine.server.admission import Admission
from aiexport_edge.engine.server.facts import ModelFacts
from aiexport_edge.engine.server.generation import Generations
from aiexport_edge.engine.server.listener import Listener, ListenerConfig, open_listener
from aiexport_edge.engine.server.models import Model, any_ready, load_text
from aiexport_edge.engine.server.service import EngineService
from aiexport_edge.engine.text.tokenizer import TokenizerError

log = logging.getLogger(__name__)

DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the server needs to know. `ready_fd`: told one line when the first model serves; None: nobody asks."""

    listener: ListenerConfig
    models: Sequence[ModelFacts]
    queue_size: int
    tenant_queue_share: float
    drain_s: float = DRAIN_S
    ready_fd: int | None = None


async def serve(config: ServerConfig, backend: Backend) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises `ListenerError` where it cannot listen."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    models = [Model(index, facts, backend) for index, facts in enumerate(config.models)]
    generations = Generations(models, backend, Admission(config.queue_size, config.tenant_queue_share))
    service = EngineService(generations)
    await backend.start()
    try:
        listener = await open_listener(config.listener, service)
        readiness = _Readiness(models, listener, config.ready_fd)
        backend.on_status(readiness.changed.set)
        following = asyncio.create_task(readiness.follow())
        loading = asyncio.create_task(_load_texts(models, readiness.changed))
        await stop.wait()
        log.info("draining")
        service.drain()
        for task in (following, loading):
            task.cancel()
        await asyncio.gather(following, loading, return_exceptions=True)
        await listener.set_serving(False)
        try:
            await asyncio.wait_for(generations.idle(), config.drain_s)
        except TimeoutError:
            log.warning("requests still run after %.0f s; they are ended", config.drain_s)
        await listener.close(grace_s=0.2)
    finally:
        generations.close()
        await backend.stop()


async def _load_texts(models: Sequence[Model], changed: asyncio.Event) -> None:
    """Tokenizers and templates, each model's in a thread of its own."""

    async def load(model: Model) -> None:
        try:
            model.set_text(await asyncio.to_thread(load_text, model.facts))
        except TokenizerError as error:
            log.error("%s: %s", model.facts.name, error)
            model.set_text(error)
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
                os.write(self._ready_fd, b"ready\n")
                os.close(self._ready_fd)
                self._ready_fd = None
            await self.changed.wait()
