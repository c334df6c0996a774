"""The workspaces' fine-tuned models, which are low-rank adapters of the listed ones.

Owns what the store says of them, as of a moment ago, for the catalog to show and for the engines to load; and when the
copy of one that is removed goes: once no engine needs it. A change made by any process shows within a second: each
raises the store's generation, which is polled here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.proto.config import ModelSpec
from aiexport_edge.shim.adapter_copies import AdapterCopies
from aiexport_edge.shim.engines.adapters import WantedAdapter
from aiexport_edge.shim.engines.engines import Engines
from aiexport_edge.shim.store import Store
from aiexport_edge.shim.store.adapter_rows import AdapterRows
from aiexport_edge.shim.store.errors import remedy
from aiexport_edge.shim.store.values import Adapter

POLL_S = 0.5

log = logging.getLogger(__name__)


class Adapters:
    """`models` are the listed ones, of which an adapter names one as its base by any of its ids. `copies`: where those
    lie that are in no root.
    """

    def __init__(self, store: Store, models: Sequence[ModelSpec], engines: Engines, copies: Path) -> None:
        self._store = store
        self._rows = AdapterRows(store.database)
        self._weights = {model_id: spec.weights for spec in models for model_id in spec.ids}
        self._engines = engines
        self._copies = AdapterCopies(copies)
        self._has_leavings = False
        self._generation: int | None = None
        self.by_id: Mapping[str, Adapter] = {}  # by the id that requests name, oldest first

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "adapters") as thread:
            while True:
                try:
                    generation = await loop.run_in_executor(thread, self._store.generation)
                    if generation != self._generation:
                        self._take(await loop.run_in_executor(thread, self._rows.list))
                        self._generation = generation
                        self._has_leavings = True  # perhaps
                    if self._has_leavings:
                        self._has_leavings = await self._clear(thread)
                except SQLAlchemyError as error:
                    if self._generation is not None:
                        log.error("the store does not answer; fine-tuned models stay as they are: %s", remedy(error))
                    self._generation = None
                await asyncio.sleep(POLL_S)

    async def _clear(self, thread: ThreadPoolExecutor) -> bool:
        """Removes copies that neither the store nor an engine knows; whether there are others, for later."""
        loop = asyncio.get_running_loop()
        used = {adapter.path for adapter in self.by_id.values()}
        try:
            unnamed = await loop.run_in_executor(thread, self._copies.besides, used)
            if not unnamed:
                return False
            in_use = await self._engines.adapter_paths()
            if in_use is None:
                return True
            return await loop.run_in_executor(thread, self._remove, [path for path in unnamed if path not in in_use])
        except OSError as error:
            log.error("what is left in %s can't be removed: %s", self._copies.root, error.strerror)
            return False

    def _remove(self, paths: Sequence[str]) -> bool:
        with self._copies.locked(wait=False) as is_ours:
            if not is_ours:
                return True
            used = {adapter.path for adapter in self._rows.list()}
            for path in set(self._copies.besides(used)).intersection(paths):
                self._copies.remove(path)
            return bool(self._copies.besides(used))

    def _take(self, adapters: Sequence[Adapter]) -> None:
        self.by_id = {adapter.full_id: adapter for adapter in adapters}
        self._engines.want_adapters(
            [
                WantedAdapter(adapter.adapter_id, self._weights[adapter.base], adapter.path)
                for adapter in adapters
                if adapter.base in self._weights
            ]
        )
