"""Constants of a JSON Schema: how they are spelled, what type they have, when two are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiexport_edge.engine.structured.json_grammar import string_text


def spelled(value: Any) -> str:
    """A constant as JSON: no blanks, every string in its one spelling."""
    if isinstance(value, str):
        return f'"{string_text(value)}"'
    if isinstance(value, list):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{spelled(name)}:{spelled(member)}" for name, member in value.items()) + "}"
    return json.dumps(value, allow_nan=False)


def same(one: Any, other: Any) -> bool:
    """JSON Schema's equality: 1 is 1.0, and true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


def is_of(value: Any, kind: str) -> bool:
    match kind:
        case "object":
            return isinstance(value, Mapping)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            return whole and not isinstance(value, bool)
        case _:
            return isinstance(value, int | float) and not isinstance(value, bool)
