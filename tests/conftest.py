"""For all tests: where their temporary directories are, how long a client waits, what no clock may decide."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from httpx._config import DEFAULT_TIMEOUT_CONFIG
from hypothesis import HealthCheck, settings

SHORT = Path("/tmp")
MAX_CHARS = 16  # a test's directory and a socket's name in it take some 90 of the 107 of unix(7)


# Of what the environment has chosen (in CI the same examples each time), without its looks at the clock.
settings.register_profile("edge", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edge")


def pytest_configure() -> None:
    """Where TMPDIR is deep, the paths of the tests' Unix sockets in it would be too long."""
    if len(tempfile.gettempdir()) > MAX_CHARS and os.access(SHORT, os.W_OK | os.X_OK):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHORT))
    # For calls that name none. The library's own five seconds are too few on a machine that does other work.
    DEFAULT_TIMEOUT_CONFIG.connect = DEFAULT_TIMEOUT_CONFIG.read = DEFAULT_TIMEOUT_CONFIG.write = 60.0
