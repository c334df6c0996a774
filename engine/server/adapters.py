"""The adapters that this engine serves, by the names that its clients gave them.

Owns what a name stands for now. A request keeps what it found: a name that is loaded anew or unloaded changes nothing
for it, and as long as such a request runs, its adapter is told of as in use: its directory may be read again. Reading a
directory is `peft.py`'s; bringing factors to the device the core's.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aiexport_edge.engine.adapters.peft import AdapterError, read_adapter
from aiexport_edge.engine.backends.base import ModelState
from aiexport_edge.engine.models.config import ModelConfig, ModelError
from aiexport_edge.engine.server.errors import InvalidRequest, RequestError
from aiexport_edge.engine.server.models import Model
from aiexport_edge.proto import engine_pb2 as pb

MAX_NAME_BYTES = 256
MAX_ADAPTERS = 10_000

T = TypeVar("T")
InThread = Callable[[Callable[[pb.LoadAdapterRequest], T], pb.LoadAdapterRequest], Awaitable[T]]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ServedAdapter:
    """An adapter that requests can name. Whoever runs with it holds it."""

    name: str
    model: str
    path: str
    digest: bytes
    rank: int


class AdapterRegistry:
    """Adapters below `roots` for `models`; without roots there are none. `on_status` calls what it is given whenever a
    model's status has changed.
    """

    def __init__(
        self, models: Sequence[Model], *, roots: Sequence[Path], on_status: Callable[[Callable[[], None]], None]
    ) -> None:
        self._models = {model.facts.name: model for model in models}
        self._roots = roots
        self._served: dict[str, ServedAdapter] = {}
        self._known: weakref.WeakSet[ServedAdapter] = weakref.WeakSet()
        self._changed = asyncio.Event()
        on_status(self._pulse)

    def served(self) -> list[ServedAdapter]:
        """All of them, by name."""
        return [self._served[name] for name in sorted(self._served)]

    def leaving(self) -> list[ServedAdapter]:
        """Those that no name stands for any more, but requests still run with."""
        named = set(self._served.values())
        return sorted((each for each in self._known if each not in named), key=lambda each: each.name)

    def find(self, name: str, model: str) -> ServedAdapter:
        """What `name` stands for now. Raises `RequestError` where that is no adapter of `model`."""
        adapter = self._served.get(name)
        if adapter is None or adapter.model != model:
            raise RequestError(
                pb.ERROR_NOT_FOUND,
                f"The model {model} has no adapter of this name here; load it first.",
                field="adapter",
            )
        return adapter

    async def load(self, request: pb.LoadAdapterRequest, in_thread: InThread[ServedAdapter]) -> ServedAdapter:
        """Let a name stand for the adapter that `request` names, once it is held against its model and the room that
        the device has; while the model is still loading, that is not known. Raises `RequestError`.
        """
        adapter = await in_thread(self._read, request)
        await self._check_room(adapter)
        if adapter.name not in self._served and len(self._served) >= MAX_ADAPTERS:
            raise InvalidRequest(f"There are {MAX_ADAPTERS} adapters; unload some first.", "name")
        self._served[adapter.name] = adapter
        self._known.add(adapter)
        return adapter

    def remove(self, name: str) -> None:
        """Let `name` stand for nothing."""
        self._served.pop(name, None)

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _check_room(self, adapter: ServedAdapter) -> None:
        model = self._models[adapter.model]
        while (status := model.status).adapters is None:
            if status.state is ModelState.FAILED:
                raise InvalidRequest(
                    f"The model {adapter.model} could not be loaded here, so it has no adapters.", "model"
                )
            await self._changed.wait()
        room = status.adapters
        if not room.slots:
            raise InvalidRequest(
                "This engine has set nothing of its card aside for adapters; set slots = 8, or how many are to be in "
                "use at a time, under [adapters] in the engine's configuration, and start it anew.",
                "model",
            )
        if adapter.rank > room.max_rank:
            raise InvalidRequest(
                f"The adapter's rank {adapter.rank} is more than {room.max_rank}, the most that this engine has room "
                f"for; set max_rank = {adapter.rank} under [adapters] in its configuration, and start it anew.",
                "path",
            )

    def _read(self, request: pb.LoadAdapterRequest) -> ServedAdapter:
        """The adapter that `request` names, held against its model. Blocks while it is read. Raises `RequestError`."""
        if not 1 <= len(request.name.encode()) <= MAX_NAME_BYTES:
            raise InvalidRequest(f"The name must have 1 to {MAX_NAME_BYTES} bytes.", "name")
        model = self._models.get(request.model)
        if model is None:
            raise RequestError(
                pb.ERROR_NOT_FOUND, "This engine has no such model; ListModels names those there are.", field="model"
            )
        directory = self._inside(request.path)
        try:
            adapter = read_adapter(directory, ModelConfig.load(model.facts.directory))
        except (AdapterError, ModelError) as error:
            raise InvalidRequest(f"{error}.", "path") from error
        return ServedAdapter(request.name, model.facts.name, str(directory), adapter.digest, adapter.rank)

    def _inside(self, path: str) -> Path:
        """The directory itself, links followed, which lies below a root. Raises `RequestError`."""
        if not self._roots:
            raise InvalidRequest("This engine serves no adapters.", "path")
        try:
            directory = Path(path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            raise InvalidRequest(f"There is no directory {path!r} on the engine's machine.", "path") from None
        if not any(directory.is_relative_to(root.resolve()) for root in self._roots):
            raise InvalidRequest(
                f"{path!r} lies in none of this engine's directories for adapters; name one that holds it in roots "
                "under [adapters] of the engine's configuration.",
                "path",
            )
        return directory


def check_resumed_adapter(resume: pb.Resume, adapter: ServedAdapter | None) -> None:
    """Whether a reply goes on with the adapter that it began with. Raises `RequestError`."""
    if resume.adapter_digest != (b"" if adapter is None else adapter.digest):
        raise RequestError(
            pb.ERROR_REVISION_CHANGED,
            "The adapter has changed since this reply began, so the reply cannot go on.",
            field="resume.adapter_digest",
        )


def to_proto(adapter: ServedAdapter) -> pb.Adapter:
    """As the wire has it."""
    return pb.Adapter(
        name=adapter.name, model=adapter.model, path=adapter.path, digest=adapter.digest, rank=adapter.rank
    )
