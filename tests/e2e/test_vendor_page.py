"""The vendor's page: its own snippets against a whole installation, and the table of page line and test."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import vendor_page
from support.edge import Edge
from support.node import needs_node, run_node
from support.vendor_page import filled_in

TESTS = Path(__file__).resolve().parent.parent
TABLE = TESTS / "VENDOR_PAGE.md"


def snippet(text: str, edge: Edge) -> str:
    return filled_in(text, f"{edge.base_url}/v2", edge.key)


def node(edge: Edge, directory: Path, script: str) -> str:
    return run_node(directory, script, API_KEY=edge.key)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(edge: Edge) -> None:
    """The page's line has no body; `-d` is added."""
    body = {"model": "apex-haiku-4-20250401", "max_tokens": 30, "messages": [{"role": "user", "content": "Hello!"}]}
    script = snippet(vendor_page.CURL, edge).rstrip("\n") + f" -sS -d '{json.dumps(body)}'\n"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    message = json.loads(done.stdout)
    assert message["type"] == "message"
    assert message["content"][0]["text"]
    assert set(message["usage"]) == {"input_tokens", "cache_read_input_tokens", "output_tokens"}


@needs_node
def test_fetch_creates_a_message(edge: Edge, tmp_path: Path) -> None:
    script = snippet(vendor_page.CREATE_MESSAGE, edge) + "console.log(JSON.stringify(await response.json()));"
    message = json.loads(node(edge, tmp_path, script))
    assert message["model"] == "apex-sonnet-4-20250501"
    assert message["content"][0]["text"]
    assert message["stop_reason"] == "end_turn"


@needs_node
def test_fetch_lists_the_models(edge: Edge, tmp_path: Path) -> None:
    models = json.loads(
        node(edge, tmp_path, snippet(vendor_page.LIST_MODELS, edge) + "console.log(JSON.stringify(models));")
    )
    listed = {model["id"]: model for model in models["data"]}
    for model_id, name, prices in (
        ("apex-opus-3-20250401", "Apex Opus 3", (15, 75)),
        ("apex-sonnet-4-20250501", "Apex Sonnet 4", (3, 15)),
        ("apex-haiku-4-20250401", "Apex Haiku 4", (0.25, 1.25)),
    ):
        model = listed[model_id]
        assert model["display_name"] == name
        assert (model["pricing"]["input_per_million"], model["pricing"]["output_per_million"]) == prices


@needs_node
def test_fetch_streams(edge: Edge, tmp_path: Path) -> None:
    """Its loop prints whatever has come; together that is the stream."""
    printed = node(edge, tmp_path, snippet(vendor_page.STREAM, edge))
    kinds = re.findall(r"^event: (\w+)$", printed, re.MULTILINE)
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "content_block_delta" in kinds


@needs_node
def test_fetch_creates_and_cancels_a_batch(edge: Edge, tmp_path: Path) -> None:
    """It sends no Content-Type of its own."""
    created = "const { id: batchId, ...created } = await batch.json();\n"
    cancel = snippet(vendor_page.CANCEL_BATCH, edge).replace("await fetch", "const canceled = await fetch", 1)
    tell = "console.log(JSON.stringify([batch.status, created, canceled.status, await canceled.json()]));"
    script = snippet(vendor_page.CREATE_BATCH, edge) + created + cancel + tell
    status, batch, cancel_status, canceled = json.loads(node(edge, tmp_path, script))
    assert (status, cancel_status) == (202, 200)
    assert batch["type"] == "batch"
    assert batch["request_counts"]["total"] == 2
    assert canceled["status"] in ("canceling", "canceled", "completed")


def test_json_mode(edge: Edge) -> None:
    """The changelog's parameter, as it is written there."""
    assert vendor_page.JSON_MODE == 'response_format: { type: "json_object" }'
    body = {
        "model": "apex-sonnet-4-20250501",
        "max_tokens": 40,
        "messages": [{"role": "user", "content": "Describe a fox as JSON."}],
        "response_format": {"type": "json_object"},
    }
    with edge.client() as client:
        message = client.post("/v2/messages", json=body).json()
    assert isinstance(json.loads(message["content"][0]["text"]), dict)


def test_a_fine_tuned_model_that_is_not_there(edge: Edge) -> None:
    """Nobody else's id either: refused, never answered by another model."""
    with edge.client() as client:
        body = {"model": "ft-demo-mine", "messages": [{"role": "user", "content": "Hello!"}]}
        refused = client.post("/v2/messages", json=body)
        assert refused.status_code == 404
        assert refused.json()["error"]["param"] == "model"
        assert client.get("/v2/models", params={"family": "custom"}).json()["data"] == []


# ---------------------------------------------------------------------------------------------------- the table


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_line_of_the_table_names_tests_that_exist() -> None:
    assert len(rows()) > 40
    for line, _, tests in rows():
        named = re.findall(r"`([^`]+)`", tests)
        assert named, f"no test of: {line}"
        for each in named:
            file, _, name = each.partition("::")
            path = TESTS / file
            assert path.is_file(), each
            functions = {
                node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
            }
            assert name in functions, each


def test_the_table_has_every_snippet_and_parameter_of_the_page() -> None:
    lines = "\n".join(line for line, _, _ in rows())
    for endpoint in (
        "POST /messages",
        "GET /models",
        "POST /messages/stream",
        "POST /batch",
        "DEL /batch/{batch_id}/cancel",
    ):
        assert endpoint in lines
    for parameter in (
        "model",
        "messages",
        "max_tokens",
        "temperature",
        "system",
        "stream",
        "family",
        "limit",
        "requests",
        "webhook_url",
    ):
        assert re.search(rf"^{parameter} ", lines, re.MULTILINE), parameter
