"""Where the calls of a minute are counted: as the configuration says."""

from __future__ import annotations

from concurrent.futures import Executor

from sqlalchemy import Engine

from aiexport_edge.proto.config import Config
from aiexport_edge.shim.limits.shared_window import SharedWindow, shared_directory
from aiexport_edge.shim.limits.window import Window


def open_window(config: Config, database: Engine, threads: Executor) -> Window:
    """Raises `OSError` where this machine has no memory to share."""
    return SharedWindow(shared_directory(config.state))
