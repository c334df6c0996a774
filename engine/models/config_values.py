"""Typed access to a model directory's JSON; every complaint names the file and the key.

Owns the errors of reading. Knows no key by name. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """A model directory that cannot be served: one sentence for the operator that names the file and the cause."""


class Values:
    """A JSON object with typed access; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], file: Path, prefix: str = "") -> None:
        self.values = values
        self.file = file
        self.prefix = prefix

    def error(self, key: str, complaint: str) -> ModelError:
        return ModelError(f"{self.file}: {self.prefix}{key} {complaint}")

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"is {value!r}; an integer of at least {minimum} is needed")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.optional_number(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(key, f"is {value!r}; a positive number is needed")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}; true or false is needed")
        return value

    def choice(self, key: str, supported: tuple[str, ...], *, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if value not in supported:
            raise self.error(key, f"is {value!r}; supported are {', '.join(supported)}")
        return str(value)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from `file`. Raises ModelError naming the file and what is wrong with it."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist; a Hugging Face model directory has one") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object")
    return value
