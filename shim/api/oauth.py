"""`POST /v2/oauth/token`: OAuth 2.0 client credentials (RFC 6749, 4.4), for programs of workspaces on Enterprise.

Its refusals have RFC 6749's own shape (5.2), as the clients' libraries expect it; what is not about the grant (a body
too large, a document of another kind) has the shape of every other endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from aiexport_edge.shim.auth.authenticator import OAUTH_PLAN
from aiexport_edge.shim.auth.credentials import basic
from aiexport_edge.shim.auth.tokens import LIFETIME
from aiexport_edge.shim.body import read_body
from aiexport_edge.shim.errors import Overloaded, UnsupportedMediaType
from aiexport_edge.shim.exchange import exchange_of
from aiexport_edge.shim.secrets import SecretError
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store.oauth_rows import Grantee, OAuthClients

MAX_BODY_BYTES = 16 << 10
GRANT = "client_credentials"
_MAX_FIELDS = 50
_HEADERS = {"cache-control": "no-store", "pragma": "no-cache"}
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")  # RFC 6749, 3.3

log = logging.getLogger(__name__)


class _Refused(Exception):
    """An error of RFC 6749, 5.2. `description` is ASCII without quotes."""

    def __init__(self, error: str, description: str) -> None:
        super().__init__(error)
        self.error = error
        self.description = description


class OAuth:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._clients = OAuthClients(services.store.database)

    async def token(self, request: Request) -> Response:
        _require_form(request.headers)
        services = self._services
        with services.bodies.lease() as lease:
            body = await read_body(request.scope["headers"], request.receive, max_bytes=MAX_BODY_BYTES, lease=lease)
        facts = exchange_of(request.scope).facts
        loop = asyncio.get_running_loop()
        try:
            fields = _fields(body)
            client_id, secret = _client_credentials(request.scope["headers"], fields)
            client = None
            if "\0" not in client_id:  # PostgreSQL's texts hold none
                client = await loop.run_in_executor(services.threads, self._clients.prove, client_id, secret)
            if client is None:
                raise _Refused("invalid_client", "The client id or secret is wrong, or the client is revoked.")
            facts.update(workspace=client.workspace, key=client.client_id)
            scopes = _granted(client, fields)
            token = await loop.run_in_executor(services.threads, services.tokens.issue, client, scopes)
        except _Refused as refused:
            return _refusal(refused)
        except SecretError as error:
            log.error("no token could be issued: %s", error)
            raise Overloaded("Tokens cannot be issued just now.", retry_after=1.0) from None
        seconds = int(LIFETIME.total_seconds())
        return _json(
            200,
            {"access_token": token, "token_type": "Bearer", "expires_in": seconds, "scope": " ".join(scopes)},
        )


def _require_form(headers: Any) -> None:
    """A body that does not say what it is counts as a form, as the fetch of browsers and Node sends text."""
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("Compressed bodies are not supported here; send the form as it is.")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("", "application/x-www-form-urlencoded", "text/plain"):
        raise UnsupportedMediaType(
            'The body must be a form; send it with "Content-Type: application/x-www-form-urlencoded".'
        )


def _fields(body: bytes) -> dict[str, str]:
    """The form's fields; one without a value is as good as not there."""
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except ValueError:
        raise _Refused("invalid_request", "The body is not a form in URL encoding.") from None
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name in fields:
            raise _Refused("invalid_request", "A parameter is there twice.")
        fields[name] = value
    return {name: value for name, value in fields.items() if value}


def _client_credentials(headers: list[tuple[bytes, bytes]], fields: dict[str, str]) -> tuple[str, str]:
    """Id and secret, from HTTP Basic or the body (RFC 6749, 2.3.1), never from both."""
    try:
        by_header = basic(headers)
    except ValueError:
        wrong = "The Authorization header is not HTTP Basic with the client id and secret."
        raise _Refused("invalid_client", wrong) from None
    if by_header is None:
        if "client_id" in fields and "client_secret" in fields:
            return fields["client_id"], fields["client_secret"]
        raise _Refused("invalid_client", "Send the client id and secret by HTTP Basic or in the body.")
    client_id, secret = (unquote_plus(part) for part in by_header)
    if "client_secret" in fields:
        raise _Refused("invalid_request", "The client secret is both in the Authorization header and in the body.")
    if fields.get("client_id", client_id) != client_id:
        raise _Refused("invalid_request", "The body names another client than the Authorization header.")
    return client_id, secret


def _granted(client: Grantee, fields: dict[str, str]) -> list[str]:
    """The scopes of the token: those asked for, or all that the client has."""
    if "grant_type" not in fields:
        raise _Refused("invalid_request", f"grant_type is missing; it must be {GRANT}.")
    if fields["grant_type"] != GRANT:
        raise _Refused("unsupported_grant_type", f"grant_type must be {GRANT}.")
    if client.plan != OAUTH_PLAN:
        raise _Refused("unauthorized_client", "OAuth is part of the Enterprise plan, which this workspace is not on.")
    if "scope" not in fields:
        return list(client.scopes)
    if not _SCOPE.fullmatch(fields["scope"]):
        raise _Refused("invalid_scope", "scope must be names apart by single spaces.")
    asked = dict.fromkeys(fields["scope"].split(" "))
    if not asked.keys() <= set(client.scopes):
        raise _Refused("invalid_scope", f"This client has the scopes: {' '.join(client.scopes)}.")
    return list(asked)


def _refusal(refused: _Refused) -> Response:
    document = {"error": refused.error, "error_description": refused.description}
    if refused.error != "invalid_client":
        return _json(400, document)
    return _json(401, document, {"www-authenticate": 'Basic realm="oauth", charset="UTF-8"'})


def _json(status: int, document: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(document), status, headers={**_HEADERS, **(headers or {})}, media_type="application/json"
    )
