"""`GET /status`: how the installation is doing, as a page for a person and, asked by `Accept`, as JSON.

Shows nothing of any workspace. Everything comes from memory (`shim/uptime.py`), so that asking can load nothing.
"""

from __future__ import annotations

import html
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from aiexport_edge.proto.version import API_VERSION
from aiexport_edge.shim.engines.engines import ModelState
from aiexport_edge.shim.engines.session import EngineState
from aiexport_edge.shim.services import Services

_HEADERS = {"cache-control": "no-store", "vary": "accept"}
_PAGE_HEADERS = {
    **_HEADERS,
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}
_SENTENCES = {
    "operational": "All systems operational",
    "degraded": "Some models can't be served just now",
    "down": "No model can be served just now",
}


class Status:
    """The endpoint; it needs no key."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def status(self, request: Request) -> Response:
        document = self._document()
        if prefers_json(request.headers.get("accept", "")):
            return Response(msgspec.json.encode(document), media_type="application/json", headers=_HEADERS)
        return Response(_page(document), media_type="text/html", headers=_PAGE_HEADERS)

    def _document(self) -> dict[str, Any]:
        engines, history = self._services.engines, self._services.uptime.history
        models = [
            {"id": model_id, "family": spec.family, "state": engines.state(spec.weights).value}
            for spec in self._services.config.models
            for model_id in spec.ids
        ]
        num_ready = sum(model["state"] == ModelState.READY for model in models)
        status = "operational" if num_ready == len(models) else "degraded" if num_ready else "down"
        since = None if history is None else history.since_ms
        availability = None if history is None else history.availability
        return {
            "status": status,
            "version": API_VERSION,
            "models": models,
            "engines": {
                "total": len(engines.sessions),
                "serving": sum(session.state is EngineState.SERVING for session in engines.sessions),
            },
            "availability_30d": None if availability is None else round(availability, 6),
            "availability_period": "30 days" if history is not None and history.is_whole else "since install",
            "availability_since": None if since is None else _time(since),
            "first_token_p50_ms": None if history is None else history.first_token_p50_ms,
        }


def prefers_json(accept: str) -> bool:
    """Whether an Accept header (RFC 9110, section 12.5.1) names JSON, and no HTML that it would rather have."""
    weights = {"application/json": 0.0, "text/html": 0.0}
    for part in accept.lower().split(","):
        media_type, *parameters = (piece.strip() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                weight = _quality(value.strip())
        if media_type in weights:
            weights[media_type] = weight
    return weights["application/json"] > 0 and weights["application/json"] >= weights["text/html"]


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _page(document: dict[str, Any]) -> str:
    rows = "\n".join(
        f"<tr><td><code>{html.escape(model['id'])}</code></td><td>{html.escape(model['family'])}</td>"
        f'<td class="{model["state"]}">{model["state"]}</td></tr>'
        for model in document["models"]
    )
    availability = document["availability_30d"]
    uptime = "not measured yet" if availability is None else f"{floor_percent(availability)} %"
    period = "30-day average" if document["availability_period"] == "30 days" else "since install"
    if document["availability_since"] is not None and period == "since install":
        period += f", {document['availability_since'][:10]}"
    p50 = document["first_token_p50_ms"]
    latency = "no reply yet" if p50 is None else f"{p50} ms"
    families = len({model["family"] for model in document["models"]})
    return _TEMPLATE.format(
        status=document["status"],
        sentence=_SENTENCES[document["status"]],
        uptime=uptime,
        period=period,
        latency=latency,
        num_models=len(document["models"]),
        families=f"{families} famil{'y' if families == 1 else 'ies'}",
        version=API_VERSION,
        rows=rows,
    )


def floor_percent(share: float) -> str:
    """In percent with two digits, rounded down: 100 only where nothing is missing."""
    return f"{int(share * 10_000) / 100:.2f}"


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="60">
<title>AI Export API: {status}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }}
.dot {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }}
.operational.dot {{ background: #1a9c4b; }} .degraded.dot {{ background: #d99100; }} .down.dot {{ background: #d33; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; margin: 2rem 0; }}
dt {{ font-size: .8rem; opacity: .75; }}
dd {{ margin: 0; font-size: 1.5rem; }} dd small {{ display: block; font-size: .8rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: .4rem .5rem; border-bottom: 1px solid #8884; }}
</style>
<h1><span class="dot {status}"></span>{sentence}</h1>
<dl>
<div><dt>Uptime</dt><dd>{uptime}<small>{period}</small></dd></div>
<div><dt>Median latency</dt><dd>{latency}<small>p50, first token</small></dd></div>
<div><dt>Models available</dt><dd>{num_models}<small>across {families}</small></dd></div>
<div><dt>API version</dt><dd>{version}</dd></div>
</dl>
<table>
<thead><tr><th>Model</th><th>Family</th><th>State</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</html>
"""
