"""Log lines on stderr, as text or JSON. A reader of stderr that stands still loses lines and holds up no request."""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
from datetime import UTC, datetime
from typing import Any

from aiexport_edge.shim.redaction import redacted

_QUEUE_LINES = 10_000
ACCESS = logging.getLogger("aiexport_edge.access")


class _DroppingHandler(logging.handlers.QueueHandler):
    """Its base class puts the message together, traceback included, before the record is queued."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return  # the line is lost; see above


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        line = f"{_time(record)} {record.levelname.lower():7} {record.getMessage()}"
        for name, value in fields.items():
            text = str(value)
            line += f" {name}={text if text.isprintable() else json.dumps(text, ensure_ascii=False)}"
        return redacted(line)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return redacted(json.dumps(line, ensure_ascii=False))


def set_up(level: str, log_format: str) -> logging.handlers.QueueListener:
    """Sends all logging of this process to stderr, through a thread; stop the returned listener at the end."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_QUEUE_LINES)
    root = logging.getLogger()
    root.handlers = [_DroppingHandler(lines)]
    root.setLevel(level.upper())
    for noisy in ("uvicorn", "asyncio", "alembic", "sqlalchemy", "grpc"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    listener = logging.handlers.QueueListener(lines, handler)
    listener.start()
    return listener


def access(message: str, fields: dict[str, Any], *, level: int = logging.INFO) -> None:
    """One line for one request."""
    ACCESS.log(level, message, extra={"fields": fields})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
