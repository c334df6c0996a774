"""What is known of a model before anything is loaded. Imports nothing heavy: it is filled in before the core is
configured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
