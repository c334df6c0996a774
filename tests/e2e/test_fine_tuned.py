"""`ft-…` models over REST: whole installations with a small model and adapters made by PEFT."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.edge import Edge, restart, start, stream, wait_until
from support.peft_adapters import load_adapter, save_adapter
from support.tiny_models import SHAPE, PreTrainedModel, greedy, make_of
from support.tiny_tokenizers import save_tokenizer
from transformers import Qwen3Config

from aiexport_edge.engine.text.template import ChatTemplate, Message
from aiexport_edge.engine.text.tokenizer import Tokenizer

BASE = "tiny-sonnet-20250101"
NUM_TOKENS = 16
TEXT = "Tell me of the sea, of ships and of the wind that carries them."

CONFIG = """\
[engine]
device = "cpu"
max_num_running = 48
[adapters]
roots = ["adapters"]
slots = {slots}
max_rank = 64
[[models]]
ids = ["tiny-sonnet-20250101"]
family = "sonnet"
display_name = "Tiny Sonnet"
source = "base"
dtype = "float32"
input_per_million = 3.0
output_per_million = 15.0
"""


def base() -> PreTrainedModel:
    """A model with more ids than the tokenizer has."""
    return make_of(Qwen3Config(**SHAPE | {"vocab_size": 640}, head_dim=24, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tuned")
    base().save_pretrained(directory / "base")
    save_tokenizer("qwen3", directory / "base")
    for seed in range(3):
        save_adapter(base(), directory / "adapters" / f"a{seed}", seed=seed, r=4 + 4 * seed)
    (directory / "aiexport-edge.toml").write_text(CONFIG.format(slots=2))
    return directory


@pytest.fixture(scope="module")
def edge(place: Path) -> Iterator[Edge]:
    edge = start(place / "state", place / "aiexport-edge.toml")
    try:
        yield edge
    finally:
        assert edge.stop() == 0, "".join(edge.stderr[-30:])


def expected(place: Path, adapter: str | None) -> list[int]:
    """What `peft` and `transformers` generate for TEXT."""
    tokenizer = Tokenizer.load(place / "base")
    prompt = list(ChatTemplate.load(place / "base", tokenizer).encode([Message("user", TEXT)]))
    model = base() if adapter is None else load_adapter(base(), place / "adapters" / adapter)
    return greedy(model, prompt, NUM_TOKENS)[0]


def text_of(place: Path, ids: list[int]) -> str:
    tokenizer = Tokenizer.load(place / "base")
    return b"".join(map(tokenizer.decode_bytes, ids)).decode("utf-8", "replace")


def body(model: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": TEXT}]
    return {"model": model, "max_tokens": NUM_TOKENS, "temperature": 0, "messages": turns, **fields}


def ask(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v2/messages", json=body(model))


def add(edge: Edge, place: Path, name: str, directory: str, workspace: str = "tests") -> Any:
    path = place / "adapters" / directory
    added = edge.cli("adapters", "add", "--workspace", workspace, "--base", "tiny-sonnet", "--id", name, str(path))
    model = added["full_id"]
    with httpx.Client(base_url=edge.base_url, headers={"X-API-Key": _key(edge, workspace)}, timeout=60) as client:
        wait_until(lambda: ask(client, model).status_code == 200, f"{model} is served")
    return added


_keys: dict[str, str] = {}


def _key(edge: Edge, workspace: str) -> str:
    if workspace == "tests":
        return edge.key
    if workspace not in _keys:
        _keys[workspace] = edge.cli("keys", "create", "--workspace", workspace)["key"]
    return _keys[workspace]


def fails(edge: Edge, *args: str) -> str:
    """The sentence with which a command ends that can't be done."""
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *args]
    done = subprocess.run(
        [*command, "--state", str(edge.state), "--config", str(edge.config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    return done.stderr


def test_a_workspace_has_its_own(edge: Edge, place: Path) -> None:
    """Listed, described, priced, answered and billed as its own; for others it does not exist."""
    added = add(edge, place, "mine", "a0")
    assert added["full_id"] == "ft-tests-mine"
    assert added["base"] == BASE
    wanted = text_of(place, expected(place, "a0"))
    assert wanted != text_of(place, expected(place, None))
    edge.cli("workspaces", "create", "others", "--plan", "enterprise")
    edge.cli("workspaces", "create", "poor", "--plan", "pro")
    with edge.client() as client:
        listed = client.get("/v2/models").json()["data"]
        assert [model["id"] for model in listed] == [BASE, "ft-tests-mine"]
        mine = listed[1]
        assert mine["family"] == "custom"
        assert mine["pricing"] == {"input_per_million": 4.0, "output_per_million": 20.0}
        assert mine["context_window"] == listed[0]["context_window"]
        assert client.get("/v2/models/ft-tests-mine").json() == mine
        custom = client.get("/v2/models", params={"family": "custom"}).json()["data"]
        assert [model["id"] for model in custom] == ["ft-tests-mine"]
        reply = ask(client, "ft-tests-mine").json()
        assert reply["model"] == "ft-tests-mine"
        assert wanted.startswith(reply["content"][0]["text"])
        assert reply["content"][0]["text"]
        rows = edge.cli("usage", "--workspace", "tests", "--by", "model")
        assert "ft-tests-mine" in str(rows)
    for workspace in ("others", "poor"):
        with httpx.Client(base_url=edge.base_url, headers={"X-API-Key": _key(edge, workspace)}, timeout=60) as other:
            assert [model["id"] for model in other.get("/v2/models").json()["data"]] == [BASE]
            unknown = ask(other, "ft-others-none")
            forbidden = ask(other, "ft-tests-mine")
            assert forbidden.status_code == unknown.status_code == 404
            said, as_said = (each.json()["error"] for each in (forbidden, unknown))
            assert said["message"] == as_said["message"].replace("ft-others-none", "ft-tests-mine")
            assert other.get("/v2/models/ft-tests-mine").status_code == 404
    add_for_poor = edge.cli(
        "adapters", "add", "--workspace", "poor", "--base", BASE, "--id", "x", str(place / "adapters" / "a0")
    )
    with httpx.Client(base_url=edge.base_url, headers={"X-API-Key": _key(edge, "poor")}, timeout=60) as poor:
        wait_until(lambda: ask(poor, add_for_poor["full_id"]).status_code == 403, "its plan has no fine-tuned models")
    edge.cli("adapters", "remove", add_for_poor["full_id"])


def test_added_removed_and_added_anew_under_load(edge: Edge, place: Path) -> None:
    """No request of the others fails; what comes after a change has nothing of what was before."""
    add(edge, place, "steady", "a1")
    steady, other = (text_of(place, expected(place, name)) for name in ("a1", "a2"))
    first = text_of(place, expected(place, "a0"))
    assert len({steady, other, first}) == 3

    async def load(client: httpx.AsyncClient, done: asyncio.Event) -> int:
        count = 0
        while not done.is_set():
            models = ["ft-tests-steady", BASE]
            replies = await asyncio.gather(*(stream(client, body(model)) for model in models))
            for reply in replies:
                assert reply.error is None, reply.error
                count += 1
            assert steady.startswith(replies[0].text)
        return count

    async def test() -> int:
        async with edge.async_client() as client:
            done = asyncio.Event()
            loading = [asyncio.create_task(load(client, done)) for _ in range(3)]
            for directory, wanted in (("a0", first), ("a2", other), ("a0", first)):
                await asyncio.to_thread(add, edge, place, "turns", directory)
                reply = await stream(client, body("ft-tests-turns"))
                assert reply.error is None
                assert wanted.startswith(reply.text)
                await asyncio.to_thread(edge.cli, "adapters", "remove", "ft-tests-turns")
                async with asyncio.timeout(30):
                    while (await stream(client, body("ft-tests-turns"))).status != 404:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            done.set()
            return sum(await asyncio.gather(*loading))

    assert asyncio.run(test()) > 0
    edge.cli("adapters", "remove", "ft-tests-steady")


def test_they_are_back_after_a_restart(place: Path, tmp_path: Path) -> None:
    config = place / "aiexport-edge.toml"
    edge = start(tmp_path / "state", config)
    try:
        add(edge, place, "kept", "a1")
        with edge.client() as client:
            before = ask(client, "ft-tests-kept").json()["content"]
        core_pid = edge.stats().core_pid
        assert core_pid
        edge.process.kill()
        edge.process.wait()
    except BaseException:
        edge.stop()
        raise
    edge = restart(edge)
    try:
        with edge.client() as client:
            wait_until(lambda: ask(client, "ft-tests-kept").status_code == 200, "it is served again")
            assert ask(client, "ft-tests-kept").json()["content"] == before
    finally:
        assert edge.stop() == 0


def test_in_a_batch(edge: Edge, place: Path) -> None:
    add(edge, place, "batched", "a2")
    wanted = text_of(place, expected(place, "a2"))
    with edge.client() as client:
        made = client.post("/v2/batch", json={"requests": [body("ft-tests-batched"), body(BASE)]})
        assert made.status_code == 202, made.text
        path = f"/v2/batch/{made.json()['id']}"
        wait_until(lambda: client.get(path).json()["status"] == "completed", "the batch has ended")
        results = client.get(f"{path}/results").text.splitlines()
        assert wanted.startswith(json.loads(results[0])["result"]["message"]["content"][0]["text"])
        refused = client.post("/v2/batch", json={"requests": [body("ft-others-batched")]})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "requests.0.model"


def test_what_the_command_line_refuses(edge: Edge, place: Path) -> None:
    def added(directory: Path, *, base: str = BASE, name: str = "bad", workspace: str = "tests") -> str:
        given = ("--workspace", workspace, "--base", base, "--id", name, str(directory))
        return fails(edge, "adapters", "add", *given)

    good = place / "adapters" / "a0"
    assert "there is no model opus" in added(good, base="opus")
    assert "no workspace named nobody" in added(good, workspace="nobody")
    assert "letters, digits and _" in added(good, name="with-hyphen")
    broken = place / "adapters" / "broken"
    broken.mkdir()
    assert "adapter_config.json does not exist" in added(broken)
    save_adapter(base(), broken, r=65)
    assert "rank 65 is more than 64, the most that this engine has room for; set max_rank = 65" in added(broken)
    assert "no model ft-tests-none" in fails(edge, "adapters", "remove", "ft-tests-none")
    assert edge.cli("adapters", "list", "--workspace", "others") == []
