"""Where tokens stand for rotary embedding in a prompt with pictures: M-RoPE of Qwen2-VL, as Qwen3-VL has it.

Text goes on by one in time, height and width alike. A picture stands still in time and spreads over height and width;
what follows it begins past its longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The tokens of one picture: index of the first in the prompt, rows and columns of tokens (merged patches)."""

    start: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        """Index past its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Positions:
    """int64 [3, T] (time, height, width) of a prompt's T tokens; a later token i stands at i + `shift` in all three."""

    of_prompt: NDArray[np.int64]
    shift: int


def prompt_positions(num_tokens: int, spans: Sequence[ImageSpan]) -> Positions:
    """Positions of a prompt with pictures, `spans` in their order and not overlapping."""
    import numpy as np  # for prompts with pictures alone

    positions = np.empty((3, num_tokens), np.int64)
    index = position = 0
    for span in spans:
        positions[:, index : span.start] = position + np.arange(span.start - index)
        position += span.start - index
        of_span = positions[:, span.start : span.end].reshape(3, span.rows, span.columns)
        of_span[0] = position
        of_span[1] = position + np.arange(span.rows)[:, None]
        of_span[2] = position + np.arange(span.columns)
        positions[:, span.start : span.end] = of_span.reshape(3, -1)
        position += max(span.rows, span.columns)
        index = span.end
    positions[:, index:] = position + np.arange(num_tokens - index)
    return Positions(positions, position - index)
