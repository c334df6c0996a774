"""What the engine's server asks of whatever runs models: token ids in, token ids out, a callback per request and step.

Knows no text, no gRPC and no clients. A backend lives on the server's event loop and calls back on it; all it has to
say of one step it says within one turn of the loop, so that a listener can send it on as one message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from aiexport_edge.engine.core.protocol import (
    AdapterRef,
    AdapterRoom,
    CoreStats,
    FinishReason,
    ImageInput,
    Priority,
    Sampling,
)
from aiexport_edge.engine.structured.vocabulary import Vocabulary


class ModelState(Enum):
    """Whether a model can serve."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`message` says why a model failed, for the operator. `capacity_tokens`: the longest sequence, prompt and output
    together, that the backend's memory holds; 0 while it is not known. `adapters`: the room for them; None while it is
    not known.
    """

    state: ModelState
    message: str = ""
    capacity_tokens: int = 0
    adapters: AdapterRoom | None = None


class RequestListener(Protocol):
    """Told what becomes of one request, in this order: `started`, any number of `tokens`, then `finished` or `failed`.

    After `abort` or `finish` of the request nothing is told any more.
    """

    def started(self, cached_tokens: int) -> None:
        """First scheduled; told once, also where the core was restarted. `cached_tokens` of the prompt were cached."""

    def tokens(self, ids: Sequence[int]) -> None:
        """New output ids, in order."""

    def finished(self, reason: FinishReason) -> None:
        """It ended by itself."""

    def failed(self, message: str) -> None:
        """It cannot go on; a sentence."""


@dataclass(frozen=True, slots=True)
class BackendConstraint:
    """The reply is a document of `grammar` (`structured.packed`), of which the prompt holds `prefix`. `vocabulary` is
    the model's: the core has no tokenizer.
    """

    grammar: bytes
    prefix: bytes
    vocabulary: Vocabulary


class StartListener(Protocol):
    """Told how far a start is; of every start, also those after a core's end."""

    def weights(self, model: int, done: int, total: int) -> None:
        """`done` of `total` bytes of a model's weights are read."""

    def warming(self, done: int, total: int) -> None:
        """`done` of `total` parts of what comes after."""

    def over(self) -> None:
        """It serves, or has failed."""


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """`model` indexes the backend's models. `output_ids` were produced by an earlier attempt and are not told again.

    `prompt_ids` and `output_ids` are little-endian uint32 bytes (`core.protocol.pack_ids`). `images` go by their start.
    """

    model: int
    prompt_ids: bytes
    output_ids: bytes
    max_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling
    tenant: str
    weight: float
    salt: bytes
    priority: Priority
    constraint: BackendConstraint | None = None
    images: tuple[ImageInput, ...] = ()
    adapter: AdapterRef | None = None


@dataclass(frozen=True, slots=True)
class BackendStats:
    """`core`: the gauges that the core said last, and counters over all its lives; None before the first word.
    `core_pid` 0: there is none just now.
    """

    core: CoreStats | None
    core_restarts: int
    core_pid: int


class Backend(Protocol):
    """Runs requests of a fixed list of models. All methods are called on the event loop."""

    async def start(self) -> None:
        """Returns at once; loading goes on, `on_status` tells how it ends."""

    async def stop(self) -> None:
        """Ends everything; requests that run are dropped without a word."""

    def submit(self, request: BackendRequest, listener: RequestListener) -> int:
        """Takes a request in, also while the core is being restarted. Returns its handle."""

    def abort(self, handle: int) -> None:
        """The client has left. No more is told. An unknown handle has ended already and is ignored."""

    def finish(self, handle: int) -> None:
        """The server has seen the end in the text. No more is told."""

    def statuses(self) -> list[ModelStatus]:
        """One for each model, in order."""

    def stats(self) -> BackendStats:
        """Gauges and counters as last reported."""

    def on_status(self, callback: Callable[[], None]) -> None:
        """`callback` is called whenever `statuses` has changed."""
