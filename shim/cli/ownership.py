"""What root makes in another user's state directory belongs to that user afterwards.

A service often runs as a user of its own, and its operator calls the commands with sudo: a master key or an adapter's
copy that root alone can read would stop that service. Nothing else is touched: no link is followed, and no file that
has another name elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def state_keeps_its_owner(args: argparse.Namespace) -> Iterator[None]:
    """Around a command: what it has made, gets the owner of its state directory, also where it fails."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            hand_over(_state(args))


def _state(args: argparse.Namespace) -> Path:
    from aiexport_edge.proto.config import ConfigError, state_directory

    try:
        return state_directory(getattr(args, "state", None))
    except ConfigError:
        raise FileNotFoundError from None


def hand_over(state: Path) -> None:
    """What is root's there gets the directory's owner; a command calls this itself where a running service is to see at
    once what it has made. Does nothing for other users.
    """
    if os.geteuid() != 0:
        return
    owner = state.stat()
    if owner.st_uid == 0:
        return
    for _, folders, files, folder in os.fwalk(state):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if found.st_uid == 0 and (stat.S_ISDIR(found.st_mode) or found.st_nlink == 1):
                    os.chown(name, owner.st_uid, owner.st_gid, dir_fd=folder, follow_symlinks=False)
