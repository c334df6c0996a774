"""What one engine says of itself: its models, its health, its load. Asked when it connects and again and again since.

Owns how often that is, and the last word, which stays while the engine is away. Knows no requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import grpc
import grpc.aio

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub

LOADING_REFRESH_S = 0.1  # while a model is loading
CHECK_S = 1.0  # health and load, where there are other engines; else with the models
REFRESH_S = 5.0  # models
CALL_TIMEOUT_S = 15.0
LAST_CALL_S = 5.0  # after one that took too long

log = logging.getLogger(__name__)
_SERVICE = pb.DESCRIPTOR.services_by_name["Engine"].full_name
_memories = count(1)


class Vitals:
    """One engine's. `num_mine` says how many of its requests are this process's; `on_change` hears of another word on
    models or health.
    """

    def __init__(self, address: str, *, num_mine: Callable[[], int], on_change: Callable[[], None]) -> None:
        self.models: Mapping[str, pb.ModelInfo] = {}
        self.serving = True  # as the health service says
        self.watches_load = False  # somebody compares it with others
        self.others = 0  # requests of other clients
        self.memory = 0  # a number for what the engine has cached; another one where it may have lost that
        self._address = address
        self._num_mine = num_mine
        self._on_change = on_change
        self._core = (0, 0.0)  # whose memory it is: the core's process and when it may have begun
        self._has_health = True

    async def ask(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        """Everything, once. Raises `AioRpcError`."""
        stub = EngineStub(channel)
        await self._ask_models(stub, metadata)
        await self._ask_health(channel, metadata)
        await self._ask_load(stub, metadata)

    async def keep_asking(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        """For ever; returns where the engine does not answer at all, and is as good as dead."""
        stub = EngineStub(channel)
        loop = asyncio.get_running_loop()
        refresh_at = loop.time() + REFRESH_S
        while True:
            loading = not self.serving or any(model.state == pb.MODEL_LOADING for model in self.models.values())
            pause = min(CHECK_S, REFRESH_S) if self.watches_load else REFRESH_S
            await asyncio.sleep(LOADING_REFRESH_S if loading else pause)
            before = self.models, self.serving
            try:
                await self._ask_health(channel, metadata)
                if self.watches_load:
                    await self._ask_load(stub, metadata)
                if loading or loop.time() >= refresh_at:
                    await self._ask_models(stub, metadata)
                    refresh_at = loop.time() + REFRESH_S
            except grpc.aio.AioRpcError as error:
                late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if not (late and await self._answers_after_all(stub, metadata)):
                    log.warning("engine %s: does not answer (%s)", self._address, error.code().name)
                    return
            if (self.models, self.serving) != before:
                self._on_change()

    async def _answers_after_all(self, stub: Any, metadata: Any) -> bool:
        """Asks once more. On a machine with no time for this process, the answer was there and not heard; the requests
        that run must not lose their connection for it."""
        try:
            await self._ask_models(stub, metadata, within_s=LAST_CALL_S)
        except grpc.aio.AioRpcError:
            return False
        return True

    async def _ask_models(self, stub: Any, metadata: Any, within_s: float | None = None) -> None:
        asked = pb.ListModelsRequest()
        listed = await stub.ListModels(asked, metadata=metadata, timeout=within_s or CALL_TIMEOUT_S)
        self.models = {model.name: model for model in listed.models}

    async def _ask_health(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        """Asks the standard health service; a server without one is taken to serve."""
        if not self._has_health:
            return
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, metadata=metadata, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
                raise
            self._has_health = False
        else:
            self.serving = reply.status == health_pb2.HealthCheckResponse.SERVING

    async def _ask_load(self, stub: Any, metadata: Any) -> None:
        """How loaded the engine is, and whether it is still the one whose memory is known."""
        mine = self._num_mine()
        stats = await stub.Stats(pb.StatsRequest(), metadata=metadata, timeout=CALL_TIMEOUT_S)
        self.others = max(0, stats.running + stats.waiting - max(mine, self._num_mine()))
        pid, uptime_s = self._core
        if not self.memory or stats.core_pid != pid or stats.uptime_s < uptime_s:
            self.memory = next(_memories)
        self._core = (stats.core_pid, stats.uptime_s)
