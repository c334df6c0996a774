"""Load: what is sent when, what is counted, and a short run of locust against a real shim."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.scripted_engine import ScriptedEngine
from support.shim_server import ShimServer

from benchmarks.locust import arrivals, chats, measures

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = arrivals.Bounds(500, 100)


def test_a_trace_is_replayed_at_the_rate_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,9000,9000"]
    rows += [f"2023-11-16 18:16:{second:02}.0000000,{second + 1},0" for second in range(40)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]), encoding="utf-8")
    found = arrivals.replayed(file, 2.0, 10.0, BOUNDS)
    assert len(found) == 20
    assert found[0] == arrivals.Arrival(0.0, 374, 44)
    assert found[1] == arrivals.Arrival(found[1].at_s, 500, 100)
    assert found[2].output_tokens == 1
    assert found[-1].at_s == pytest.approx(10.0)
    assert [each.at_s for each in found] == sorted(each.at_s for each in found)


def test_the_real_trace() -> None:
    file = arrivals.trace_file()
    if file is None:
        pytest.skip("set AIEXPORT_TEST_DATA to the folder of the test data")
    found = arrivals.replayed(file, 5.0, 60.0, arrivals.Bounds(4000, 1000))
    assert len(found) == 300
    assert len({each.prompt_tokens for each in found}) > 50


def test_synthetic_arrivals_are_the_same_every_time_and_come_at_the_rate() -> None:
    found = arrivals.synthetic(10.0, 200.0, BOUNDS)
    assert found == arrivals.synthetic(10.0, 200.0, BOUNDS)
    assert found != arrivals.synthetic(10.0, 200.0, BOUNDS, seed=1)
    assert len(found) == pytest.approx(2000, rel=0.15)
    assert all(1 <= each.prompt_tokens <= 500 and 1 <= each.output_tokens <= 100 for each in found)


def test_fixed_arrivals() -> None:
    found = arrivals.fixed(4.0, 1.0, prompt_tokens=7, output_tokens=3)
    assert [each.at_s for each in found] == [0.0, 0.25, 0.5, 0.75]


def test_pictures_are_pictures_and_each_is_another() -> None:
    first, second = (chats.picture(32, seed) for seed in (1, 2))
    with Image.open(io.BytesIO(first)) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")
        assert len(image.getcolors() or ()) == 2
    assert first != second
    assert first == chats.picture(32, 1)
    image_block, question = chats.with_picture("What?", first)
    assert image_block["source"] == {
        "type": "base64",
        "media_type": "image/png",
        "data": base64.b64encode(first).decode(),
    }
    assert question == {"type": "text", "text": "What?"}


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_a_sample_that_so_many_do_not_exceed(samples: list[float], percent: float) -> None:
    value = measures.percentile(samples, percent)
    assert value in samples
    assert sum(sample <= value for sample in samples) >= len(samples) * percent / 100 - 1e-6


def test_verdicts() -> None:
    tiers = {
        "haiku": measures.Tier(first_token=[1.0, 2.0, 300.0], end_to_end=[5.0, 6.0, 7.0], failures=["status 500"]),
        "sonnet": measures.Tier(failures=["status 500"]),
    }
    targets = [
        measures.Target("haiku", "first_token", 50.0, 2.0),
        measures.Target("haiku", "first_token", 99.0, 299.0),
        measures.Target("haiku", "failures", 100.0, 0.25),
        measures.Target("sonnet", "first_token", 50.0, 1e9),  # nothing was measured: not met
        measures.Target("opus", "first_token", 50.0, 0.0),  # not asked: not judged
        measures.Target("client", "lag", 50.0, 1.0),
    ]
    verdicts = measures.judge(targets, tiers, [0.5])
    assert [verdict.met for verdict in verdicts] == [True, False, True, False, True]
    assert measures.verdicts_of(measures.document(tiers, verdicts, [0.5])) == verdicts
    assert measures.table(verdicts).count("MISSED") == 2


def test_the_targets_file_that_is_used() -> None:
    targets = measures.read_targets(measures.TARGETS)
    assert measures.Target("haiku", "first_token", 50.0, 340.0) in targets


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[haiku]\nfirst_tokens = { p50 = 1 }", "first_tokens is not known"),
        ("[haiku]\ngap = { median = 1 }", "gap.median is not a percentile"),
        ("[client]\ngap = { p50 = 1 }", "there are lag"),
        ("[haiku", "cannot be read"),
    ],
)
def test_a_targets_file_that_says_nothing_clear(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "targets.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(measures.TargetsError, match=says):
        measures.read_targets(file)


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[ShimServer]:
    engine = ScriptedEngine(f"unix:{tmp_path / 'engine.sock'}")
    engine.start()
    server = ShimServer(tmp_path / "state", (engine.address,))
    server.start()
    server.wait_ready()
    yield server
    server.stop()
    engine.close()


def run_locust(shim: ShimServer, *options: str) -> subprocess.CompletedProcess[str]:
    """Twenty chats in a second, and what the options add."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "benchmarks/locust/locustfile.py",
        "--headless",
        "-u",
        "2",
        "-r",
        "2",
    ]
    command += ["--host", shim.base_url, "--key", shim.key.key, "--pattern", "fixed", "--rate", "20", "--seconds", "1"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed (extra 'load')")
@pytest.mark.parametrize(("limit", "status"), [("1e9", 0), ("0", 1)])
def test_a_short_run(tmp_path: Path, shim: ShimServer, limit: str, status: int) -> None:
    targets = tmp_path / "targets.toml"
    targets.write_text(f"[haiku]\nfirst_token = {{ p50 = {limit} }}\nfailures = 0\n", encoding="utf-8")
    measured, report = tmp_path / "measures.json", tmp_path / "report.html"
    done = run_locust(
        shim, "--batch", "3", "--targets", str(targets), "--measures", str(measured), "--html", str(report)
    )
    assert done.returncode == status, done.stdout + done.stderr
    document = json.loads(measured.read_text(encoding="utf-8"))
    tiers = {name: tier for name, tier in document["tiers"].items() if name != "batch"}
    assert sum(tier["requests"] for tier in tiers.values()) == 20
    assert all(tier["failures"] == [] and tier["output_tokens"] == 3 * tier["requests"] for tier in tiers.values())
    assert document["client_lag"]["p50"] >= 0
    assert "first token" in report.read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed (extra 'load')")
def test_chats_without_an_end_are_failures(tmp_path: Path) -> None:
    engine = ScriptedEngine(f"unix:{tmp_path / 'engine.sock'}")
    engine.start()
    engine.pause()
    server = ShimServer(tmp_path / "state", (engine.address,))
    server.start()
    server.wait_ready()
    targets, measured = tmp_path / "targets.toml", tmp_path / "measures.json"
    targets.write_text("[haiku]\nfailures = 0\n", encoding="utf-8")
    try:
        done = run_locust(
            server, "--batch", "0", "--patience", "1", "--targets", str(targets), "--measures", str(measured)
        )
        assert done.returncode == 1, done.stdout + done.stderr
        tiers = json.loads(measured.read_text(encoding="utf-8"))["tiers"]
        assert sum(tier["requests"] for tier in tiers.values()) == 20
        assert all(set(tier["failures"]) == {"no end in all that time"} for tier in tiers.values())
    finally:
        server.stop()
        engine.close()
