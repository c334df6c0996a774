"""For all tests: where their temporary directories are."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

SHORT = Path("/tmp")
MAX_CHARS = 16  # a test's directory and a socket's name in it take some 90 of the 107 of unix(7)


def pytest_configure() -> None:
    """Where TMPDIR is deep, the paths of the tests' Unix sockets in it would be too long."""
    if len(tempfile.gettempdir()) > MAX_CHARS and os.access(SHORT, os.W_OK | os.X_OK):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHORT))
