"""Where the calls of a minute are counted: as the configuration says."""

from __future__ import annotations

from concurrent.futures import Executor

from sqlalchemy import Engine

from aiexport_edge.proto.config import Config
from aiexport_edge.shim.limits.shared_window import SharedWindow, shared_directory
from aiexport_edge.shim.limits.window import Window
from aiexport_edge.shim.store import StoreError


def open_window(config: Config, database: Engine, threads: Executor) -> Window:
    """In Redis where that is configured, else in the store where several machines can share it, else on this machine.

    Raises `StoreError`.
    """
    try:
        if config.limits.redis_url:
            from aiexport_edge.shim.limits.redis_window import RedisWindow

            local = SharedWindow(shared_directory(config.state))
            limits = config.limits
            timeout_s = limits.redis_timeout.total_seconds()
            return RedisWindow(limits.redis_url, limits.redis_password_file, local, timeout_s=timeout_s)
        if database.dialect.name == "postgresql":
            from aiexport_edge.shim.limits.postgres_window import PostgresWindow

            return PostgresWindow(database, threads)
        return SharedWindow(shared_directory(config.state))
    except ModuleNotFoundError:
        raise StoreError(
            "[limits] redis_url needs Redis's client; run in the project's folder: pip install '.[redis]'"
        ) from None
    except OSError as error:
        raise StoreError(f"The limits can't be counted: {error}.") from None
