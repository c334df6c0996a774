"""`GET /console` on the admin listener: what an operator wants to see at a glance, and `/console/NAME`, one workspace.

Engines and how full they are, models, workspaces by what they use, keys by when they were last used and when they end.
Made here as plain HTML; it fetches nothing, needs no script, changes nothing, and shows no secret: none can be read.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.version import API_VERSION, product_version
from aiexport_edge.shim.engines.session import EngineState, Session
from aiexport_edge.shim.errors import NotFound
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store import Key, Missing, OAuthClient
from aiexport_edge.shim.store.oauth_rows import OAuthClients
from aiexport_edge.shim.store.overview import Amount, KeyOverview, Overview, WorkspaceOverview

MAX_WORKSPACES = 200  # that are shown; the command line lists all
SOON = timedelta(days=7)
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_STATES = {pb.MODEL_READY: "ready", pb.MODEL_LOADING: "loading", pb.MODEL_FAILED: "failed"}


class Console:
    """The two pages."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._overview = Overview(services.store.database)
        self._clients = OAuthClients(services.store.database)

    async def index(self, _request: Request) -> Response:
        services = self._services
        found, stats = await asyncio.gather(
            asyncio.get_running_loop().run_in_executor(services.threads, self._overview.workspaces),
            asyncio.gather(*(session.stats() for session in services.engines.sessions)),
        )
        limits = {name: plan.tokens_per_day for name, plan in services.config.plans.items()}
        engines = list(zip(services.engines.sessions, stats, strict=True))
        body = [
            "<h1>AI Export Edge</h1>",
            f"<p>{html.escape(product_version())}, API {API_VERSION}; {_clock()}</p>",
            "<h2>Engines</h2>",
            _table(_ENGINE_COLUMNS, [_engine_row(*each) for each in engines]),
            "<h2>Models</h2>",
            _table(_MODEL_COLUMNS, [row for each in engines for row in _model_rows(*each)]),
            "<h2>Workspaces</h2>",
            _table(_WORKSPACE_COLUMNS, [_workspace_row(each, limits) for each in found[:MAX_WORKSPACES]]),
        ]
        if len(found) > MAX_WORKSPACES:
            body.append(f"<p>and {len(found) - MAX_WORKSPACES} more: <code>aiexport-edge workspaces list</code></p>")
        return _page("AI Export Edge", body)

    async def workspace(self, request: Request) -> Response:
        name = request.path_params["name"]
        loop, threads = asyncio.get_running_loop(), self._services.threads
        try:
            workspace, keys = await loop.run_in_executor(threads, self._overview.workspace, name)
        except Missing:
            raise NotFound("There is no such workspace.") from None
        clients = await loop.run_in_executor(threads, self._clients.list, name)
        limits = {plan: config.tokens_per_day for plan, config in self._services.config.plans.items()}
        body = [
            '<p><a href="/console">all workspaces</a></p>',
            f"<h1>{html.escape(name)}</h1>",
            _table(_WORKSPACE_COLUMNS, [_workspace_row(workspace, limits)]),
            "<h2>Keys</h2>",
            _table(_KEY_COLUMNS, [_key_row(each) for each in keys]),
            "<h2>OAuth clients</h2>",
            _table(_CLIENT_COLUMNS, [_client_row(each) for each in clients]),
        ]
        return _page(name, body)


# ---------------------------------------------------------------------------------------------------- rows

_ENGINE_COLUMNS = ("engine", "state", "running", "waiting", "KV pages in use", "cached", "preempted", "restarts", "up")
_MODEL_COLUMNS = (
    "model",
    "engine",
    "state",
    "running",
    "waiting",
    "prompt tokens",
    "from cache",
    "output tokens",
    "guessed right",
)
_WORKSPACE_COLUMNS = (
    "workspace",
    "plan",
    "running",
    "requests today",
    "tokens today",
    "of quota",
    "cost today",
    "cost in 30 days",
    "keys",
    "OAuth clients",
    "open batches",
    "dead webhooks",
)
_KEY_COLUMNS = ("key", "state", "scopes", "made", "ends", "last used", "requests in 30 days", "cost in 30 days")
_CLIENT_COLUMNS = ("client", "state", "scopes", "made", "old secret ends")


class _Mark(str):
    """HTML that is right as it is."""


def _engine_row(session: Session, stats: pb.StatsResponse | None) -> Sequence[Any]:
    if stats is None:
        return (session.address, _bad("not connected" if not session.connected else "does not answer"), *[""] * 7)
    used = stats.pages_used / max(1, stats.pages_total)
    state = EngineState.DRAINING if stats.draining else session.state
    return (
        session.address,
        "connected" if state is EngineState.SERVING else _bad(state.value),
        stats.running,
        stats.waiting,
        f"{stats.pages_used:,} of {stats.pages_total:,} ({used:.0%})",
        f"{stats.pages_cached:,}",
        stats.preemptions,
        _bad(str(stats.core_restarts)) if stats.core_restarts else 0,
        _duration(stats.uptime_s),
    )


def _model_rows(session: Session, stats: pb.StatsResponse | None) -> Iterable[Sequence[Any]]:
    counts = {} if stats is None else {model.name: model for model in stats.models}
    for name, info in session.vitals.models.items():
        state = _STATES.get(info.state, "unknown") if session.connected else "unavailable"
        row = counts.get(name)
        of_row: tuple[Any, ...] = ("",) * 6
        if row is not None:
            cached = row.cached_tokens / max(1, row.prompt_tokens)
            guessed = f"{row.accepted_tokens:,} of {row.guessed_tokens:,}" if row.guessed_tokens else ""
            of_row = (
                row.running,
                row.waiting,
                f"{row.prompt_tokens:,}",
                f"{cached:.0%}",
                f"{row.output_tokens:,}",
                guessed,
            )
        yield (name, session.address, state if state == "ready" else _bad(state), *of_row)


def _workspace_row(workspace: WorkspaceOverview, limits: dict[str, int | None]) -> Sequence[Any]:
    own = workspace.tokens_per_day
    limit = limits.get(workspace.plan) if own is None else own
    name = html.escape(workspace.name)
    return (
        _Mark(f'<a href="/console/{name}">{name}</a>'),
        workspace.plan,
        workspace.num_running,
        f"{workspace.today.requests:,}",
        f"{workspace.today.tokens:,}",
        _share(workspace.today.tokens, limit),
        _cost(workspace.today),
        _cost(workspace.month),
        workspace.num_keys,
        workspace.num_clients,
        workspace.num_open_batches,
        _bad(str(workspace.num_dead_webhooks)) if workspace.num_dead_webhooks else 0,
    )


def _key_row(each: KeyOverview) -> Sequence[Any]:
    key = each.key
    return (
        key.key_id,
        _key_state(key),
        " ".join(key.scopes),
        _date(key.created_at),
        _date(key.expires_at) or "never",
        each.last_used.isoformat() if each.last_used else "not in 30 days",
        f"{each.month.requests:,}",
        _cost(each.month),
    )


def _key_state(key: Key) -> str:
    now = datetime.now(UTC)
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is not None and key.expires_at <= now:
        return "expired"
    if key.expires_at is not None and key.expires_at <= now + SOON:
        return _bad("ends soon")
    return "test" if key.test else "live"


def _client_row(client: OAuthClient) -> Sequence[Any]:
    return (
        client.client_id,
        "live" if client.revoked_at is None else "revoked",
        " ".join(client.scopes),
        _date(client.created_at),
        _date(client.old_secret_expires_at),
    )


# ---------------------------------------------------------------------------------------------------- cells


def _bad(text: str) -> _Mark:
    return _Mark(f'<b class="bad">{html.escape(text)}</b>')


def _share(tokens: int, limit: int | None) -> str:
    if not limit:
        return "no limit"
    share = tokens / limit
    return _bad(f"{share:.0%}") if share >= 0.9 else f"{share:.0%}"


def _cost(amount: Amount) -> str:
    return f"${amount.cost:,.2f}"


def _date(time: datetime | None) -> str:
    return "" if time is None else time.strftime("%Y-%m-%d %H:%M")


def _clock() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    minutes, days = int(seconds) // 60, int(seconds) // 86400
    if days:
        return f"{days} d {minutes // 60 % 24} h"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{column}</th>" for column in columns)
    lines = ("".join(f"<td>{_cell(value)}</td>" for value in row) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"


def _cell(value: Any) -> str:
    return value if isinstance(value, _Mark) else html.escape(str(value))


def _page(title: str, body: Sequence[str]) -> Response:
    text = _TEMPLATE.format(title=html.escape(title), body="\n".join(body))
    return Response(text, media_type="text/html", headers=_HEADERS)


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="10">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #8884; white-space: nowrap; }}
th {{ font-weight: 600; font-size: .85rem; opacity: .8; }}
.bad {{ color: #d33; }}
</style>
{body}
</html>
"""
