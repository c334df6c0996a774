"""Takes a batch in: cuts it up, checks every request, and spools them to a file until all are known to be good.

Nothing but the request that is being read is held in memory; of the others a few words each. Runs in a thread: what it
reads is for the processor, and it lets go of the interpreter every millisecond so that streams of other requests go on.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.shim import json_body
from aiexport_edge.shim.batches.item import Item, read_item
from aiexport_edge.shim.batches.split import Element, Member, Part, Requests, Splitter
from aiexport_edge.shim.errors import ApiError, InvalidRequest, Overloaded
from aiexport_edge.shim.fields import Value
from aiexport_edge.shim.images.sources import ImageRules
from aiexport_edge.shim.store.batch_values import NewItem

_SLICE_S = 0.001
_PAUSE_S = 0.0001

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Spooled:
    custom_id: str | None
    model: str
    num_bytes: int


class Intake:
    """One call's. `feed` and `finish` from a thread, one at a time; `close` at the end, whatever happened.

    `check` raises `ApiError` for a request that may not be. `directory` takes the spool, a file without a name.
    """

    def __init__(
        self,
        check: Callable[[Item], str],
        *,
        images: ImageRules,
        max_requests: int,
        max_request_bytes: int,
        directory: Path,
    ) -> None:
        self._check = check
        self._images = images
        self._max_requests = max_requests
        self._splitter = Splitter(max_value_bytes=max_request_bytes)
        try:
            self._spool = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (`close` does)
        except OSError as error:
            raise _no_space(error) from None
        self._items: list[_Spooled] = []
        self._places: dict[str, int] = {}  # of each custom_id
        self._members: dict[str, bytes] = {}
        self._seen_requests = False

    @property
    def held_bytes(self) -> int:
        """What is in memory of the body."""
        return self._splitter.held_bytes

    @property
    def num_requests(self) -> int:
        return len(self._items)

    def feed(self, piece: bytes) -> None:
        """Raises the `ApiError` of the first thing that is wrong; nothing may be fed after that."""
        let_go_at = time.perf_counter() + _SLICE_S
        for part in self._splitter.feed(piece):
            self._take(part)
            if time.perf_counter() > let_go_at:
                time.sleep(_PAUSE_S)
                let_go_at = time.perf_counter() + _SLICE_S

    def finish(self) -> str | None:
        """The whole body was good: its `webhook_url`. Raises `ApiError`."""
        for part in self._splitter.end():
            self._take(part)
        raw = self._members.get("requests")
        if not self._seen_requests:
            value = None if raw is None else json_body.parse(raw)
            if value is None:
                raise InvalidRequest("requests: this field is required", param="requests")
            Value(value, "requests").array()
        if not self._items:
            raise InvalidRequest("requests: must hold at least one request", param="requests")
        try:
            self._spool.flush()
        except OSError as error:
            raise _no_space(error) from None
        url = json_body.parse(self._members.get("webhook_url", b"null"))
        return None if url is None else Value(url, "webhook_url").text()

    def items(self) -> Iterator[NewItem]:
        """The requests in order, read back from the spool."""
        self._spool.seek(0)
        for index, item in enumerate(self._items):
            yield NewItem(index, item.custom_id, item.model, self._spool.read(item.num_bytes))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it could not write, nobody wants any more
            self._spool.close()

    # ------------------------------------------------------------------------------------------ parts

    def _take(self, part: Part) -> None:
        match part:
            case Element(raw):
                self._take_element(raw)
            case Requests():
                self._seen_requests = True
                self._items.clear()
                self._places.clear()
                self._spool.seek(0)
            case Member(name, raw):
                if name == "requests":
                    self._seen_requests = False
                if name in ("requests", "webhook_url"):
                    self._members[name] = raw
                else:
                    json_body.parse(raw)  # unknown, but JSON

    def _take_element(self, raw: bytes) -> None:
        index = len(self._items)
        if index == self._max_requests:
            raise InvalidRequest(
                f"requests: holds more than the {self._max_requests:,} requests that a batch of this workspace's plan "
                "may have",
                param="requests",
            )
        path = f"requests.{index}"
        try:
            element = json_body.parse(raw)
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error.message}", param=path) from None
        item = read_item(element, path, self._images)
        if item.custom_id is not None:
            earlier = self._places.setdefault(item.custom_id, index)
            if earlier != index:
                raise InvalidRequest(
                    f"{path}.custom_id: is that of requests.{earlier} already; each must be unique",
                    param=f"{path}.custom_id",
                )
        model = self._check(item)
        try:
            self._spool.write(raw)
        except OSError as error:
            raise _no_space(error) from None
        self._items.append(_Spooled(item.custom_id, model, len(raw)))


def _no_space(error: OSError) -> ApiError:
    log.error("a batch could not be spooled to the state directory: %s", error.strerror)
    return Overloaded("There is no room to take a batch in just now.", retry_after=60.0)
