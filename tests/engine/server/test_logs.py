"""Log lines: one line each, whatever a client has put into its request id."""

from __future__ import annotations

import json
import logging

import pytest

from aiexport_edge.engine.server import logs


@pytest.mark.parametrize("format", ["text", "json"])
def test_one_line_for_one_record(
    format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    logs.set_up("info", format)
    fields = {
        "request_id": 'r\n2026 error engine "forged" \x1b[2J' + "x" * 5000,
        "output_tokens": 7,
        "first_token_s": None,
    }
    logging.getLogger("engine.test").info("request ended", extra={"fields": fields})
    logging.getLogger("engine.test").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
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


def test_exceptions_are_in_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for format in ("text", "json"):
        logs.set_up("warning", format)
        try:
            raise ValueError("what happened")
        except ValueError:
            logging.getLogger("engine.test").exception("it failed")
        assert "what happened" in capsys.readouterr().err
