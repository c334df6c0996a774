"""The adapters that this engine serves, by the names that its clients gave them.

Owns what a name stands for now. A request keeps what it found: a name that is loaded anew or unloaded changes nothing
for it. Reading a directory is `peft.py`'s; bringing factors to the device the core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.engine.adapters.peft import AdapterError, read_adapter
from aiexport_edge.engine.models.config import ModelConfig, ModelError
from aiexport_edge.engine.server.errors import InvalidRequest, RequestError
from aiexport_edge.engine.server.facts import ModelFacts
from aiexport_edge.proto import engine_pb2 as pb

MAX_NAME_BYTES = 256
MAX_ADAPTERS = 10_000


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter that requests can name."""

    name: str
    model: str
    path: str
    digest: bytes
    rank: int


class AdapterRegistry:
    """Adapters below `roots`, of rank `max_rank` at most, for `models`; without roots there are none."""

    def __init__(self, models: Sequence[ModelFacts], *, roots: Sequence[Path] = (), max_rank: int = 0) -> None:
        self._models = {facts.name: facts for facts in models}
        self._roots = roots
        self._max_rank = max_rank
        self._served: dict[str, ServedAdapter] = {}

    def list(self) -> list[ServedAdapter]:
        """All of them, by name."""
        return [self._served[name] for name in sorted(self._served)]

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

    def read(self, request: pb.LoadAdapterRequest) -> ServedAdapter:
        """The adapter that `request` names, held against its model. Blocks while it is read: for a thread.

        Raises `RequestError`.
        """
        if not 1 <= len(request.name.encode()) <= MAX_NAME_BYTES:
            raise InvalidRequest(f"The name must have 1 to {MAX_NAME_BYTES} bytes.", "name")
        facts = self._models.get(request.model)
        if facts is None:
            raise RequestError(
                pb.ERROR_NOT_FOUND, "This engine has no such model; ListModels names those there are.", field="model"
            )
        directory = self._inside(request.path)
        try:
            adapter = read_adapter(directory, ModelConfig.load(facts.directory), max_rank=self._max_rank)
        except (AdapterError, ModelError) as error:
            raise InvalidRequest(f"{error}.", "path") from error
        return ServedAdapter(request.name, facts.name, str(directory), adapter.digest, adapter.rank)

    def add(self, adapter: ServedAdapter) -> None:
        """Let its name stand for it. Raises `RequestError` where there are too many."""
        if adapter.name not in self._served and len(self._served) >= MAX_ADAPTERS:
            raise InvalidRequest(f"There are {MAX_ADAPTERS} adapters; unload some first.", "name")
        self._served[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Let `name` stand for nothing."""
        self._served.pop(name, None)

    def _inside(self, path: str) -> Path:
        """The directory itself, links followed, which lies below a root. Raises `RequestError`."""
        if not self._roots:
            raise InvalidRequest("No adapters are served here; name their directories in adapters.roots.", "path")
        try:
            directory = Path(path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            raise InvalidRequest(f"There is no directory {path!r} on the engine's machine.", "path") from None
        if not any(directory.is_relative_to(root.resolve()) for root in self._roots):
            raise InvalidRequest(
                f"{path!r} lies in none of the directories that adapters.roots of the configuration names.", "path"
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
