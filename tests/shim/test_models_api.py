"""`GET /v2/models`: pages, families, aliases; sizes as the engine tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.scripted_engine import CONTEXT_WINDOW, MAX_OUTPUT_TOKENS, ScriptedEngine
from support.shim_server import HAIKU, SONNET, ShimServer, until

from aiexport_edge.proto import config as configuration
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.catalog import Catalog
from aiexport_edge.shim.engines.engines import ModelFacts
from aiexport_edge.shim.errors import NotFound
from aiexport_edge.shim.store.values import Adapter, Principal

OPUS = "apex-opus-3-20250401"


def get(shim: ShimServer, path: str, status: int = 200) -> Any:
    with shim.client() as client:
        reply = client.get(path)
    assert reply.status_code == status, reply.text
    return reply.json()


@pytest.mark.parametrize("base", ["/v2/models", "/v1/models"])
def test_list(shim: ShimServer, base: str) -> None:
    page = get(shim, base)
    assert [model["id"] for model in page["data"]] == [OPUS, SONNET, HAIKU]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (OPUS, HAIKU, False)
    assert page["data"][2] == get(shim, f"{base}/{HAIKU}")
    assert page["data"][2] == {
        "id": HAIKU,
        "type": "model",
        "family": "haiku",
        "display_name": "Apex Haiku 4",
        "context_window": CONTEXT_WINDOW,
        "max_output_tokens": MAX_OUTPUT_TOKENS,
        "vision": False,
        "pricing": {"input_per_million": 0.25, "output_per_million": 1.25},
        "created_at": "2025-04-01T00:00:00Z",
    }


def test_pages(shim: ShimServer) -> None:
    seen, after = [], ""
    while True:
        page = get(shim, f"/v2/models?limit=1{after}")
        assert len(page["data"]) == 1
        assert page["first_id"] == page["last_id"] == page["data"][0]["id"]
        seen.append(page["last_id"])
        if not page["has_more"]:
            break
        after = f"&after_id={page['last_id']}"
    assert seen == [OPUS, SONNET, HAIKU]
    empty = get(shim, f"/v2/models?after_id={HAIKU}")
    assert empty == {"data": [], "first_id": None, "last_id": None, "has_more": False}


def test_families(shim: ShimServer) -> None:
    assert [model["id"] for model in get(shim, "/v2/models?family=sonnet")["data"]] == [SONNET]
    assert get(shim, "/v2/models?family=custom")["data"] == []
    assert [model["id"] for model in get(shim, f"/v2/models?family=haiku&after_id={OPUS}&limit=1")["data"]] == [HAIKU]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=-1", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=1e1", "limit"),
        ("family=gpt", "family"),
        ("family=", "family"),
        ("after_id=nope", "after_id"),
        ("after_id=", "after_id"),
        ("after_id=%00%ff", "after_id"),
    ],
)
def test_bad_queries(shim: ShimServer, query: str, param: str) -> None:
    error = get(shim, f"/v2/models?{query}", 400)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_one_model(shim: ShimServer) -> None:
    assert get(shim, "/v2/models/apex-sonnet-4")["id"] == SONNET  # a bare alias, for its newest dated id
    for unknown in ("nope", "ft-acme-x", "apex", "apex-sonnet-4-", "%2e%2e", "%00"):
        assert get(shim, f"/v2/models/{unknown}", 404)["error"]["type"] == "not_found_error"


def test_an_alias_stands_for_the_newest_date(tmp_path: Path) -> None:
    config = configuration.load(None, tmp_path)
    spec = config.models[0]
    models = [
        replace(spec, ids=("m-20250101",)),
        replace(spec, ids=("m-20250601", "n")),
        replace(spec, ids=("m-20250301",)),
    ]

    class NoSizes:
        def facts(self, model: str) -> ModelFacts | None:
            return None

    class NoneTuned:
        def __init__(self) -> None:
            self.by_id: Mapping[str, Adapter] = {}

    catalog = Catalog(models, config.plans, NoSizes(), NoneTuned(), config.adapters)
    caller = Principal("key", "key_1", b"", "ws_1", "acme", "pro", b"", frozenset(), None, False, None, None)
    assert catalog.use("m", caller).id == "m-20250601"
    assert catalog.use("n", caller).spec is models[1]
    assert [listed.id for listed in catalog.visible(caller)] == ["m-20250101", "m-20250601", "n", "m-20250301"]
    assert catalog.describe(catalog.use("n", caller))["context_window"] is None
    with pytest.raises(NotFound):
        catalog.use("m-2025", caller)


def test_several_dates_on_one_set_of_weights(
    make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]
) -> None:
    """Each is listed and answers by its own name; the bare name is the newest."""
    engine = make_engine()
    dated = ("apex-haiku-4-20250401", "apex-haiku-4-20250901", "apex-haiku-4-20241001")
    shim = make_shim(engine, configure=lambda config: replace(config, models=(replace(config.models[-1], ids=dated),)))
    with shim.client() as client:
        assert [model["id"] for model in client.get("/v2/models").json()["data"]] == list(dated)
        assert client.get("/v2/models/apex-haiku-4").json()["id"] == dated[1]
        for model in (*dated, "apex-haiku-4"):
            body = {"model": model, "messages": [{"role": "user", "content": "COUNT 2"}]}
            assert client.post("/v2/messages", json=body).json()["model"] == model
        assert client.post("/v2/messages", json={**body, "model": "apex-haiku"}).status_code == 404
    assert {submit.request.model for submit in engine.seen.submitted} == {"demo"}


def test_the_reply_names_the_model_asked_for(shim: ShimServer) -> None:
    body = {"model": "apex-haiku-4", "messages": [{"role": "user", "content": "COUNT 2"}]}
    with shim.client() as client:
        assert client.post("/v2/messages", json=body).json()["model"] == "apex-haiku-4"


def test_readiness_lists_each_tier(
    make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]
) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    with shim.client() as client:
        ready = client.get("/readyz").json()
        assert ready["status"] == "ready"
        assert [(tier["id"], tier["state"]) for tier in ready["tiers"]] == [
            (OPUS, "ready"),
            (SONNET, "ready"),
            (HAIKU, "ready"),
        ]
        engine.state = pb.MODEL_LOADING
        until(lambda: client.get("/readyz").status_code == 503, "readiness drops", 60)
        assert {tier["state"] for tier in client.get("/readyz").json()["tiers"]} == {"loading"}
        message = {"model": HAIKU, "messages": [{"role": "user", "content": "x"}]}
        refused = client.post("/v2/messages", json=message)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "overloaded_error"
        assert "loading" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        engine.state = pb.MODEL_READY
        until(lambda: client.get("/readyz").status_code == 200, "readiness returns", 60)
        engine.kill()
        until(lambda: client.get("/readyz").status_code == 503, "readiness drops with the engine", 60)
        assert client.get("/healthz").status_code == 200
        assert client.get("/v2/models").json()["data"][0]["context_window"] == CONTEXT_WINDOW
        assert (
            client.post(
                "/v2/messages", json={"model": HAIKU, "messages": [{"role": "user", "content": "x"}]}
            ).status_code
            == 503
        )
        engine.start()
        until(lambda: client.get("/readyz").status_code == 200, "readiness returns with the engine", 60)
