"""Whether the admin listener may be opened where the configuration says: what `serve`, `shim` and `doctor` ask."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from aiexport_edge.proto.config import Config
from aiexport_edge.proto.units import is_loopback, join_address, split_address
from aiexport_edge.shim.cli.command import CommandError, opened_store
from aiexport_edge.shim.cli.listeners import reachable_host

if TYPE_CHECKING:
    from aiexport_edge.shim.store import Store

REMEDY = "set one with: aiexport-edge operator password, or listen on 127.0.0.1 ([admin] listen)"


def needs_login(config: Config) -> bool:
    """Whether other machines can reach the listener. That it is encrypted then, the configuration itself insists on."""
    return not is_loopback(split_address(config.admin_listen)[0])


def admin_url(config: Config, listener: socket.socket) -> str:
    """Under which this machine itself reaches the listener."""
    plain = config.tls.cert is None or config.admin.plain_http or is_loopback(str(listener.getsockname()[0]))
    return f"http{'' if plain else 's'}://{join_address(reachable_host(listener), listener.getsockname()[1])}"


def lacks_login(config: Config, store: Store) -> str | None:
    """What is wrong, as a phrase; None where nothing is."""
    from aiexport_edge.shim.store.operator_rows import OperatorLogin

    if not needs_login(config) or OperatorLogin(store.database).password_hash() is not None:
        return None
    return f"the admin listener on {config.admin_listen} can be reached from other machines and has no login"


def require_login(config: Config) -> None:
    """Raises `CommandError` where the listener needs a login and has none. Opens the store only where it needs one."""
    if not needs_login(config):
        return
    with opened_store(config) as store:
        problem = lacks_login(config, store)
    if problem is not None:
        raise CommandError(f"{problem}; {REMEDY}")
