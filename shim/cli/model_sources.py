"""What a model can be imported from: a directory, a tar or a zip file, each as a row of checked files.

Owns what is refused (links, devices, paths that lead elsewhere, names that are there twice) and what is passed over
(code, pickles, whatever serving does not read). Writes nothing. Every refusal is a `CommandError` naming the entry.
"""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from aiexport_edge.shim.cli.command import CommandError
from aiexport_edge.shim.cli.manifest import MANIFEST

MAX_ENTRIES = 10_000
MAX_TAR_HEADER = 1 << 20  # bytes of one extended header, which tarfile reads into memory
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")

_KEPT_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_KEPT_NAMES = ("LICENSE", "LICENCE", "NOTICE", MANIFEST)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a kind of compression that zipfile lacks
    ValueError,
)
_CODE = (".py", ".pyc", ".so", ".sh")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to import. `folder` is where it lies in the source, "" at its top; `path` is None in an archive."""

    folder: str
    name: str
    size: int  # bytes, as the source says
    path: Path | None
    stream: IO[bytes] | None

    @property
    def where(self) -> str:
        return f"{self.folder}/{self.name}" if self.folder else self.name


@dataclass(frozen=True, slots=True)
class Skipped:
    """One that is not imported, and why."""

    where: str
    reason: str


def source_name(source: Path) -> str:
    """What the model is called after: the directory's or the archive's name, the repository's in a download cache."""
    source = source.resolve()
    if source.parent.name == "snapshots":
        return source.parent.parent.name.rpartition("--")[2]
    suffix = "" if source.is_dir() else next((each for each in ARCHIVES if source.name.lower().endswith(each)), "")
    return source.name[: -len(suffix)] if suffix else source.name


def entries(source: Path) -> Iterator[SourceFile | Skipped]:
    """In the source's own order; an archive's streams are good until the next one."""
    name = source.name.lower()
    if source.is_dir():
        found = _of_directory(source)
    elif not source.is_file():
        raise CommandError(f"there is no directory or archive {source}; name one")
    elif name.endswith((".zst", ".zstd")):
        raise CommandError(f"{source} is compressed with zstd, which is not read here; unpack it first: zstd -d")
    elif name.endswith(".zip"):
        found = _of_zip(source)
    elif name.endswith(ARCHIVES):
        found = _of_tar(source)
    else:
        raise CommandError(f"{source} is no directory and none of {', '.join(ARCHIVES)}; name one of these")
    seen: set[str] = set()
    for entry in found:
        if entry.where in seen:
            raise _refused(source, entry.where, "is there twice")
        seen.add(entry.where)
        if len(seen) > MAX_ENTRIES:
            raise CommandError(f"{source} holds more than {MAX_ENTRIES} files; import the model's directory alone")
        yield entry


def _chosen(where: PurePosixPath, size: int, path: Path | None, stream: IO[bytes] | None) -> SourceFile | Skipped:
    folder = "" if str(where.parent) == "." else str(where.parent)
    return SourceFile(folder, where.name, size, path, stream)


def _why_not(where: PurePosixPath) -> str | None:
    """Why a file is passed over; None where it is kept."""
    suffix = where.suffix.lower()
    if suffix in _PICKLES:
        return "pickle: loading it could run code"
    if suffix in _CODE:
        return "code: never run here"
    if any(part.startswith(".") for part in where.parts):
        return "hidden"
    if suffix in _KEPT_SUFFIXES or where.name in _KEPT_NAMES:
        return None
    return "not read by the server"


def _checked(source: Path, name: str) -> PurePosixPath:
    """An archive's entry name as a path below its top."""
    path = PurePosixPath(name)
    if (
        not name
        or "\\" in name
        or not name.isprintable()
        or path.is_absolute()
        or ".." in path.parts
        or (len(name) > 1 and name[1] == ":")
    ):
        raise _refused(source, name, "has a name that leads out of it, or is none")
    return path


def _refused(source: Path, where: str, what: str) -> CommandError:
    return CommandError(f"{source}: {where[:200]!r} {what}; nothing was imported, get the model from elsewhere")


# ---------------------------------------------------------------------------------------------------- a directory


def _of_directory(source: Path) -> Iterator[SourceFile | Skipped]:
    """Its own files. Sub-folders hold other formats of the same model, and are passed over."""
    blobs = source.resolve().parent.parent / "blobs" if source.resolve().parent.name == "snapshots" else None
    for name in sorted(os.listdir(source)):
        where, path = PurePosixPath(name), source / name
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            # Hugging Face's download cache links each file of a snapshot to a blob of the same repository
            target = path.resolve()
            if blobs is None or target.parent != blobs or not target.is_file():
                raise _refused(source, name, "is a link")
            path, mode = target, target.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield Skipped(name + "/", "a folder: other formats of the model")
        elif not stat.S_ISREG(mode):
            raise _refused(source, name, "is a device or a pipe")
        elif reason := _why_not(where):
            yield Skipped(name, reason)
        else:
            yield _chosen(where, path.stat().st_size, path, None)


# ---------------------------------------------------------------------------------------------------- archives


class _Member(tarfile.TarInfo):
    """Refuses the headers that a hostile archive would fill memory with."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if member.type in (*extended, tarfile.SOLARIS_XHDTYPE) and member.size > MAX_TAR_HEADER:
            raise CommandError(
                "the archive holds a header that is too long for any file's; get the model from elsewhere"
            )
        return member


@contextmanager
def readable(source: Path) -> Iterator[None]:
    """What reading a damaged archive raises, as a sentence."""
    try:
        yield
    except _DAMAGE as error:
        raise _damaged(source, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(source, error) from None  # of gzip and bz2: no error of the system


def _damaged(source: Path, error: Exception) -> CommandError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
    return CommandError(f"{source} is damaged or no archive ({reason}); get it again")


def _of_tar(source: Path) -> Iterator[SourceFile | Skipped]:
    with tarfile.open(source, "r:*", tarinfo=_Member) as archive:
        for member in archive:
            where = _checked(source, member.name)
            if member.isdir():
                continue
            if member.issym() or member.islnk():
                raise _refused(source, member.name, "is a link")
            if not member.isreg() or member.issparse():
                raise _refused(source, member.name, "is a device, a pipe or a sparse file")
            if reason := _why_not(where):
                yield Skipped(str(where), reason)
                continue
            stream = archive.extractfile(member)
            assert stream is not None, "a regular file has content"
            yield _chosen(where, member.size, None, stream)


def _of_zip(source: Path) -> Iterator[SourceFile | Skipped]:
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if "\0" in member.orig_filename:
                raise _refused(source, member.orig_filename, "has a name that leads out of it, or is none")
            where = _checked(source, member.filename)
            mode = member.external_attr >> 16
            if stat.S_ISLNK(mode):
                raise _refused(source, member.filename, "is a link")
            if member.is_dir():
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise _refused(source, member.filename, "is a device or a pipe")
            if member.flag_bits & 1:
                raise _refused(source, member.filename, "is encrypted")
            if reason := _why_not(where):
                yield Skipped(str(where), reason)
                continue
            with archive.open(member) as stream:
                yield _chosen(where, member.file_size, None, stream)
