"""Several backends behind one interface: each has some of the engine's models.

Owns which model and which handle belong to whom. Knows nothing of what the backends are.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from aiexport_edge.engine.backends.base import (
    Backend,
    BackendRequest,
    BackendStats,
    ModelStatus,
    RequestListener,
    StartListener,
)
from aiexport_edge.engine.core.protocol import CoreStats


@dataclass(frozen=True, slots=True)
class Part:
    """`models[i]` is the engine's index of the backend's model `i`."""

    backend: Backend
    models: Sequence[int]


class CompositeBackend:
    """The parts' models together are 0 … n-1, each once."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._place = {
            model: (number, local) for number, part in enumerate(parts) for local, model in enumerate(part.models)
        }
        assert sorted(self._place) == list(range(len(self._place)))

    async def start(self) -> None:
        for part in self._parts:
            await part.backend.start()

    async def stop(self) -> None:
        await asyncio.gather(*(part.backend.stop() for part in self._parts))

    def submit(self, request: BackendRequest, listener: RequestListener) -> int:
        number, local = self._place[request.model]
        handle = self._parts[number].backend.submit(dataclasses.replace(request, model=local), listener)
        return handle * len(self._parts) + number

    def abort(self, handle: int) -> None:
        own, number = divmod(handle, len(self._parts))
        self._parts[number].backend.abort(own)

    def finish(self, handle: int) -> None:
        own, number = divmod(handle, len(self._parts))
        self._parts[number].backend.finish(own)

    def statuses(self) -> list[ModelStatus]:
        of_parts = [part.backend.statuses() for part in self._parts]
        return [of_parts[number][local] for _, (number, local) in sorted(self._place.items())]

    def stats(self) -> BackendStats:
        """Sums. Pages are counted in the size of the first part that has said one; `core_pid` is the first one's."""
        of_parts = [part.backend.stats() for part in self._parts]
        pids = [stats.core_pid for stats in of_parts if stats.core_pid]
        return BackendStats(
            core=self._total([stats.core for stats in of_parts]),
            core_restarts=sum(stats.core_restarts for stats in of_parts),
            core_pid=pids[0] if pids else 0,
        )

    def on_status(self, callback: Callable[[], None]) -> None:
        for part in self._parts:
            part.backend.on_status(callback)

    def _total(self, of_parts: Sequence[CoreStats | None]) -> CoreStats | None:
        spoken = [(part, stats) for part, stats in zip(self._parts, of_parts, strict=True) if stats is not None]
        if not spoken:
            return None
        page_bytes = next((stats.page_bytes for _, stats in spoken if stats.page_bytes), 0)

        def pages(name: str) -> int:
            if not page_bytes:
                return 0
            return sum(getattr(stats, name) * stats.page_bytes // page_bytes for _, stats in spoken)

        def by_model(name: str) -> list[int]:
            values = [0] * len(self._place)
            for part, stats in spoken:
                values_of_part = getattr(stats, name)  # none where the part does not count it
                for model, value in zip(part.models, values_of_part or [0] * len(part.models), strict=True):
                    values[model] = value
            return values

        used, cached, free = pages("pages_used"), pages("pages_cached"), pages("pages_free")
        return msgspec.structs.replace(
            spoken[0][1],
            steps=sum(stats.steps for _, stats in spoken),
            running=sum(stats.running for _, stats in spoken),
            waiting=sum(stats.waiting for _, stats in spoken),
            pages_total=used + cached + free,
            pages_used=used,
            pages_cached=cached,
            pages_free=free,
            page_bytes=page_bytes,
            preemptions=sum(stats.preemptions for _, stats in spoken),
            model_running=by_model("model_running"),
            model_waiting=by_model("model_waiting"),
            model_prompt_tokens=by_model("model_prompt_tokens"),
            model_cached_tokens=by_model("model_cached_tokens"),
            model_output_tokens=by_model("model_output_tokens"),
            model_guessed_tokens=by_model("model_guessed_tokens"),
            model_accepted_tokens=by_model("model_accepted_tokens"),
        )


class PartProgress:
    """Tells of a part's start in the engine's own indices."""

    def __init__(self, progress: StartListener, models: Sequence[int]) -> None:
        self._progress = progress
        self._models = models

    def weights(self, model: int, done: int, total: int) -> None:
        self._progress.weights(self._models[model], done, total)

    def warming(self, done: int, total: int) -> None:
        self._progress.warming(done, total)

    def over(self) -> None:
        self._progress.over()
