"""Part g: a whole installation, three tiers on one 8B shape, under streaming chats, held against each tier's targets.

The load is `benchmarks/locust`'s, over real sockets, with arrivals and lengths like a real trace's. Needs the server's
packages and locust; where one is missing, the row says which.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.report import ROOT, Bench
from benchmarks.gpu.start import write_random

PART = "g"
NEEDED = ("grpc", "httptools", "locust", "msgspec", "sqlalchemy", "starlette", "tokenizers", "uvicorn", "uvloop")
SHAPE = "Qwen3-8B"
TIERS = ("haiku", "sonnet", "opus")
START_S = 240.0
DEMO = ROOT / "engine" / "demo" / "model"
KEY = re.compile(r"axp_live_[A-Za-z0-9_-]{43}")


def run(bench: Bench) -> None:
    """A row for each tier, and one that says whether the targets were met."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        bench.add(PART, "load", {"ok": None, "reason": f"not installed: {', '.join(missing)}"})
        return
    with tempfile.TemporaryDirectory() as folder:
        source = "demo"
        if not bench.dry_run:
            bench.say(f"g: writing {SHAPE}")
            source = str(Path(folder) / "model")
            _write_model(Path(source), bench.device)
        with _server(bench, Path(folder), source) as (url, key, seconds):
            bench.add(PART, "start", {"ready_s": seconds})
            document = _load(bench, Path(folder), url, key)
    for tier, measured in document["tiers"].items():
        row = {"requests": measured["requests"], "failures": len(measured["failures"])}
        for measure in ("first_token", "gap", "end_to_end"):
            row |= {f"{measure}_{name}_ms": value for name, value in measured[measure].items()}
        bench.add(PART, f"{SHAPE if not bench.dry_run else 'demo'} {tier}", row)
    missed = [_name(target) for target in document["targets"] if not target["met"]]
    bench.add(PART, "targets", {"missed": ", ".join(missed) or "none", "of": len(document["targets"])})


def _name(target: dict[str, Any]) -> str:
    return f"{target['tier']} {target['measure']} p{target['percentile']:g}"


def _write_model(directory: Path, device: torch.device) -> None:
    """Random weights, and the tokenizer of the peers' model: as many tokens, in replies like any other."""
    from benchmarks.peers.model import make_tokenizer

    directory.mkdir()
    write_random(directory, SHAPES[SHAPE], device)
    tokenizer = json.dumps(make_tokenizer(SHAPES[SHAPE]["vocab_size"]), ensure_ascii=False)
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (DEMO / name).exists():
            (directory / name).write_bytes((DEMO / name).read_bytes())


@contextmanager
def _server(bench: Bench, folder: Path, source: str) -> Iterator[tuple[str, str, float]]:
    """The URL, a key, and the seconds from the process's start until every tier could serve."""
    port = _free_port()
    config = folder / "aiexport-edge.toml"
    tiers = "".join(f'[[models]]\nids = ["{tier}-bench"]\nfamily = "{tier}"\nsource = "{source}"\n\n' for tier in TIERS)
    config.write_text(f'{tiers}[engine]\ndevice = "{bench.device}"\nmax_num_running = 64\n', encoding="utf-8")

    def cli(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *arguments]
        return [*command, "--config", str(config), "--state", str(folder / "state")]

    subprocess.run(
        cli("workspaces", "create", "main", "--plan", "enterprise"), cwd=ROOT, capture_output=True, check=True
    )
    made = subprocess.run(
        cli("keys", "create", "--workspace", "main"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = KEY.search(made.stdout)
    assert found is not None
    url = f"http://127.0.0.1:{port}"
    log = folder / "log"
    began = time.monotonic()
    with log.open("wb") as output:
        command = [*cli("serve"), "--port", str(port), "--admin-port", str(_free_port())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not _ready(url):
            if process.poll() is not None or time.monotonic() - began > START_S:
                raise RuntimeError(f"serve did not get ready:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield url, found[0], time.monotonic() - began
    finally:
        process.terminate()
        process.wait(60)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _load(bench: Bench, folder: Path, url: str, key: str) -> dict[str, Any]:
    measured = folder / "measures.json"
    amount = {"--rate": "1", "--seconds": "5", "--batch": "0", "--max-prompt": "200", "--max-output": "20"}
    if not bench.dry_run:
        amount = {"--rate": "6", "--seconds": "90", "--batch": "50", "--max-prompt": "4000", "--max-output": "300"}
    bench.say(f"g: {amount['--rate']} chats a second for {amount['--seconds']} s")
    command = [sys.executable, "-m", "locust", "--headless", "-u", "2", "-r", "2", "--only-summary"]
    command += ["-f", str(ROOT / "benchmarks" / "locust" / "locustfile.py"), "--host", url, "--key", key]
    command += ["--loglevel", "WARNING", "--measures", str(measured)]
    command += [part for option in amount.items() for part in option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not measured.is_file():
        raise RuntimeError(f"locust measured nothing:\n{(done.stdout + done.stderr)[-2000:]}")
    document: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
    return document
