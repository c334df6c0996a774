"""Safetensors files of a Hugging Face directory: which tensors there are, and reading them one at a time.

Owns finding the files (one, or shards by an index) and their memory maps. Pages that tensors were read from leave this
process' memory soon after, whatever order tensors lie in and whichever files they are in; a file is let go of when its
last tensor has been read. The system is asked for the files ahead of that, so that loading has the disk's full speed.
Never unpickles. Knows no architecture.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aiexport_edge.engine.models.config import ModelError

AHEAD_BYTES = 32 << 20  # that the system is asked for at once
READ_BYTES = 64 << 20  # that were handed out before their pages leave memory
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Those of quantized weights and what belongs to them.
STORED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8} | {
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, …

    @property
    def nbytes(self) -> int:
        """Bytes in the file, for the dtypes that are read."""
        count = (DTYPES | STORED_DTYPES)[self.dtype].itemsize
        for size in self.shape:
            count *= size
        return count


class Checkpoint:
    """Open, memory-mapped weights. `entries` is known without touching their bytes."""

    def __init__(self, directory: Path, handles: dict[Path, Any]) -> None:
        self.directory = directory
        self._handles = handles
        self._unread: dict[Path, set[str]] = {}
        self._read: list[tuple[Path, Tensor]] = []
        self._read_bytes = 0
        self.entries: dict[str, Entry] = {}
        for file, handle in handles.items():
            self._unread[file] = set(handle.keys())
            for name in self._unread[file]:
                part = handle.get_slice(name)
                self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file: copy what is to outlive this checkpoint."""
        if self._read_bytes > READ_BYTES:
            _let_go(self._read)
            self._read, self._read_bytes = [], 0
        file = self.entries[name].file
        try:
            if file not in self._handles:  # read before, and let go of
                with safe_open(file, framework="pt", device="cpu") as handle:
                    again: Tensor = handle.get_tensor(name)
                    return again
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: {name} cannot be read: {error}") from error
        self._unread[file].discard(name)
        if self._unread[file]:
            self._read.append((file, tensor))
            self._read_bytes += tensor.nbytes
        else:
            del self._handles[file]  # its pages leave memory with the last view of them
            self._read = [(other, view) for other, view in self._read if other != file]
        return tensor

    def close(self) -> None:
        """Let go of all files."""
        self._read.clear()
        self._handles.clear()


def _let_go(read: list[tuple[Path, Tensor]]) -> None:
    """Have the pages beneath views of mapped files leave memory. Who still looks at one has its pages read again."""
    if sys.platform != "linux":
        return
    mapped: dict[str, list[tuple[int, int]]] = {}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        first, _, rest = line.partition("-")
        fields = rest.split(maxsplit=5)
        if len(fields) == 6:
            mapped.setdefault(fields[5], []).append((int(first, 16), int(fields[0], 16)))
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for file, tensor in read:
        first_page = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # What the library had to copy lies elsewhere, and would be lost.
        if any(low <= first_page < end <= high for low, high in mapped.get(str(file.resolve()), ())):
            advise(first_page, end - first_page, mmap.MADV_DONTNEED)


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """Map the directory's weights until the end of the block. Raises ModelError naming the file that is at fault."""
    names_by_file = _files(directory)
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for file in names_by_file:
            try:
                handles[file] = safe_open(file, framework="pt", device="cpu")
            except FileNotFoundError:
                raise ModelError(f"{file} does not exist, but {directory / INDEX} names it") from None
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} is not a readable safetensors file: {error}") from error
        checkpoint = Checkpoint(directory, handles)
        del handles
        stack.callback(checkpoint.close)
        stack.enter_context(_reading_ahead(list(names_by_file)))
        for file, names in names_by_file.items():
            for name in names:
                entry = checkpoint.entries.get(name)
                if entry is None or entry.file != file:
                    raise ModelError(f"{file} does not hold {name}, but {directory / INDEX} says so")
        yield checkpoint


@contextmanager
def _reading_ahead(files: list[Path]) -> Iterator[None]:
    """Meanwhile the system reads the files into its cache, in their order and many parts at once."""
    if not hasattr(os, "posix_fadvise"):
        yield
        return
    over = threading.Event()

    def ask() -> None:
        for file in files:
            with suppress(OSError), file.open("rb") as stream:  # a hint: whoever reads the file says what is wrong
                for first in range(0, file.stat().st_size, AHEAD_BYTES):
                    if over.is_set():
                        return
                    os.posix_fadvise(stream.fileno(), first, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _files(directory: Path) -> dict[Path, list[str]]:
    """The files to open, each with the names that the index promises in it (none for a single file)."""
    if (directory / SINGLE).exists():  # before the index of an older save, as transformers has it
        return {directory / SINGLE: []}
    if (directory / INDEX).exists():
        return _read_index(directory)
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory")
    pickled = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in directory.glob(suffix))
    if pickled:
        raise ModelError(
            f"{directory} holds pickled weights only ({pickled[0]}), which are never read: unpickling runs code; "
            "convert them to safetensors (transformers: from_pretrained, then save_pretrained)"
        )
    if gguf := sorted(file.name for file in directory.glob("*.gguf")):
        raise ModelError(
            f"{directory} holds weights as GGUF only ({gguf[0]}), which is not read: take the model's safetensors, and "
            'let quantize = "int4" or "int8" round them'
        )
    raise ModelError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def _read_index(directory: Path) -> dict[Path, list[str]]:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ModelError(f"{index}: {file!r} is not the name of a file beside it")
            files.setdefault(directory / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files: {error!r}") from error
    return files
