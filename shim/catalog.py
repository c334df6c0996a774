"""The models that clients see: ids, aliases, families, and who may use which.

Owns the names. What is really loaded, and how large it is, the engines say. A fine-tuned model is its base under a name
of its own, which its workspace alone has: to all others it is one that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from aiexport_edge.proto.config import ModelSpec
from aiexport_edge.proto.config_adapters import AdaptersConfig
from aiexport_edge.proto.config_limits import PlanConfig
from aiexport_edge.proto.config_values import CUSTOM
from aiexport_edge.shim.engines.engines import ModelFacts
from aiexport_edge.shim.errors import NotFound, PermissionDenied, quoted
from aiexport_edge.shim.store.values import Adapter, Principal

_DATED = re.compile(r"(.+)-(\d{8})", re.ASCII)


class Sizes(Protocol):
    """Where the models' sizes come from."""

    def facts(self, model: str) -> ModelFacts | None: ...


class FineTuned(Protocol):
    """Where the fine-tuned models come from: by id, those of all workspaces, oldest first."""

    @property
    def by_id(self) -> Mapping[str, Adapter]: ...


@dataclass(frozen=True, slots=True)
class Listed:
    """One id of the list. Several may stand for one set of weights. `adapter`: the engines' name for it, or ""."""

    id: str
    spec: ModelSpec
    adapter: str = ""


class Catalog:
    """The list of one installation, in the order of its configuration; after it, a workspace's own."""

    def __init__(
        self,
        models: Sequence[ModelSpec],
        plans: Mapping[str, PlanConfig],
        sizes: Sizes,
        fine_tuned: FineTuned,
        surcharges: AdaptersConfig,
    ) -> None:
        self._fine_tuned = fine_tuned
        self._surcharges = surcharges
        self._listed = {model_id: Listed(model_id, spec) for spec in models for model_id in spec.ids}
        self._aliases = _aliases(self._listed)
        self._plans = plans
        self._sizes = sizes

    def ids_by_weights(self) -> dict[str, frozenset[str]]:
        """Every id, under the name by which the engines know its weights."""
        ids: dict[str, set[str]] = {}
        for listed in self._listed.values():
            ids.setdefault(listed.spec.weights, set()).add(listed.id)
        for adapter in self._fine_tuned.by_id.values():
            base = self._listed.get(adapter.base)
            if base is not None:
                ids[base.spec.weights].add(adapter.full_id)
        return {weights: frozenset(of_weights) for weights, of_weights in ids.items()}

    def weight(self, plan: str) -> float:
        """The plan's share of service against others."""
        return self._plans[plan].weight

    def visible(self, principal: Principal) -> list[Listed]:
        """Every id that the caller's plan allows, and its workspace's own."""
        own = [
            self._own(adapter)
            for adapter in self._fine_tuned.by_id.values()
            if adapter.workspace == principal.workspace and adapter.base in self._listed
        ]
        return [listed for listed in (*self._listed.values(), *own) if self._allows(principal.plan, listed)]

    def use(self, model_id: str, principal: Principal) -> Listed:
        """The model to run. Raises `NotFound` for an unlisted one, `PermissionDenied` for one that the plan forbids."""
        listed = self._find(model_id, principal)
        if not self._allows(principal.plan, listed):
            raise PermissionDenied(
                f"The plan of this workspace does not include the model {quoted(model_id)}.", param="model"
            )
        return listed

    def show(self, model_id: str, principal: Principal) -> Listed:
        """The model to describe. Raises `NotFound`, also for one that the plan forbids."""
        listed = self._find(model_id, principal)
        if not self._allows(principal.plan, listed):
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

    def _find(self, model_id: str, principal: Principal) -> Listed:
        listed = self._listed.get(model_id) or self._aliases.get(model_id)
        if listed is not None:
            return listed
        adapter = self._fine_tuned.by_id.get(model_id)
        if adapter is None or adapter.workspace != principal.workspace or adapter.base not in self._listed:
            raise _unlisted(model_id)
        return self._own(adapter)

    def _own(self, adapter: Adapter) -> Listed:
        """A fine-tuned model: its base but for the family, the name and the price."""
        base, surcharges = self._listed[adapter.base].spec, self._surcharges
        spec = replace(
            base,
            family=CUSTOM,
            display_name=f"{base.display_name}, fine-tuned",
            input_per_million=base.input_per_million + surcharges.input_surcharge,
            output_per_million=base.output_per_million + surcharges.output_surcharge,
            created_at=adapter.created_at,
        )
        return Listed(adapter.full_id, spec, adapter.adapter_id)

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
