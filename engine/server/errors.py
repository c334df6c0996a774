"""Why a request is refused or fails: one tree, one table to gRPC's status codes, nowhere else."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from aiexport_edge.proto import engine_pb2 as pb

DETAIL_TRAILER = "aiexport-error-detail-bin"

STATUS = {
    pb.ERROR_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    pb.ERROR_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    pb.ERROR_CONTEXT_LENGTH: grpc.StatusCode.INVALID_ARGUMENT,
    pb.ERROR_QUEUE_FULL: grpc.StatusCode.UNAVAILABLE,
    pb.ERROR_TENANT_QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.ERROR_REVISION_CHANGED: grpc.StatusCode.FAILED_PRECONDITION,
    pb.ERROR_INTERNAL: grpc.StatusCode.INTERNAL,
}


class RequestError(Exception):
    """A request cannot be served; `detail` says so to its client."""

    def __init__(
        self,
        code: pb.ErrorCode,
        message: str,
        *,
        field: str = "",
        limit: int = 0,
        actual: int = 0,
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.detail = pb.ErrorDetail(
            code=code, message=message, field=field, limit=limit, actual=actual, retry_after_ms=retry_after_ms
        )


class InvalidRequest(RequestError):
    """It can never succeed as it is."""

    def __init__(self, message: str, field: str, *, limit: int = 0, actual: int = 0) -> None:
        super().__init__(pb.ERROR_INVALID, message, field=field, limit=limit, actual=actual)


async def abort(context: grpc.aio.ServicerContext[Any, Any], detail: pb.ErrorDetail) -> NoReturn:
    """Ends a call with the status of `detail` and the detail itself in the trailer."""
    await context.abort(
        STATUS.get(detail.code, grpc.StatusCode.INTERNAL),
        detail.message,
        trailing_metadata=((DETAIL_TRAILER, detail.SerializeToString()),),
    )
