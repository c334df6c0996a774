"""`aiexport-edge models import`: a model from a disk or an archive into the state directory, without the network.

Owns the order: a directory beside the target is filled, checked, made durable, and takes the target's name at once. It
is locked meanwhile, so that what a killed import has left is told from one that runs, and removed by the next.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiexport_edge.shim.cli import manifest
from aiexport_edge.shim.cli.command import CommandError, load_config, make_state, print_json
from aiexport_edge.shim.cli.manifest import MANIFEST
from aiexport_edge.shim.cli.model_sources import Skipped, SourceFile, entries, readable, source_name
from aiexport_edge.shim.cli.weights import inspect_weights

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CHUNK = 1 << 20
RESERVE = 64 << 20  # bytes that stay free on the disk
PROGRESS_S = 2.0  # between two lines of progress


@dataclass(slots=True)
class _Import:
    """What has been done. `hashes` and `linked` are of the files of one folder of the source: the model's."""

    hashes: dict[str, dict[str, str]] = field(default_factory=dict)  # by folder, then name
    linked: int = 0
    skipped: list[Skipped] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    name = source_name(args.source)
    if args.to is None:
        if not NAME.fullmatch(name):
            raise CommandError(f"{name!r} is no name for a model's directory; name one with --to")
        make_state(config.state)
        (config.state / "models").mkdir(mode=0o700, exist_ok=True)
        target = config.state / "models" / name
    else:
        target = args.to.expanduser().absolute()
        if not target.parent.is_dir():
            raise CommandError(f"there is no directory {target.parent}; make it, or name another with --to")
    done = import_model(args.source, target)
    entry = _entry(target)
    if args.json:
        print_json({"directory": target, "linked": done.linked, **_listed(target, done), "entry": entry})
        return 0
    for each in done.skipped:
        print(f"aiexport-edge: left out {each.where}: {each.reason}", file=sys.stderr)
    hashes = done.hashes[""]
    print(f"imported {len(hashes)} files into {target}; put this into the configuration:\n\n{entry}", end="")
    return 0


def _listed(target: Path, done: _Import) -> dict[str, Any]:
    files = [
        {"path": target / name, "bytes": (target / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(done.hashes[""].items())
    ]
    return {"files": files, "skipped": done.skipped}


def _entry(target: Path) -> str:
    """For the configuration file. JSON's strings are TOML's too."""
    name = target.name if NAME.fullmatch(target.name) and not target.name.startswith("ft-") else "my-model"
    return (
        "[[models]]\n"
        f"ids = [{json.dumps(name)}]  # what clients ask for\n"
        'family = "sonnet"  # opus, sonnet or haiku: which plans may use it\n'
        f"display_name = {json.dumps(name)}\n"
        f"source = {json.dumps(str(target))}\n"
        "input_per_million = 0.0  # US dollars\n"
        "output_per_million = 0.0\n"
    )


def import_model(source: Path, target: Path) -> _Import:
    """Copies or links the model into `target`, which is not there before, nor after a `CommandError`."""
    with _staging(source, target) as staging:
        done = _Import()
        try:
            with readable(source):
                _fill(source, staging, done)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CommandError(f"{source} could not be imported ({reason}); nothing was left behind") from None
        folder = _model_folder(source, done)
        model = staging / _folder_name(done, folder)
        hashes = done.hashes[folder]
        done.skipped += [
            Skipped(f"{other}/{name}" if other else name, "outside the model's folder")
            for other, names in done.hashes.items()
            if other != folder
            for name in names
        ]
        _check(source, model, hashes)
        done.hashes = {"": hashes}
        manifest_file = model / MANIFEST
        manifest_file.unlink(missing_ok=True)
        manifest_file.write_text(manifest.render(hashes), encoding="utf-8")
        _sync(manifest_file)
        _sync(model)
        os.rename(model, target)
        _sync(target.parent)
    return done


@contextmanager
def _staging(source: Path, target: Path) -> Iterator[Path]:
    """A locked directory of its own beside the target; gone at the end, whatever happens."""
    path = target.parent / f".{target.name}.importing"
    if os.path.lexists(target):
        raise CommandError(f"{target} is already there; remove it, or name another place with --to")
    if source.resolve() in (target.parent.resolve(), *target.parent.resolve().parents):
        raise CommandError(f"{target} is inside {source}; name a place outside with --to")
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CommandError(f"another import into {target} is running; wait for it") from None
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # another import has just removed it
    try:
        for left in path.iterdir():  # of an import that was killed
            shutil.rmtree(left)
        if os.path.lexists(target):
            raise CommandError(f"{target} is already there; remove it, or name another place with --to")
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------- filling


def _fill(source: Path, staging: Path, done: _Import) -> None:
    """Puts every file of the source into a folder of `staging`, one for each folder of the source."""
    if source.is_dir():
        needed = sum(entry.size for entry in entries(source) if isinstance(entry, SourceFile))
        if not _same_disk(source, staging):
            _require_space(staging, needed, source)
    progress = Progress()
    for entry in entries(source):
        if isinstance(entry, Skipped):
            done.skipped.append(entry)
            continue
        names = done.hashes.setdefault(entry.folder, {})
        folder = staging / _folder_name(done, entry.folder)
        folder.mkdir(exist_ok=True)  # the umask says who may read it: below the state directory nobody else can
        target = folder / entry.name
        if entry.path is not None and _linked(entry.path, target):
            done.linked += 1
            with target.open("rb") as stream:
                names[entry.name] = _pour(stream, None, entry, progress)
            continue
        _require_space(staging, entry.size, source)
        with entry.stream or open(entry.path or "", "rb") as stream, target.open("xb") as output:
            names[entry.name] = _pour(stream, output.fileno(), entry, progress)
            os.fsync(output.fileno())


def _folder_name(done: _Import, folder: str) -> str:
    return str(list(done.hashes).index(folder))


def _same_disk(source: Path, staging: Path) -> bool:
    return source.stat().st_dev == staging.stat().st_dev


def _linked(file: Path, target: Path) -> bool:
    """Whether a hard link could stand for a copy: the same disk, and a system that allows it. Not of a file that root
    alone can read: who serves the model may be another user.
    """
    if os.geteuid() == 0 and not file.stat().st_mode & stat.S_IROTH:
        return False
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def _require_space(staging: Path, needed: int, source: Path) -> None:
    free = shutil.disk_usage(staging).free
    if needed + RESERVE > free:
        raise CommandError(
            f"{source} needs {needed / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free at {staging.parent}; "
            "free some, or name another disk with --to"
        )


def _pour(stream: Any, output: int | None, entry: SourceFile, progress: Progress) -> str:
    """Reads exactly what the source says the file holds, writes it where there is an output; its SHA-256."""
    digest = hashlib.sha256()
    total = 0
    while chunk := stream.read(CHUNK):
        total += len(chunk)
        if total > entry.size:
            break
        digest.update(chunk)
        view = memoryview(chunk)
        while output is not None and view:
            view = view[os.write(output, view) :]
        progress.add(len(chunk), entry.where)
    if total != entry.size:
        raise CommandError(f"{entry.where!r} is not as long as its source says; get the model again")
    return digest.hexdigest()


class Progress:
    """Lines on stderr while it takes long."""

    def __init__(self) -> None:
        self._total = 0
        self._next = time.monotonic() + PROGRESS_S

    def add(self, num_bytes: int, where: str) -> None:
        self._total += num_bytes
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_S
            print(f"aiexport-edge: {self._total / 2**20:,.0f} MiB, at {where}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- checking


def _model_folder(source: Path, done: _Import) -> str:
    """The outermost folder with a `config.json`; the source's top where none has one, for the check to say."""
    found = [folder for folder, names in done.hashes.items() if "config.json" in names]
    if not found:
        raise CommandError(f"{source} holds no config.json; name a model in Hugging Face format")
    depth = {folder: len(Path(folder).parts) for folder in found}
    outermost = [folder for folder in found if depth[folder] == min(depth.values())]
    if len(outermost) > 1:
        raise CommandError(f"{source} holds several models ({', '.join(sorted(outermost)[:5])}); import them singly")
    return outermost[0]


def _check(source: Path, model: Path, hashes: dict[str, str]) -> None:
    """Raises `CommandError` where the copy is not whole, or not what the source's own list of hashes says."""
    if not any(name.endswith(".safetensors") for name in hashes):
        raise CommandError(
            f"{source} holds no *.safetensors (weights as pickles can run code and are not imported); "
            "download the model in that format"
        )
    problem = inspect_weights(model).problem
    if problem is None:
        try:
            expected = manifest.read(model)
        except ValueError as error:
            problem = str(error)
        else:
            hashes.pop(MANIFEST, None)
            relevant = {name: digest for name, digest in expected.items() if name in hashes or name == "config.json"}
            problem = manifest.first_difference(model, relevant, hashes)
    if problem is not None:
        raise CommandError(problem.replace(f"{model}/", f"{source}: ").replace(str(model), str(source)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
