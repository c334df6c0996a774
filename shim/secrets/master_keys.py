"""The master keys of an installation: where they come from, how the first is made and a new one put before the others.

They are in the environment variable `AIEXPORT_MASTER_KEY`, or else in the file `master.key` of the state directory,
which is made at first need with mode 0600. Both hold one or more keys of 32 bytes in base64, apart by white space or
commas, the newest first: that one seals, all of them open. Knows nothing of what is sealed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiexport_edge.shim.store.errors import StoreError

VARIABLE = "AIEXPORT_MASTER_KEY"
FILE = "master.key"
KEY_BYTES = 32
_COMMENT = """\
# The master key of AI Export Edge: signing keys and webhook secrets in the store are encrypted under it.
# Keep a copy apart from the store's backup; without it they are lost. aiexport-edge master-key --help
"""


class SecretError(StoreError):
    """A master key is missing, unreadable or not the right one: a sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class MasterKey:
    """`id` tells keys apart and says nothing of them: the first 8 bytes of a hash."""

    id: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> MasterKey:
        return cls(hashlib.sha256(b"aiexport-edge master key id" + secret).digest()[:8], secret)


class MasterKeys:
    """The keys, read again whenever the file has changed. Thread-safe; every method may raise `SecretError`.

    `allow_new` is asked before a first key is made: False where the store holds secrets sealed under another.
    """

    def __init__(
        self, state: Path, *, environ: Mapping[str, str] = os.environ, allow_new: Callable[[], bool] = lambda: True
    ) -> None:
        self.file = state / FILE
        self._text = environ.get(VARIABLE)
        self._allow_new = allow_new
        self._read: tuple[tuple[int, ...], tuple[MasterKey, ...]] | None = None  # what the file was, and held

    @property
    def in_environment(self) -> bool:
        return self._text is not None

    def newest(self) -> MasterKey:
        """The key that seals; made where there is none."""
        return (self.all() or self._make_first())[0]

    def all(self) -> tuple[MasterKey, ...]:
        """Newest first; empty where none has been made yet."""
        if self._text is not None:
            return _parse(self._text, VARIABLE)
        try:
            status = os.stat(self.file)
        except FileNotFoundError:
            return ()
        if status.st_mode & 0o077:
            raise SecretError(f"{self.file} can be read by other users; make it this user's alone: chmod 600")
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._read is None or self._read[0] != version:
            try:
                text = self.file.read_text(encoding="ascii")
            except (OSError, UnicodeDecodeError) as error:
                raise SecretError(f"The master key's file {self.file} cannot be read: {error}.") from None
            self._read = (version, _parse(text, str(self.file)))
        return self._read[1]

    def rotate(self) -> MasterKey:
        """Puts a new key before the others. The file's keys alone: the environment is its owner's."""
        self._require_file()
        with self._locked():
            new = MasterKey.of(secrets.token_bytes(KEY_BYTES))
            self._write((new, *self.all()))
        return new

    def keep(self, ids: Sequence[bytes]) -> None:
        """Drops all keys but these from the file."""
        self._require_file()
        with self._locked():
            self._write(tuple(key for key in self.all() if key.id in ids))

    def _require_file(self) -> None:
        if self.in_environment:
            raise SecretError(
                f"The master keys come from {VARIABLE}: put a new one before the others there, restart, then run "
                "aiexport-edge master-key reseal."
            )

    def _make_first(self) -> tuple[MasterKey, ...]:
        if not self._allow_new():
            raise SecretError(
                f"The store holds secrets sealed under a master key that is not here. Copy {FILE} from the machine "
                f"that made it, or from its backup, to {self.file}, or set {VARIABLE}."
            )
        with self._locked():
            if not self.all():
                self._write((MasterKey.of(secrets.token_bytes(KEY_BYTES)),))
            return self.all()

    def _write(self, keys: Sequence[MasterKey]) -> None:
        """Replaces the file in one step, on disk before anything can be sealed under it."""
        text = _COMMENT + "".join(base64.b64encode(key.secret).decode() + "\n" for key in keys)
        new = self.file.with_name(FILE + ".new")
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.file)
        directory = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, over all processes of the machine."""
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.file.with_name(FILE + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SecretError(f"The master key's file {self.file} cannot be made: {error.strerror}.") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _parse(text: str, where: str) -> tuple[MasterKey, ...]:
    lines = (line.partition("#")[0] for line in text.splitlines())
    words = " ".join(lines).replace(",", " ").split()
    if not words:
        raise SecretError(f"{where} holds no master key; it must be {KEY_BYTES} random bytes in base64.")
    keys = []
    for word in words:
        try:
            secret = base64.b64decode(word.replace("-", "+").replace("_", "/"), validate=True)
        except binascii.Error:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise SecretError(
                f"{where} holds something that is no master key; each must be {KEY_BYTES} random bytes in base64 "
                "(openssl rand -base64 32)."
            )
        keys.append(MasterKey.of(secret))
    return tuple(keys)
