"""The models that clients see: ids, aliases, families, and who may use which.

Owns the names. What is really loaded, and how large it is, the engines say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiexport_edge.proto.config import ModelSpec
from aiexport_edge.proto.config_limits import PlanConfig
from aiexport_edge.shim.engines.engines import ModelFacts
from aiexport_edge.shim.errors import NotFound, PermissionDenied, quoted

_DATED = re.compile(r"(.+)-(\d{8})", re.ASCII)


class Sizes(Protocol):
    """Where the models' sizes come from."""

    def facts(self, model: str) -> ModelFacts | None: ...


@dataclass(frozen=True, slots=True)
class Listed:
    """One id of the list. Several may stand for one set of weights."""

    id: str
    spec: ModelSpec


class Catalog:
    """The list of one installation, in the order of its configuration."""

    def __init__(self, models: Sequence[ModelSpec], plans: Mapping[str, PlanConfig], sizes: Sizes) -> None:
        self._listed = {model_id: Listed(model_id, spec) for spec in models for model_id in spec.ids}
        self._aliases = _aliases(self._listed)
        self._plans = plans
        self._sizes = sizes

    def ids_by_weights(self) -> dict[str, frozenset[str]]:
        """Every id, under the name by which the engines know its weights."""
        ids: dict[str, set[str]] = {}
        for listed in self._listed.values():
            ids.setdefault(listed.spec.weights, set()).add(listed.id)
        return {weights: frozenset(of_weights) for weights, of_weights in ids.items()}

    def weight(self, plan: str) -> float:
        """The plan's share of service against others."""
        return self._plans[plan].weight

    def visible(self, plan: str) -> list[Listed]:
        """Every id that the plan allows."""
        return [listed for listed in self._listed.values() if self._allows(plan, listed)]

    def use(self, model_id: str, plan: str) -> Listed:
        """The model to run. Raises `NotFound` for an unlisted one, `PermissionDenied` for one that the plan forbids."""
        listed = self._find(model_id)
        if not self._allows(plan, listed):
            raise PermissionDenied(
                f"The plan of this workspace does not include the model {quoted(model_id)}.", param="model"
            )
        return listed

    def show(self, model_id: str, plan: str) -> Listed:
        """The model to describe. Raises `NotFound`, also for one that the plan forbids."""
        listed = self._find(model_id)
        if not self._allows(plan, listed):
            raise _unlisted(model_id)
        return listed

    def max_output_tokens(self, spec: ModelSpec) -> int | None:
        """What `max_tokens` may be at most; None until an engine has told the model's size."""
        facts = self._sizes.facts(spec.weights)
        limits = [limit for limit in (spec.max_output_tokens, facts.max_output_tokens if facts else 0) if limit]
        return min(limits, default=None)

    def sees(self, spec: ModelSpec) -> bool | None:
        """Whether the model takes images; None until an engine has told it."""
        facts = self._sizes.facts(spec.weights)
        return None if facts is None else facts.vision

    def describe(self, listed: Listed) -> dict[str, Any]:
        """The model object of the API. Sizes are null until an engine has told them."""
        spec = listed.spec
        facts = self._sizes.facts(spec.weights)
        return {
            "id": listed.id,
            "type": "model",
            "family": spec.family,
            "display_name": spec.display_name,
            "context_window": facts.context_window if facts else spec.context_window or None,
            "max_output_tokens": self.max_output_tokens(spec),
            "vision": bool(self.sees(spec)),
            "pricing": {"input_per_million": spec.input_per_million, "output_per_million": spec.output_per_million},
            "created_at": spec.created_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        }

    def _find(self, model_id: str) -> Listed:
        listed = self._listed.get(model_id) or self._aliases.get(model_id)
        if listed is None:
            raise _unlisted(model_id)
        return listed

    def _allows(self, plan: str, listed: Listed) -> bool:
        return listed.spec.family in self._plans[plan].families


def _unlisted(model_id: str) -> NotFound:
    return NotFound(f"There is no model {quoted(model_id)}; GET /v2/models lists those there are.", param="model")


def _aliases(listed: Mapping[str, Listed]) -> dict[str, Listed]:
    """Each dated id without its date, standing for the newest."""
    newest: dict[str, Listed] = {}
    for model_id in sorted(listed):  # the same name with a later date comes later
        dated = _DATED.fullmatch(model_id)
        if dated is not None:
            newest[dated[1]] = listed[model_id]
    return newest
