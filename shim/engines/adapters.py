"""The adapters of one engine: brings those that are wanted there, and takes off those that no longer are.

Owns what the engine has loaded, as far as this process has seen to it. An engine that starts anew has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio

from aiexport_edge.proto import engine_pb2 as pb

LOAD_TIMEOUT_S = 120.0  # every byte of its files is read
LIST_TIMEOUT_S = 5.0
RETRY_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """`name` is the engines' for it, `model` theirs for the weights that it is for, `path` its directory there."""

    name: str
    model: str
    path: str


class AdapterKeeper:
    """`on_change` is called when one has been loaded."""

    def __init__(self, address: str, on_change: Callable[[], None]) -> None:
        self.loaded: set[str] = set()
        self._address = address
        self._on_change = on_change
        self._wanted: Mapping[str, WantedAdapter] = {}
        self._changed = asyncio.Event()
        self._told: set[str] = set()  # whose failure is in the log
        self._ask: Callable[[], Awaitable[pb.ListAdaptersResponse]] | None = None

    def want(self, adapters: Sequence[WantedAdapter]) -> None:
        """These, and no others."""
        self._wanted = {adapter.name: adapter for adapter in adapters}
        self._changed.set()

    def forget(self) -> None:
        """The engine is gone, and what it had loaded with it."""
        self.loaded.clear()
        self._ask = None

    async def paths(self) -> set[str] | None:
        """Of the adapters that the engine has, or still runs with; None where it can't be asked."""
        if self._ask is None:
            return None
        try:
            known = await self._ask()
        except grpc.aio.AioRpcError:
            return None
        return {adapter.path for adapter in (*known.adapters, *known.leaving)}

    async def keep(self, stub: Any, metadata: Any, models: Mapping[str, object]) -> None:
        """Until cancelled: loads and unloads, for an engine with these models."""
        self._ask = partial(stub.ListAdapters, pb.ListAdaptersRequest(), metadata=metadata, timeout=LIST_TIMEOUT_S)
        while True:
            self._changed.clear()
            for name in self.loaded - self._wanted.keys():
                self.loaded.discard(name)
                with contextlib.suppress(grpc.aio.AioRpcError):  # then the session ends too
                    await stub.UnloadAdapter(pb.UnloadAdapterRequest(name=name), metadata=metadata)
            missing = [
                adapter
                for adapter in self._wanted.values()
                if adapter.model in models and adapter.name not in self.loaded
            ]
            all_loaded = True
            for adapter in missing:
                all_loaded &= await self._load(stub, metadata, adapter)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if all_loaded else RETRY_S):
                    await self._changed.wait()

    async def _load(self, stub: Any, metadata: Any, adapter: WantedAdapter) -> bool:
        request = pb.LoadAdapterRequest(name=adapter.name, model=adapter.model, path=adapter.path)
        try:
            await stub.LoadAdapter(request, metadata=metadata, timeout=LOAD_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if adapter.name not in self._told:
                self._told.add(adapter.name)
                log.error("engine %s: adapter %s: %s", self._address, adapter.path, error.details())
            return False
        self._told.discard(adapter.name)
        self.loaded.add(adapter.name)
        log.info("engine %s: adapter %s is loaded", self._address, adapter.path)
        self._on_change()
        return True
