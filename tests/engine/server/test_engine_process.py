"""The engine as a process, with the demo model: its start, its signals, the deaths of its core and its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub

DEMO = Path(__file__).resolve().parents[3] / "engine" / "demo" / "model"

pytestmark = pytest.mark.skipif(not (DEMO / "model.safetensors").is_file(), reason="the demo model is not there")


@dataclass
class EngineProcess:
    """A running engine on a unix socket."""

    process: subprocess.Popen[str]
    stub: EngineStub
    channel: grpc.Channel
    log: list[str] = field(default_factory=list)

    def stats(self) -> pb.StatsResponse:
        stats: pb.StatsResponse = self.stub.Stats(pb.StatsRequest(), timeout=60)
        return stats

    def wait_for_log(self, text: str) -> str:
        """The first log line with `text` in it."""
        while True:
            for line in self.log:
                if text in line:
                    return line
            assert self.process.poll() is None or any(text in line for line in self.log), self.log
            time.sleep(0.01)


def start(directory: Path, config: str, *options: str) -> subprocess.Popen[str]:
    (directory / "edge.toml").write_text(config)
    command = [sys.executable, "-m", "aiexport_edge.engine", "--config", str(directory / "edge.toml")]
    command += ["--state", str(directory / "state"), *options]
    ready = tuple(int(fd) for fd in options[options.index("--ready-fd") + 1 :][:1]) if "--ready-fd" in options else ()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=ready, env=environment)


@contextlib.contextmanager
def engine(directory: Path, config: str = "") -> Iterator[EngineProcess]:
    """An engine that is ready to serve."""
    address = f"unix:{directory / 'engine.sock'}"
    read, write = os.pipe()
    process = start(directory, config, "--listen", address, "--ready-fd", str(write))
    os.close(write)
    with process, os.fdopen(read) as ready, grpc.insecure_channel(address) as channel:
        running = EngineProcess(process, EngineStub(channel), channel)
        lines = process.stderr
        assert lines is not None
        reader = threading.Thread(target=lambda: running.log.extend(lines), daemon=True)
        reader.start()
        try:
            assert ready.readline() == "ready\n"
            assert ready.read() == ""  # closed: said once
            yield running
        finally:
            process.kill()
            process.wait()
            reader.join()


def ask(text: str, *, max_tokens: int = 60, temperature: float = 0.0, request_id: str = "r") -> pb.GenerateRequest:
    message = pb.Message(role=pb.ROLE_USER, content=[pb.ContentBlock(text=text)])
    return pb.GenerateRequest(
        request_id=request_id,
        model="demo",
        chat=pb.Chat(messages=[message]),
        max_tokens=max_tokens,
        sampling=pb.SamplingParams(temperature=temperature, seed=7, ignore_eos=True),
    )


def generate(stub: EngineStub, request: pb.GenerateRequest) -> tuple[str, list[int], pb.Finished]:
    text, ids, finished = "", list[int](), pb.Finished()
    for event in stub.Generate(request, timeout=200):
        text += event.delta.text
        ids += event.delta.token_ids
        if event.HasField("finished"):
            finished = event.finished
    return text, ids, finished


def ended(pid: int) -> bool:
    """Whether a process is no more, reaped or not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def wait_until_ended(pid: int) -> None:
    while not ended(pid):
        time.sleep(0.01)


def test_it_serves_logs_without_texts_and_drains_on_sigterm(tmp_path: Path) -> None:
    with engine(tmp_path, '[engine]\ndrain = "3m"\n[telemetry]\nlog_format = "json"\n') as running:
        text, ids, finished = generate(running.stub, ask("Tell me a secret story.", request_id="req_one"))
        assert text
        assert len(ids) == finished.output_tokens == 60
        assert finished.reason == pb.FINISH_MAX_TOKENS
        line = json.loads(running.wait_for_log("req_one"))
        assert (line["message"], line["output_tokens"], line["outcome"]) == ("request ended", 60, "FINISH_MAX_TOKENS")
        assert line["prompt_tokens"] == finished.prompt_tokens
        # Neither torch nor another device library is loaded here: that is the core's.
        assert "libtorch" not in Path(f"/proc/{running.process.pid}/maps").read_text()

        stream = running.stub.Generate(ask("Once upon a time", max_tokens=120), timeout=200)
        events = [next(stream), next(stream), next(stream)]
        core = running.stats().core_pid
        running.process.send_signal(signal.SIGTERM)
        running.wait_for_log("draining")
        with pytest.raises(grpc.RpcError) as raised:
            generate(running.stub, ask("Too late"))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        events += list(stream)
        assert events[-1].finished.output_tokens == 120
        assert running.process.wait(100) == 0
        wait_until_ended(core)
        assert not any("secret" in line or "Once upon" in line for line in running.log)


@pytest.mark.slow
def test_sixteen_streams_outlive_ten_kills_of_the_core(tmp_path: Path) -> None:
    """Five while greedy streams run, five while sampled ones do; some while the core is still starting."""
    moments = random.Random(0)
    with engine(tmp_path) as running:
        for temperature in (0.0, 1.0):
            requests = [ask(f"Story number {n}.", max_tokens=120, temperature=temperature) for n in range(16)]
            undisturbed = [generate(running.stub, request) for request in requests]
            with ThreadPoolExecutor(len(requests)) as pool:
                outcomes = [pool.submit(generate, running.stub, request) for request in requests]
                for _ in range(5):
                    time.sleep(moments.uniform(0.0, 1.5))  # the moment is the point
                    restarts = running.stats().core_restarts
                    while not (pid := running.stats().core_pid):
                        time.sleep(0.01)
                    os.kill(pid, signal.SIGKILL)
                    while running.stats().core_restarts == restarts:
                        time.sleep(0.01)
                for outcome, expected in zip(outcomes, undisturbed, strict=True):
                    text, ids, finished = outcome.result()
                    assert (text, ids) == expected[:2]
                    assert finished.output_tokens == 120
        stats = running.stats()
        assert stats.core_restarts == 10
        assert (stats.running, stats.waiting) == (0, 0)


def test_a_core_ends_with_its_engine(tmp_path: Path) -> None:
    with engine(tmp_path) as running:
        core = running.stats().core_pid
        running.process.kill()
        wait_until_ended(core)


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        ("[engine]\nlisten = 5\n", [], "engine.listen"),
        ("[engin]\n", [], "engin"),
        ('[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "/no/where"\n', [], "no directory /no/where"),
        ("", ["--listen", "0.0.0.0:50999"], "without TLS and a token"),
        ("", ["--listen", "127.0.0.1:1"], "cannot listen on 127.0.0.1:1"),
    ],
)
def test_what_keeps_it_from_starting_is_said(tmp_path: Path, config: str, options: list[str], sentence: str) -> None:
    if "127.0.0.1:1" in options and os.geteuid() == 0:
        pytest.skip("root may listen on any port")
    with start(tmp_path, config, *options) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert sentence in errors
    assert "Traceback" not in errors
