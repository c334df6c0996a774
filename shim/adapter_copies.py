"""Adapters that lie in none of the operator's directories, copied into the state directory.

Owns `<state>/adapters`: a directory for each content, by its digest, whole and synced before it has that name; and the
lock under which copies come and go, which `adapters add` keeps until its row is stored. Synchronous.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")  # nothing else of a PEFT directory is read
RESERVE = 64 << 20  # bytes that stay free on the disk
_CHUNK = 1 << 20
_DIGEST_BYTES = 32
_INCOMING, _LEAVING = ".incoming-", ".leaving-"


class CopyError(Exception):
    """A directory can't be copied: one sentence for the operator."""


class AdapterCopies:
    """The copies below `root`, which is made when the first one comes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def holds(self, path: str) -> bool:
        """Whether `path` is that of a copy, there or not."""
        return Path(path).parent == self.root

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[bool]:
        """Copies come and go only while this is held, by one process; False where another has it and `wait` is not set.

        Raises `OSError`.
        """
        self.root.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def take(self, source: Path, progress: Callable[[int, str], None]) -> Path:
        """The copy of the adapter in `source`, under the lock; `progress` is told of bytes and where they come from.

        The same content has the same copy. Raises `CopyError`; nothing is left behind.
        """
        try:
            needed = sum((source / name).stat().st_size for name in FILES)
            free = shutil.disk_usage(self.root).free
            if needed + RESERVE > free:
                raise CopyError(
                    f"{source} needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free at {self.root}; "
                    "free some, or name the directory that it lies in under [adapters] roots of the configuration"
                )
            incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self.root))
            try:
                digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
                for name in FILES:
                    _pour(source / name, incoming / name, digest.update, progress)
                _sync(incoming)
                target = self.root / digest.hexdigest()
                if not target.is_dir():
                    incoming.rename(target)
                    _sync(self.root)
                return target
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CopyError(
                f"{source} could not be copied to {self.root} ({reason}); nothing was left behind"
            ) from None

    def besides(self, used: Collection[str]) -> list[str]:
        """The copies that are not among the paths `used`, and what a process that was killed has left."""
        try:
            return [path for name in os.listdir(self.root) if (path := str(self.root / name)) not in used]
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        """Under the lock: a copy goes at once, or not at all. Raises `OSError`."""
        place = Path(path)
        if not place.name.startswith((_INCOMING, _LEAVING)):
            place = place.rename(place.with_name(_LEAVING + place.name))
        shutil.rmtree(place)


def _pour(source: Path, target: Path, hear: Callable[[bytes], None], progress: Callable[[int, str], None]) -> None:
    """Copies a file, synced. The digest hears its size too, so that no two pairs of files are the same bytes."""
    size = 0
    with source.open("rb") as stream, target.open("xb") as output:
        os.fchmod(output.fileno(), 0o600)
        while chunk := stream.read(_CHUNK):
            output.write(chunk)
            hear(chunk)
            size += len(chunk)
            progress(len(chunk), str(source))
        output.flush()
        os.fsync(output.fileno())
    hear(size.to_bytes(8, "little"))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
