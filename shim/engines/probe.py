"""One look at one engine from outside, for the commands that tell an operator how the engines are.

Makes a connection of its own, as a shim would; asks the health service, the models and the load; ends it. It sees what
the engine says of itself, not what a shim has made of it: ejections are each shim process's own (`/metrics`,
`/console`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub
from aiexport_edge.proto.units import join_address, split_address
from aiexport_edge.shim.engines.access import AccessError, Endpoint, EngineAccess, split_targets
from aiexport_edge.shim.engines.discovery import resolve
from aiexport_edge.shim.engines.handshake import why_refused

TIMEOUT_S = 5.0
_SERVICE = pb.DESCRIPTOR.services_by_name["Engine"].full_name
_STATES = {pb.MODEL_READY: "ready", pb.MODEL_LOADING: "loading", pb.MODEL_FAILED: "failed"}


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """A model as an engine has it; `revision` is the hash of its weights, tokenizer and template."""

    name: str
    state: str
    revision: str
    message: str


@dataclass(frozen=True, slots=True)
class EngineSeen:
    """`state` is serving, unhealthy, draining or away; `reason` says why it is away."""

    address: str
    state: str
    reason: str = ""
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    uptime_s: int = 0
    models: tuple[ModelSeen, ...] = ()


def look_at(targets: Sequence[str], access: EngineAccess) -> list[EngineSeen]:
    """All engines at once; a name that stands for several is each of them, one without an address is away."""
    return asyncio.run(_look_at(targets, access))


async def endpoints_of(targets: Sequence[str]) -> tuple[list[Endpoint], list[str]]:
    """Every engine that `targets` stand for, those behind a name as of now; and the names that have no address."""
    fixed, names = split_targets(tuple(targets))
    endpoints = {endpoint.address: endpoint for endpoint in fixed}
    missing = []
    for name in names:
        host, port = split_address(name)
        try:
            for address in sorted(set(await resolve(host, port))):
                endpoints.setdefault(join_address(address, port), Endpoint(join_address(address, port), host))
        except (OSError, UnicodeError):
            missing.append(f"dns:///{name}")
    return list(endpoints.values()), missing


async def _look_at(targets: Sequence[str], access: EngineAccess) -> list[EngineSeen]:
    endpoints, nameless = await endpoints_of(targets)
    missing = [EngineSeen(name, "away", "the name has no address; correct it, or its records") for name in nameless]
    return [*await asyncio.gather(*(_look(endpoint, access) for endpoint in endpoints)), *missing]


async def _look(endpoint: Endpoint, access: EngineAccess) -> EngineSeen:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        metadata = access.metadata()
        async with access.channel(endpoint) as channel:
            stub = EngineStub(channel)
            asked = {"metadata": metadata, "timeout": TIMEOUT_S}
            stats = await stub.Stats(pb.StatsRequest(), **asked)
            listed = await stub.ListModels(pb.ListModelsRequest(), **asked)
            serves = health_pb2.HealthCheckRequest(service=_SERVICE)
            health = await health_pb2_grpc.HealthStub(channel).Check(serves, **asked)
    except AccessError as error:
        return EngineSeen(endpoint.address, "away", str(error))
    except grpc.aio.AioRpcError as error:
        return EngineSeen(endpoint.address, "away", await _reason(error, endpoint, access))
    well = health.status == health_pb2.HealthCheckResponse.SERVING
    return EngineSeen(
        address=endpoint.address,
        state="draining" if stats.draining else "serving" if well else "unhealthy",
        running=stats.running,
        waiting=stats.waiting,
        pages_used=stats.pages_used,
        pages_total=stats.pages_total,
        uptime_s=int(stats.uptime_s),
        models=tuple(
            ModelSeen(model.name, _STATES.get(model.state, "unknown"), model.revision, model.message)
            for model in listed.models
        ),
    )


async def _reason(error: grpc.aio.AioRpcError, endpoint: Endpoint, access: EngineAccess) -> str:
    match error.code():
        case grpc.StatusCode.UNAUTHENTICATED:
            return "it does not take our token; set [shim] engine_token_file to its [engine] token_file"
        case grpc.StatusCode.UNAVAILABLE:
            found = await asyncio.to_thread(why_refused, endpoint, access)
            return found or "nobody answers there; start the engine, or correct the address"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer within {TIMEOUT_S:.0f} s"
    return f"{error.details()} ({error.code().name})"
