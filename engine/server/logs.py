"""Log lines on stderr, as text or JSON. Owns their form; what a prompt or a reply says is never given to it.

A reader of stderr that stands still, or a disk that is full, loses lines and holds up no request.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
from datetime import UTC, datetime
from typing import Any

MAX_CHARACTERS = 200
MAX_LINES = 10_000  # that wait to be written
LAST_LINES_S = 1.0  # for them at the end of the process
STDERR = 2


class Lines(logging.Handler):
    """Writes from a thread of its own. `close` waits a moment for what is not yet written; logging calls it at exit."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(self.format(record))

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(LAST_LINES_S)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            left = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while left:  # not through sys.stderr, whose lock a thread that stands still would keep
                    left = left[os.write(STDERR, left) :]


def set_up(level: str, format: str) -> Lines:
    """`level` is debug, info, warning or error; `format` is text or json."""
    handler = Lines()
    handler.setFormatter(_Json() if format == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    return handler


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a call gave as `extra={"fields": …}`; what a client chose is cut to a length for logs."""
    fields: dict[str, Any] = getattr(record, "fields", {})
    return {name: value[:MAX_CHARACTERS] if isinstance(value, str) else value for name, value in fields.items()}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _word(value: object) -> str:
    """A value as one word: what a client chose (a request id) cannot begin a line of its own."""
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower():7} engine {record.getMessage()}"
        line += "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": "engine",
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
