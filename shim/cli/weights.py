"""Whether the files of a Hugging Face model directory are there and whole, from their names and headers alone.

Knows the safetensors format (an 8-byte length, that many bytes of JSON, then the tensors' bytes; see
https://github.com/huggingface/safetensors, "Format") and the sharded index. Loads no tensor and needs no torch.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

HEADER_LIMIT = 100_000_000  # bytes, as the format's own reader has it
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What a directory holds. `problem` is None where it is complete; otherwise a sentence with the remedy."""

    files: tuple[Path, ...]
    num_bytes: int
    problem: str | None


def inspect_weights(directory: Path) -> WeightFiles:
    """Checks a model directory; never raises for what it finds there."""
    if not directory.is_dir():
        return WeightFiles((), 0, f"there is no directory {directory}; download the model there, or correct `source`")
    files = tuple(sorted(directory.glob("*.safetensors")))
    try:
        num_bytes = sum(file.stat().st_size for file in files)
        problem = _first_problem(directory, files)
    except OSError as error:
        return WeightFiles(files, 0, f"{error.filename} cannot be read ({error.strerror}); give this user the right")
    return WeightFiles(files, num_bytes, problem)


def _first_problem(directory: Path, files: tuple[Path, ...]) -> str | None:
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            return f"{directory / name} is missing; download the whole model again"
    if not files:
        return f"{directory} holds no *.safetensors; download the model in that format"
    tensors: dict[Path, set[str]] = {}
    for file in files:
        names = _tensor_names(file)
        if names is None:
            return f"{file} is cut short or no safetensors file; download it again"
        tensors[file] = names
    if (directory / INDEX).is_file():
        return _index_problem(directory, tensors)
    return None


def _tensor_names(file: Path) -> set[str] | None:
    """The tensors of a file; None where its size is not what its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return None
        length = struct.unpack("<Q", prefix)[0]
        if length > min(HEADER_LIMIT, size - 8):
            return None
        try:
            header = json.loads(stream.read(length))
            spans = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            end = max(spans.values(), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
    return set(spans) if size == 8 + length + end else None


def _index_problem(directory: Path, tensors: dict[Path, set[str]]) -> str | None:
    index = directory / INDEX
    try:
        shards: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, TypeError, KeyError):
        return f"{index} is not a safetensors index; download it again"
    for tensor, shard in shards.items():
        if tensor not in tensors.get(directory / shard, set()):
            return f"{directory / shard} lacks {tensor}, which {INDEX} says it holds; download it again"
    return None
