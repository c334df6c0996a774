"""What is known of a model before anything is loaded. Imports nothing heavy: it is filled in before the core is
configured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.engine.images.patches import PatchConfig


@dataclass(frozen=True, slots=True)
class Vision:
    """How a model that sees wants its pictures: their size, and the token that stands for them in the prompt."""

    patches: PatchConfig
    image_token_id: int

    def num_tokens(self, rows: int, columns: int) -> int:
        """Tokens that a grid of patches takes."""
        return rows * columns // self.patches.merge_size**2


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before anything is loaded. Windows in tokens; `stop_ids` from the model's
    configuration.
    """

    name: str
    directory: Path
    revision: str
    vocab_size: int  # ids that the model knows; it may be more than its tokenizer has
    context_window: int
    max_output_tokens: int
    deterministic: bool
    stop_ids: tuple[int, ...]
    vision: Vision | None = None
