"""What the endpoints share, put together from a configuration, a store and the engines, with its background tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

from aiexport_edge.proto.config import Config
from aiexport_edge.shim import metrics
from aiexport_edge.shim.adapters import Adapters
from aiexport_edge.shim.address_policy import AddressPolicy
from aiexport_edge.shim.auth.authenticator import Authenticator
from aiexport_edge.shim.auth.tokens import SigningKeys, Tokens
from aiexport_edge.shim.batches.executor import Executor
from aiexport_edge.shim.batches.run import Runner
from aiexport_edge.shim.body import BodyBudget
from aiexport_edge.shim.catalog import Catalog
from aiexport_edge.shim.engine_metrics import EngineMetrics
from aiexport_edge.shim.engines.engines import Engines, ModelState
from aiexport_edge.shim.idempotency import IdempotencyKeys
from aiexport_edge.shim.images.fetch import ImageFetcher
from aiexport_edge.shim.images.sources import ImageRules
from aiexport_edge.shim.limits.limits import Limits
from aiexport_edge.shim.limits.windows import open_window
from aiexport_edge.shim.memory import Trimmer
from aiexport_edge.shim.secrets import MasterKeys, SecretBox
from aiexport_edge.shim.store import Store, batch_sweep
from aiexport_edge.shim.store.batch_leases import BatchLeases
from aiexport_edge.shim.store.batch_rows import BatchRows
from aiexport_edge.shim.store.idempotency_rows import IdempotencyRows
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.sealed_rows import holds_secrets
from aiexport_edge.shim.store.uptime_rows import UptimeRows
from aiexport_edge.shim.store.usage_rows import UsageRows, record
from aiexport_edge.shim.store.webhook_rows import WebhookRows
from aiexport_edge.shim.telemetry import Tracing
from aiexport_edge.shim.uptime import Uptime
from aiexport_edge.shim.usage import UsageLedger
from aiexport_edge.shim.webhooks.sender import WebhookSender

log = logging.getLogger(__name__)

_MEASURE_S = 1.0
_SPOOLED_BODIES = 4  # of batches that are taken in at one time, each of the greatest size


class Services:
    """One process's. `running` around the time in which they are used."""

    def __init__(self, config: Config, store: Store, engines: Engines) -> None:
        self.config = config
        self.tracing = None if config.telemetry.otlp_endpoint is None else Tracing(config.telemetry.otlp_endpoint)
        self.store = store
        self.engines = engines
        self.secrets = SecretBox(MasterKeys(config.state, allow_new=lambda: not holds_secrets(store.database)))
        self.threads = ThreadPoolExecutor(4, "shim")
        self.tokens = Tokens(store.database, SigningKeys(store.database, self.secrets))
        self.authenticator = Authenticator(store, self.tokens, self.threads)
        self.adapters = Adapters(store, config.models, engines, config.adapter_copies)
        self.catalog = Catalog(config.models, config.plans, engines, self.adapters, config.adapters)
        self.process_id = new_id("proc_")
        self.ledger = UsageLedger(UsageRows(store.database, self.process_id), config.store.retention)
        self.limits = Limits(
            config.plans,
            open_window(config, store.database, self.threads),
            self.ledger,
            store.database,
            self.threads,
        )
        self.idempotency = IdempotencyKeys(IdempotencyRows(store.database, self.process_id), self.threads)
        self.uptime = Uptime(UptimeRows(store.database), self.threads, self.can_serve)
        self.bodies = BodyBudget(config.shim.inflight_body_bytes, freed=Trimmer().soon)
        self.batch_spool = BodyBudget(_SPOOLED_BODIES * config.batches.max_body_bytes)
        self.batch_threads = ThreadPoolExecutor(2, "batch-intake")
        self.batch_rows = BatchRows(store.database)
        self.webhook_policy = AddressPolicy(config.webhooks.allow)
        self.image_rules = ImageRules(config.images)
        self.image_fetcher = ImageFetcher(self.image_rules, config.images.fetch_timeout.total_seconds())
        self.batches = self._executor()
        self.webhooks = WebhookSender(
            WebhookRows(store.database, self.secrets),
            self.webhook_policy,
            config.webhooks,
            retention=config.store.retention,
        )

    def _executor(self) -> Executor:
        config, database = self.config, self.store.database
        places = int(config.engine.queue_size * config.engine.tenant_queue_share)  # that one workspace may wait in
        return Executor(
            BatchLeases(database, self.process_id, partial(record, process_id=self.process_id)),
            Runner(
                self.engines,
                self.catalog,
                self.limits,
                self.image_rules,
                self.image_fetcher,
                self.bodies,
                self.tracing,
            ),
            self.engines,
            self.catalog,
            max_in_flight=config.batches.max_in_flight,
            max_waiting=places // (4 * config.shim.workers),
            sweep=partial(batch_sweep.stop, database),
            forget=partial(batch_sweep.forget, database, config.store.retention),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.ledger.start()
        parts = (
            self.engines,
            self.adapters,
            self.authenticator,
            self.idempotency,
            self.uptime,
            self.batches,
            self.webhooks,
        )
        tasks = [asyncio.create_task(running) for running in (*(part.run() for part in parts), self._measure())]
        for task in tasks:
            task.add_done_callback(_tell_of_end)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.get_running_loop().run_in_executor(self.threads, self.ledger.close)
            await self.limits.close()
            if self.tracing is not None:
                await asyncio.get_running_loop().run_in_executor(self.threads, self.tracing.close)
            self.batch_threads.shutdown()
            self.threads.shutdown()

    def can_serve(self) -> bool:
        """Whether at least one model can be served now."""
        return any(self.engines.state(spec.weights) is ModelState.READY for spec in self.config.models)

    async def _measure(self) -> None:
        """Keeps the gauges that nobody sets in passing."""
        engine_metrics = EngineMetrics(self.engines)
        while True:
            metrics.BODY_BYTES.set(self.bodies.used)
            engine_metrics.measure()
            await asyncio.sleep(_MEASURE_S)


def _tell_of_end(task: asyncio.Task[None]) -> None:
    """A background task ends by being cancelled alone: one that has failed would be missed by nobody until then."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a background task has ended; restart this process", exc_info=error)
