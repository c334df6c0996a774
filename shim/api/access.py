"""The door of every endpoint that needs credentials: who asks, whether the key and the limits allow it.

No body is read yet.
"""

from __future__ import annotations

from starlette.types import Scope

from aiexport_edge.shim.auth.authenticator import require_scope
from aiexport_edge.shim.exchange import exchange_of
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store import Principal


async def enter(services: Services, scope: Scope, needed: str) -> Principal:
    """The caller, whose credentials have the scope `needed`; noted in the access line, counted as one request.

    Raises `Unauthenticated`, `RateLimited` or `PermissionDenied`.
    """
    principal = await services.authenticator.authenticate(scope["headers"])
    exchange = exchange_of(scope)
    exchange.principal = principal
    exchange.facts.update(workspace=principal.workspace, key=principal.key_id)
    ticket = exchange.ticket = services.limits.ticket(principal)
    if ticket is not None:
        await ticket.take()
    require_scope(principal, needed)
    return principal


def require_tokens(scope: Scope) -> None:
    """For calls that use tokens: refuses (`RateLimited`) at once where the caller's workspace has none left today.

    One with an Idempotency-Key may be a replay, which costs none: it is refused where it reserves them, if it does.
    """
    ticket = exchange_of(scope).ticket
    if ticket is not None and not any(name == b"idempotency-key" for name, _ in scope["headers"]):
        ticket.require_tokens()
