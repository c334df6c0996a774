"""Clients in other languages with only the base URL and the key set: the official SDK for Node, Go's net/http.

Nothing here installs a package of the vendor's page: its names are nobody's in the public registries.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from support.edge import HAIKU, Edge
from support.node import needs_node, run_node

PACKAGE = "@anthropic-ai/sdk"
MAJOR = "1"


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """Where the SDK is, installed once for all runs of this user."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed (Debian: npm)")
    directory = Path(platformdirs.user_cache_dir("aiexport-edge-tests")) / "node"
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "node_modules" / PACKAGE / "package.json").is_file():
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", f"{PACKAGE}@{MAJOR}"]
        try:
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=180, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip("npm did not install the SDK in time: is its registry within reach?")
        if done.returncode != 0:
            pytest.skip(f"npm could not install the SDK: {done.stderr.strip().splitlines()[-1:]}")
    return directory / "node_modules"


def run(edge: Edge, directory: Path, node_modules: Path, script: str) -> Any:
    """Runs `script` with a `client`; it leaves what it has to say in `told`."""
    (directory / "node_modules").symlink_to(node_modules)
    head = f"""
import Anthropic from "{PACKAGE}";
const client = new Anthropic({{ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 }});
const model = "{HAIKU}";
const messages = [{{ role: "user", content: "Tell me a story about a fox." }}];
const told = {{}};
"""
    tail = "\nconsole.log(JSON.stringify(told));\n"
    return json.loads(run_node(directory, head + script + tail, BASE_URL=edge.base_url, API_KEY=edge.key))


@needs_node
def test_messages(edge: Edge, tmp_path: Path, node_modules: Path) -> None:
    told = run(
        edge,
        tmp_path,
        node_modules,
        """
told.message = await client.messages.create({ model, max_tokens: 50, messages, temperature: 0 });
told.request_id = told.message._request_id;
for await (const each of client.models.list({ limit: 1 })) { (told.models ??= []).push(each.id); }
told.one = (await client.models.retrieve("apex-haiku-4")).id;
""",
    )
    assert told["message"]["type"] == "message"
    assert told["message"]["content"][0]["text"]
    assert told["message"]["usage"]["output_tokens"] > 0
    assert told["request_id"].startswith("req_")
    assert len(told["models"]) >= 3, "it turns the pages"
    assert told["one"] == HAIKU


@needs_node
def test_streams(edge: Edge, tmp_path: Path, node_modules: Path) -> None:
    told = run(
        edge,
        tmp_path,
        node_modules,
        """
const whole = await client.messages.create({ model, max_tokens: 50, messages, temperature: 0 });
told.whole = whole.content[0].text;
const stream = client.messages.stream({ model, max_tokens: 50, messages, temperature: 0 });
told.text = "";
stream.on("text", (text) => { told.text += text; });
told.final = await stream.finalMessage();
told.kinds = [];
for await (const event of await client.messages.create({ model, max_tokens: 5, messages, stream: true })) {
  told.kinds.push(event.type);
}
const cut = await client.messages.create({ model, max_tokens: 500, messages, stream: true });
for await (const event of cut) { if (event.type === "content_block_delta") { cut.controller.abort(); break; } }
""",
    )
    assert told["text"] == told["final"]["content"][0]["text"] == told["whole"]
    assert told["final"]["stop_reason"] in ("end_turn", "max_tokens")
    assert told["kinds"][0] == "message_start"
    assert told["kinds"][-1] == "message_stop"


@needs_node
def test_errors(edge: Edge, tmp_path: Path, node_modules: Path) -> None:
    told = run(
        edge,
        tmp_path,
        node_modules,
        """
async function failing(call) {
  try { await call(); } catch (error) { return [error.constructor.name, error.status, error.error?.error?.type]; }
}
const create = (more) => client.messages.create({ model, max_tokens: 5, messages, ...more });
told.bad = await failing(() => create({ max_tokens: 0 }));
told.missing = await failing(() => create({ model: "none" }));
const stranger = new Anthropic({ baseURL: process.env.BASE_URL, apiKey: "axp_live_" + "x".repeat(43) });
told.stranger = await failing(() => stranger.messages.create({ model, max_tokens: 5, messages }));
told.stream = await failing(() => client.messages.stream({ model: "none", max_tokens: 5, messages }).finalMessage());
const headers = { "Idempotency-Key": "node-" + Date.now() };
const once = await client.messages.create({ model, max_tokens: 5, messages }, { headers });
const again = await client.messages.create({ model, max_tokens: 5, messages }, { headers });
told.same = once.id === again.id;
told.other = await failing(() => client.messages.create({ model, max_tokens: 6, messages }, { headers }));
""",
    )
    assert told["bad"] == ["BadRequestError", 400, "invalid_request_error"]
    assert told["missing"] == ["NotFoundError", 404, "not_found_error"]
    assert told["stranger"] == ["AuthenticationError", 401, "authentication_error"]
    assert told["stream"] == ["NotFoundError", 404, "not_found_error"]
    assert told["same"]
    assert told["other"] == ["UnprocessableEntityError", 422, "invalid_request_error"]


GO = """
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
)

func post(path string, body string) *http.Response {
	request, err := http.NewRequest("POST", os.Getenv("BASE_URL")+path, strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	request.Header.Set("X-API-Key", os.Getenv("API_KEY"))
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		panic(err)
	}
	return response
}

func main() {
	told := map[string]interface{}{}
	body := `{"model":"apex-haiku-4-20250401","max_tokens":40,"temperature":0,` +
		`"messages":[{"role":"user","content":"Hello!"}]}`

	whole := post("/v2/messages", body)
	var message map[string]interface{}
	if err := json.NewDecoder(whole.Body).Decode(&message); err != nil {
		panic(err)
	}
	whole.Body.Close()
	told["message"] = message

	stream := post("/v2/messages/stream", body)
	text := ""
	kinds := []string{}
	lines := bufio.NewScanner(stream.Body)
	for lines.Scan() {
		line := lines.Text()
		if !strings.HasPrefix(line, "data: ") {
			continue
		}
		var event struct {
			Type  string
			Delta struct{ Text string }
		}
		if err := json.Unmarshal([]byte(line[6:]), &event); err != nil {
			panic(err)
		}
		kinds = append(kinds, event.Type)
		text += event.Delta.Text
	}
	if lines.Err() != nil {
		panic(lines.Err())
	}
	stream.Body.Close()
	told["text"] = text
	told["kinds"] = kinds

	refused := post("/v2/messages", `{"model":"none","messages":[]}`)
	content, _ := io.ReadAll(refused.Body)
	refused.Body.Close()
	told["refused"] = refused.StatusCode
	told["error"] = json.RawMessage(content)

	out, _ := json.Marshal(told)
	fmt.Println(string(out))
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed (Debian: golang-go)")
def test_a_go_client_over_net_http(edge: Edge, tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    go = shutil.which("go")
    assert go is not None
    cache = Path(platformdirs.user_cache_dir("aiexport-edge-tests")) / "go"
    environment = {
        "BASE_URL": edge.base_url,
        "API_KEY": edge.key,
        "GOCACHE": str(cache),
        "HOME": str(tmp_path),
        "PATH": str(Path(go).parent),
        "GO111MODULE": "off",
    }
    done = subprocess.run(
        [go, "run", "main.go"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["message"]["content"][0]["text"] == told["text"] != ""
    assert told["kinds"][0] == "message_start"
    assert told["kinds"][-1] == "message_stop"
    assert told["refused"] == 400
    assert told["error"]["error"]["param"] == "messages"
