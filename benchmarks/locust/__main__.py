"""`make load`: a fresh installation with the demo model under load for about a minute, a table, and a report.

    python -m benchmarks.locust [--report FILE.html] [--output FILE.json] [options of locustfile.py]

Exit status 0 where every target is met, 1 where one is missed. The pattern is the real trace where it is there
(AIEXPORT_TEST_DATA), else one like it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.locust import arrivals, measures
from benchmarks.overhead.processes import machine, write
from benchmarks.quick import server

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.locust", description=__doc__)
    parser.add_argument("--report", type=Path, default=RESULTS / "load.html", metavar="FILE")
    parser.add_argument("--output", type=Path, default=RESULTS / "load.json", metavar="FILE")
    arguments, options = parser.parse_known_args()
    if importlib.util.find_spec("locust") is None:
        print("locust is not installed; run in the project's folder: pip install '.[load]'", file=sys.stderr)
        return 2
    facts = machine()
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    pattern = "trace" if arrivals.trace_file() else "synthetic"
    with tempfile.TemporaryDirectory() as folder, server() as running:
        measured = Path(folder) / "measures.json"
        command = [sys.executable, "-m", "locust", "--headless", "-u", "2", "-r", "2", "--only-summary"]
        command += ["-f", str(Path(__file__).with_name("locustfile.py")), "--host", running.url, "--key", running.key]
        command += ["--loglevel", "WARNING", "--html", str(arguments.report), "--measures", str(measured)]
        command += ["--pattern", pattern, *options]
        print("Load for a minute, then the replies that are still to come.", file=sys.stderr)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # its tables are long
        if not measured.is_file():
            print(done.stdout + done.stderr, file=sys.stderr)
            return done.returncode or 2
        document = {"machine": facts, "options": options, **json.loads(measured.read_text(encoding="utf-8"))}
    write(arguments.output, document)
    print(measures.table(measures.verdicts_of(document)))
    for name, tier in document["tiers"].items():
        for failure in sorted(set(tier["failures"]))[:3]:
            print(f"{name}: {failure}")
    number = sum(tier["requests"] for tier in document["tiers"].values())
    tokens = sum(tier["output_tokens"] for tier in document["tiers"].values())
    seconds = document["seconds"]
    print(f"{number} requests in {seconds:.0f} s by pattern {pattern}, {tokens / seconds:.0f} tokens/s")
    print(f"The client used {document['client_cpu_share']:.0%} of a core.")
    print(f"{'All targets are met.' if done.returncode == 0 else 'A target is missed.'} Report: {arguments.report}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
