"""How long a model's sequences may be here: what its directory is made for, what the operator asks for, and YaRN.

Owns the refusal of a window that the model was not made for. Imports no torch.
"""

from __future__ import annotations

from typing import Protocol

from aiexport_edge.engine.models.config import Yarn
from aiexport_edge.proto.config import Config, ConfigError, WeightsSpec


class Windowed(Protocol):
    """What is asked of a model's configuration."""

    @property
    def context_window(self) -> int: ...


def yarn_of(weights: WeightsSpec) -> Yarn | None:
    """The operator's scaling."""
    scaling = weights.rope_scaling
    return None if scaling is None else Yarn(scaling.factor, scaling.original_max_position_embeddings)


def served_window(config: Config, weights: WeightsSpec, model: Windowed) -> int:
    """Tokens, prompt and output together. `model` has been read with `yarn_of(weights)`.

    Raises `ConfigError` where `context_window` is more than the model is made for: past its last position a model
    answers with nonsense, and how to go beyond is the operator's decision.
    """
    wanted = weights.context_window
    if wanted <= model.context_window:
        return wanted or model.context_window
    index = next(index for index, spec in enumerate(config.models) if spec.weights == weights.name)
    if weights.vllm is not None:
        remedy = "lower it, or extend the model by rope_scaling in its config.json"
    elif weights.rope_scaling is not None:
        remedy = "lower it, or raise the factor of rope_scaling"
    else:
        factor = -(-wanted * 2 // model.context_window) / 2  # halves: what YaRN was tried with
        remedy = f'lower it, or extend the model by YaRN: rope_scaling = {{ rope_type = "yarn", factor = {factor} }}'
    raise ConfigError(
        config.path,
        f"models.{index}.context_window",
        f"is {wanted}, but {weights.name} is made for {model.context_window} tokens; {remedy}",
    )
