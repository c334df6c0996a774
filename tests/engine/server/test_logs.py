"""Log lines: one line each, whatever a client has put into its request id."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

from aiexport_edge.engine.server import logs


@pytest.mark.parametrize("format", ["text", "json"])
def test_one_line_for_one_record(
    format: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    lines = logs.set_up("info", format)
    fields = {
        "request_id": 'r\n2026 error engine "forged" \x1b[2J' + "x" * 5000,
        "output_tokens": 7,
        "first_token_s": None,
    }
    logging.getLogger("engine.test").info("request ended", extra={"fields": fields})
    logging.getLogger("engine.test").debug("not shown")
    lines.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert "\x1b" not in line
    assert len(line) < 600
    assert "output_tokens" in line
    if format == "json":
        record = json.loads(line)
        assert record["output_tokens"] == 7
        assert record["first_token_s"] is None
        assert record["request_id"].startswith("r\n2026")
    else:
        assert 'request ended request_id="r\\n2026' in line
        assert "output_tokens=7" in line


def test_exceptions_are_in_it(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for format in ("text", "json"):
        lines = logs.set_up("warning", format)
        try:
            raise ValueError("what happened")
        except ValueError:
            logging.getLogger("engine.test").exception("it failed")
        lines.close()
        assert "what happened" in capfd.readouterr().err


def test_a_reader_that_stands_still_holds_up_nothing() -> None:
    """The pipe is full and nobody reads; nor does the end of the process wait."""
    code = (
        "import logging\nfrom aiexport_edge.engine.server import logs\nlogs.set_up('info', 'text')\n"
        "for number in range(20_000):\n    logging.getLogger('engine.test').info('line %d', number)\n"
        "print('on it goes')"
    )
    reader, writer = os.pipe()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, timeout=120, check=True)
    assert done.stdout == b"on it goes\n"
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert lines.readline().endswith("info    engine line 0\n")
