"""`rope_scaling` of a `[[models]]` entry: a longer context than the checkpoint's own configuration gives it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from aiexport_edge.proto import config_values as values

YARN = "yarn"
_KEYS = ("rope_type", "factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071) over what `config.json` says: positions up to `factor` times the original length.

    `original_max_position_embeddings` is the length in tokens that the model was trained at; 0: the
    `max_position_embeddings` of its `config.json`.
    """

    factor: float
    original_max_position_embeddings: int

    def to_json(self) -> dict[str, object]:
        """As a file would say it."""
        said: dict[str, object] = {"rope_type": YARN, "factor": self.factor}
        if self.original_max_position_embeddings:
            said["original_max_position_embeddings"] = self.original_max_position_embeddings
        return said


def rope_scaling(value: object) -> RopeScaling:
    """Reads `{ rope_type = "yarn", factor = 4.0 }`. Raises `ValueError` with a phrase that reads on after the key."""
    if not isinstance(value, dict):
        raise ValueError('must be a table such as { rope_type = "yarn", factor = 4.0 }')
    for key in value:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            known = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(_KEYS)}"
            raise ValueError(f'has an unknown key "{key}"; {known}')
    if value.get("rope_type") != YARN:
        raise ValueError('must have rope_type = "yarn"; other scalings are the checkpoint\'s own matter')
    if "factor" not in value:
        raise ValueError("has no factor: by how much the context grows, such as 4.0")
    original = values.integer(0, 1 << 24)
    try:
        return RopeScaling(
            factor=values.number(value["factor"], 1.0, 256.0, "a number from 1 to 256"),
            original_max_position_embeddings=original(value.get("original_max_position_embeddings", 0)),
        )
    except ValueError as problem:
        key = "factor" if "a number" in str(problem) else "original_max_position_embeddings"
        raise ValueError(f"has a {key} that {problem}") from None
