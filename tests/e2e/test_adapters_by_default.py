"""Fine-tuned models where nobody has configured any: copied, served, and gone when nobody runs with them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.edge import HAIKU, SONNET, Edge, restart, start, wait_until
from support.peft_adapters import load_adapter, save_adapter
from transformers import AutoModelForImageTextToText

from aiexport_edge.engine.text.template import ChatTemplate, Message
from aiexport_edge.engine.text.tokenizer import Tokenizer
from aiexport_edge.proto.config import source_directory

TEXT = "Tell me a story of a fox and a lantern."
NUM_TOKENS = 24
SURE = 1.0  # between the two likeliest logits
LANGUAGE_MODEL = {"exclude_modules": ".*visual.*"}

# What PEFT writes, by name: arguments of its LoraConfig.
SERVED: dict[str, dict[str, Any]] = {
    "one": {"r": 1, "size": 0.1},
    "largest": {"r": 256, "lora_alpha": 256, "size": 0.04},
    "patterns": {
        "r": 8,
        "use_rslora": True,
        "size": 0.04,
        "rank_pattern": {"o_proj": 12, r"layers\.0\..*q_proj": 20},
        "alpha_pattern": {"q_proj": 32, "model.language_model.layers.1.mlp.up_proj": 4},
    },
    "regular": {"r": 4, "target_modules": r".*language_model.*\.(q_proj|down_proj)", "size": 0.07},
    "all": {"r": 4, "target_modules": "all-linear", **LANGUAGE_MODEL},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora True is not served; train without it"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not served"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "changes the embeddings or the head"),
    "eyes": ({"target_modules": "all-linear"}, "is part of the vision tower"),
}


def demo() -> Any:
    return AutoModelForImageTextToText.from_pretrained(source_directory("demo"), dtype=torch.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each kind, as PEFT writes it."""
    directory = tmp_path_factory.mktemp("made")
    for name, arguments in SERVED.items():
        save_adapter(demo(), directory / name, seed=3, **arguments)
    for name, (arguments, _) in REFUSED.items():
        save_adapter(demo(), directory / name, **arguments)
    return directory


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    edge = start(tmp_path_factory.mktemp("plain") / "state")
    try:
        yield edge
    finally:
        assert edge.stop() == 0, "".join(edge.stderr[-30:])


def add(edge: Edge, directory: Path, name: str) -> Any:
    return edge.cli("adapters", "add", "--workspace", "demo", "--base", SONNET, "--id", name, str(directory))


def fails(edge: Edge, *args: str) -> str:
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *args, "--state", str(edge.state)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done
    return done.stderr


def body(model: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": TEXT}]
    return {"model": model, "max_tokens": NUM_TOKENS, "temperature": 0, "messages": turns, **fields}


def text_from(edge: Edge, model: str) -> str:
    """The model's reply, once it is served."""
    with edge.client() as client:
        wait_until(
            lambda: client.post("/v2/messages", json=body(model, max_tokens=1)).status_code == 200,
            f"{model} is served",
        )
        return str(client.post("/v2/messages", json=body(model)).json()["content"][0]["text"])


def expected(directory: Path) -> str:
    """What `peft` and `transformers` say in float32, greedily, up to the first token that rounding could change."""
    source = source_directory("demo")
    tokenizer = Tokenizer.load(source)
    prompt = torch.tensor([list(ChatTemplate.load(source, tokenizer).encode([Message("user", TEXT)]))])
    found = load_adapter(demo(), directory).generate(
        input_ids=prompt,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = []
    for id_, logits in zip(found.sequences[0, prompt.shape[1] :].tolist(), found.logits, strict=True):
        first, second = logits[0].topk(2).values.tolist()
        if first - second < SURE:
            break
        ids.append(id_)
    return b"".join(map(tokenizer.decode_bytes, ids)).decode("utf-8", "replace").split("<|im_end|>")[0]


def copies(edge: Edge) -> list[str]:
    return sorted(os.listdir(edge.state / "adapters"))


def cleared(edge: Edge) -> Callable[[], bool]:
    return lambda: not copies(edge)


def test_nobody_wants_one_and_nothing_is_kept(edge: Edge) -> None:
    assert not (edge.state / "adapters").exists()
    assert edge.cli("adapters", "list") == []


def test_each_kind_is_served_as_peft_has_it(edge: Edge, made: Path, tmp_path: Path) -> None:
    different = set[str]()
    for name in SERVED:
        shutil.copytree(made / name, tmp_path / name)
        added = add(edge, tmp_path / name, name)
        assert added["full_id"] == f"ft-demo-{name}"
        assert Path(added["path"]).parent == edge.state / "adapters"
        wanted = expected(made / name)
        shutil.rmtree(tmp_path / name)  # the copy is what is read
        said = text_from(edge, added["full_id"])
        assert wanted
        assert said.startswith(wanted), name
        different.add(said)
    assert len(different - {text_from(edge, SONNET)}) > 1
    listed = edge.cli("adapters", "list")
    assert [model["full_id"] for model in listed] == [f"ft-demo-{name}" for name in SERVED]
    root = edge.state / "adapters"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    files = [file for copy in root.iterdir() for file in copy.iterdir()]
    assert {file.name for file in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    for name in SERVED:
        edge.cli("adapters", "remove", f"ft-demo-{name}")
    wait_until(cleared(edge), "the copies are gone")


def test_what_is_refused_leaves_nothing_behind(edge: Edge, made: Path, tmp_path: Path) -> None:
    def added(directory: Path) -> str:
        given = ("--workspace", "demo", "--base", SONNET, "--id", "bad", str(directory))
        return fails(edge, "adapters", "add", *given)

    for name, (_, complaint) in REFUSED.items():
        assert complaint in added(made / name), name
    pickled = shutil.copytree(made / "one", tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "pickled weights only" in added(pickled)
    assert "there is no directory" in added(tmp_path / "none")
    assert "adapter_config.json does not exist" in added(tmp_path)
    wide = shutil.copytree(made / "one", tmp_path / "wide")
    values = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps(values | {"r": 2}))
    assert "has rank 1, adapter_config.json says 2" in added(wide)
    assert copies(edge) == []
    assert edge.cli("adapters", "list") == []


def test_the_same_content_is_kept_once(edge: Edge, made: Path) -> None:
    first, second = add(edge, made / "one", "first"), add(edge, made / "one", "second")
    assert first["path"] == second["path"]
    wanted = text_from(edge, "ft-demo-first")
    edge.cli("adapters", "remove", "ft-demo-first")
    with edge.client() as client:
        wait_until(
            lambda: client.post("/v2/messages", json=body("ft-demo-first")).status_code == 404, "the first is gone"
        )
    assert text_from(edge, "ft-demo-second") == wanted
    assert copies(edge) == [Path(first["path"]).name]
    assert "already; remove it first" in fails(
        edge, "adapters", "add", "--workspace", "demo", "--base", HAIKU, "--id", "second", str(made / "all")
    )
    edge.cli("adapters", "remove", "ft-demo-second")
    wait_until(cleared(edge), "the copy is gone")


def test_what_runs_keeps_its_copy(edge: Edge, made: Path) -> None:
    """Removed while a request waits for its first token, with the core killed besides: it is served with the adapter,
    whose files stay till then."""
    path = Path(add(edge, made / "regular", "kept")["path"])
    add(edge, made / "one", "idle")
    wanted = text_from(edge, "ft-demo-kept")
    core_pid = edge.stats().core_pid

    def remove_both() -> None:
        edge.cli("adapters", "remove", "ft-demo-kept")
        edge.cli("adapters", "remove", "ft-demo-idle")
        wait_until(lambda: copies(edge) == [path.name], "the copy that nobody runs with is gone, and it alone")
        with edge.client() as client:
            assert client.get("/v2/models/ft-demo-kept").status_code == 404

    async def test() -> None:
        async with edge.async_client() as client:
            os.kill(core_pid, signal.SIGSTOP)
            try:
                asked = client.build_request("POST", "/v2/messages", json=body("ft-demo-kept", stream=True))
                reply = await client.send(asked, stream=True)  # it has its place in the queue
                assert reply.status_code == 200, await reply.aread()
                await asyncio.to_thread(remove_both)
            finally:
                os.kill(core_pid, signal.SIGKILL)  # the next core reads the files anew
            events = [json.loads(line[5:]) async for line in reply.aiter_lines() if line.startswith("data:")]
            assert "".join(each["delta"].get("text", "") for each in events if "delta" in each) == wanted

    asyncio.run(test())
    wait_until(cleared(edge), "the copy is gone")


def test_they_are_back_after_a_kill(made: Path, tmp_path: Path) -> None:
    """And what a killed command has left is not."""
    edge = start(tmp_path / "state")
    try:
        add(edge, made / "one", "kept")
        before = text_from(edge, "ft-demo-kept")
        (edge.state / "adapters" / ".incoming-killed").mkdir()
    finally:
        edge.process.kill()
        edge.process.wait()
    edge = restart(edge)
    try:
        assert text_from(edge, "ft-demo-kept") == before
        wait_until(lambda: len(copies(edge)) == 1, "what was left is gone")
    finally:
        assert edge.stop() == 0
    edge.cli("adapters", "remove", "ft-demo-kept")  # nobody serves: the command removes the copy itself
    assert copies(edge) == []
    added = add(edge, made / "one", "anew")
    assert copies(edge) == [Path(added["path"]).name]
    edge = restart(edge)
    try:
        assert text_from(edge, "ft-demo-anew") == before
    finally:
        assert edge.stop() == 0
