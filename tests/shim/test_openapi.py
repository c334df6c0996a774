"""`/openapi.json` is exact: every route and nothing else, examples that are valid, replies as it says; `/docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from starlette.routing import Route
from support.openapi import check, check_events, operation_of, resolved, validator
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.api.openapi import document
from aiexport_edge.shim.app import create_app
from aiexport_edge.shim.errors import TABLE
from aiexport_edge.shim.store.keys import SCOPES
from aiexport_edge.shim.store.oauth_rows import OAuthClients

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def schemas(value: Any) -> Iterator[dict[str, Any]]:
    """Every schema that something in the document has."""
    if isinstance(value, dict):
        if isinstance(value.get("schema"), dict):
            yield value["schema"]
        for each in value.values():
            yield from schemas(each)
    elif isinstance(value, list):
        for each in value:
            yield from schemas(each)


# ---------------------------------------------------------------------------------------------------- the document


def test_every_route_is_described_and_nothing_else(shim: ShimServer) -> None:
    served = {
        (method, route.path)
        for route in create_app(shim.services).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == {(method, path) for method, path, _ in operations()}


def test_it_is_openapi_3_1(shim: ShimServer) -> None:
    with shim.client("") as client:
        reply = client.get("/openapi.json")
    assert reply.json() == document()
    assert reply.json()["openapi"].startswith("3.1.")
    assert reply.json()["info"]["version"] == "2.4"
    check(reply)


def test_operation_ids_are_unique_and_described() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))
    tags = {tag["name"] for tag in document()["tags"]}
    for _, path, operation in operations():
        assert set(operation["tags"]) <= tags
        assert operation["summary"]
        named = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path))


def test_every_schema_is_one() -> None:
    for schema in [*schemas(document()["paths"]), *document()["components"]["schemas"].values()]:
        Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    text = json.dumps(document())
    referred = set(re.findall(r'"\$ref": "(#/[^"]+)"', text))
    for reference in referred:
        resolved({"$ref": reference})
    for kind in ("schemas", "responses", "headers"):
        for name in document()["components"][kind]:
            used = [each for each in referred if each.startswith(f"#/components/{kind}/{name}")]
            assert used, f"{kind}/{name} is used nowhere"


def test_every_error_of_the_table_is_described() -> None:
    described = {
        (int(name.removeprefix("Error")), response["content"]["application/json"]["example"]["error"]["type"])
        for name, response in document()["components"]["responses"].items()
    }
    assert set(TABLE.values()) - described == {(405, "invalid_request_error")}, "of a method, which is not described"
    assert described <= set(TABLE.values())


def test_scopes_are_the_store_s() -> None:
    flow = document()["components"]["securitySchemes"]["OAuth2"]["flows"]["clientCredentials"]
    assert tuple(flow["scopes"]) == SCOPES


def test_examples_are_valid() -> None:
    """Of bodies and of replies; those of streams event by event, those of lines line by line."""
    num_examples = 0
    hooks = [(m, p, o) for p, item in document()["webhooks"].items() for m, o in item.items()]
    for method, path, operation in [*operations(), *hooks]:
        bodies = operation.get("requestBody", {}).get("content", {})
        assert method.lower() != "post" or bodies, path
        contents = list(bodies.items())
        for response in operation["responses"].values():
            contents += resolved(response).get("content", {}).items()
        for media_type, content in contents:
            examples = [example["value"] for example in content.get("examples", {}).values()]
            examples += [content["example"]] if "example" in content else []
            for example in examples:
                num_examples += 1
                if media_type == "text/event-stream":
                    check_events(example)
                    continue
                validator(content["schema"], strict=True).validate(example)
                if "x-line-schema" in content:
                    for line in example.splitlines():
                        validator(content["x-line-schema"], strict=True).validate(json.loads(line))
    assert num_examples > 200


# ---------------------------------------------------------------------------------------------------- replies


def body(text: str = "COUNT 5", **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "max_tokens": 100, "messages": [{"role": "user", "content": text}], **fields}


def test_replies_are_as_described(make_engine: Engines, make_shim: Shims) -> None:
    """One of every kind that a caller can bring about, refusals too."""
    engine = make_engine()
    shim = make_shim(engine)
    full = shim.store.create_key("acme", scopes=SCOPES).key
    seen: set[str] = set()

    def call(client: httpx.Client, method: str, path: str, status: int, **more: Any) -> httpx.Response:
        reply = client.request(method, path, **more)
        assert reply.status_code == status, (path, reply.text)
        check(reply)
        seen.add(operation_of(method, reply.request.url.path)["operationId"])
        return reply

    with shim.client(full) as client, shim.client("axp_live_" + "x" * 43) as stranger:
        for path in ("/v2/messages", "/v1/messages", "/v2/messages/stream"):
            for stream in (False, True):
                call(client, "POST", path, 200, json=body(stream=stream))
            call(client, "POST", path, 400, json=body(max_tokens=0))
            call(client, "POST", path, 404, json=body(model="none"))
            call(client, "POST", path, 415, content=b"x", headers={"content-type": "text/html"})
            call(stranger, "POST", path, 401, json=body())
        key = {"Idempotency-Key": "one"}
        for _ in range(2):
            call(client, "POST", "/v2/messages", 200, json=body(), headers=key)
        call(client, "POST", "/v2/messages", 422, json=body("COUNT 6"), headers=key)
        call(client, "POST", "/v2/messages", 413, content=b"x" * (33 << 20))
        engine.fail_after = (2, pb.ErrorDetail(code=pb.ERROR_INTERNAL))
        call(client, "POST", "/v2/messages", 500, json=body())
        call(client, "POST", "/v2/messages", 200, json=body(stream=True))
        engine.fail_after = None
        for refusal, status in ((pb.ERROR_TENANT_QUEUE_FULL, 429), (pb.ERROR_QUEUE_FULL, 503)):
            engine.refuse = pb.ErrorDetail(code=refusal)
            call(client, "POST", "/v2/messages", status, json=body())
        engine.refuse = None

        for version in ("/v2", "/v1"):
            call(client, "GET", f"{version}/models", 200)
            call(client, "GET", f"{version}/models?limit=1&family=haiku", 200)
            call(client, "GET", f"{version}/models?limit=0", 400)
            call(client, "GET", f"{version}/models/{HAIKU}", 200)
            call(client, "GET", f"{version}/models/none", 404)
            call(stranger, "GET", f"{version}/models", 401)

        key_made = call(client, "POST", "/v2/keys", 201, json={"scopes": ["messages"], "expires_in": "90d"}).json()
        with shim.client(key_made["key"]) as poor:
            call(poor, "GET", "/v2/keys", 403)
            call(poor, "POST", "/v2/batch", 403, json={"requests": [body()]})
            call(poor, "GET", "/v2/usage", 403)
        call(client, "POST", "/v2/keys", 400, json={"scopes": []})
        call(client, "GET", "/v2/keys", 200)
        call(client, "GET", "/v2/keys?after_id=none", 400)
        rotated = call(client, "POST", f"/v2/keys/{key_made['id']}/rotate", 201, json={"grace_seconds": 60}).json()
        call(client, "POST", "/v2/keys/none/rotate", 404)
        call(client, "DELETE", f"/v2/keys/{rotated['id']}", 204)
        call(client, "DELETE", "/v2/keys/none", 404)

        call(client, "GET", "/v2/usage", 200)
        for group in ("model", "key", "day"):
            call(client, "GET", f"/v2/usage?group_by={group}", 200)
        call(client, "GET", "/v2/usage?start=tomorrow", 400)

        two = [body(), {"custom_id": "b", "params": body("COUNT 2")}]
        batch = call(client, "POST", "/v2/batch", 202, json={"requests": two}, headers={"Idempotency-Key": "b"}).json()
        again = call(client, "POST", "/v2/batch", 202, json={"requests": two}, headers={"Idempotency-Key": "b"})
        assert again.json() == batch
        assert again.headers["idempotent-replayed"] == "true"
        call(client, "POST", "/v2/batch", 422, json={"requests": [body()]}, headers={"Idempotency-Key": "b"})
        call(client, "POST", "/v2/batch", 400, json={"requests": [body(max_tokens=0)]})
        path = f"/v2/batch/{batch['id']}"
        until(lambda: client.get(path).json()["status"] == "completed", "the batch is done")
        call(client, "GET", path, 200)
        results = call(client, "GET", f"{path}/results", 200)
        assert len(results.text.splitlines()) == 2
        call(client, "GET", "/v2/batch", 200)
        call(client, "GET", "/v2/batch?after_id=none", 400)
        call(client, "DELETE", f"{path}/cancel", 200)
        for method, missing in (("GET", ""), ("GET", "/results"), ("DELETE", "/cancel")):
            call(client, method, f"/v2/batch/batch_none{missing}", 404)
        engine.pause()
        held = call(client, "POST", "/v2/batch", 202, json={"requests": [body()]}).json()
        call(client, "GET", f"/v2/batch/{held['id']}/results", 409)
        call(client, "DELETE", f"/v2/batch/{held['id']}/cancel", 200)
        engine.free_run()
        engine.permit(1)

        made = OAuthClients(shim.store.database).create("acme")
        grant = {"grant_type": "client_credentials", "client_id": made.client_id, "client_secret": made.client_secret}
        token = call(client, "POST", "/v2/oauth/token", 200, data=grant).json()
        with httpx.Client(
            base_url=shim.base_url, headers={"Authorization": f"Bearer {token['access_token']}"}
        ) as bearer:
            call(bearer, "GET", "/v2/models", 200)
        call(client, "POST", "/v2/oauth/token", 400, data={**grant, "grant_type": "password"})
        call(client, "POST", "/v2/oauth/token", 401, data={**grant, "client_secret": "wrong"})
        call(client, "POST", "/v2/oauth/token", 415, json={})

    with httpx.Client(base_url=shim.base_url) as anybody:
        for path in ("/healthz", "/readyz", "/status", "/openapi.json", "/docs"):
            call(anybody, "GET", path, 200)
        call(anybody, "GET", "/status", 200, headers={"Accept": "application/json"})
        engine.kill()
        until(lambda: anybody.get("/readyz").status_code == 503, "the engine is missed")
        call(anybody, "GET", "/readyz", 503)
    assert {operation["operationId"] for _, _, operation in operations()} == seen


# ---------------------------------------------------------------------------------------------------- the page


def test_docs_needs_no_script_and_no_other_host(shim: ShimServer) -> None:
    with shim.client("") as client:
        page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    fetched = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert [each for each in fetched if not each.startswith(("#", "/openapi.json", "/status"))] == []
    for _, path, operation in operations():
        assert path in page.text
        assert operation["summary"].split("`")[0] in page.text
    anchors = set(re.findall(r'id="([^"]+)"', page.text))
    assert {each[1:] for each in fetched if each.startswith("#")} <= anchors
