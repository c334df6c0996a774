"""The effective configuration as `config show` prints it: TOML that `config.load` reads back to the same values.

Knows the dataclasses of `config.py` and nothing of where they came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from aiexport_edge.proto.config import Config, ModelSpec
from aiexport_edge.proto.config_limits import UNLIMITED
from aiexport_edge.proto.config_rope import RopeScaling
from aiexport_edge.proto.config_vllm import NATIVE, VLLM
from aiexport_edge.proto.units import format_duration, format_size

_SIZES = frozenset(
    {
        "page_bytes",
        "pool_bytes",
        "max_body_bytes",
        "inflight_body_bytes",
        "kv_cache_bytes",
        "max_bytes",
        "held_bytes",
        "host_bytes",
    }
)
_AUTO = frozenset({"deterministic", "eager"})  # where they are None
_COUNTS = frozenset({"max_step_tokens", "slots", "max_rank"})  # where they are 0
_ABSENT = frozenset({"redis_url", "quantization", "gpus"})  # where they are empty
_LIMITS = frozenset({"requests_per_minute", "tokens_per_day"})
_SECTIONS = (
    "engine",
    "shim",
    "batches",
    "webhooks",
    "images",
    "adapters",
    "limits",
    "store",
    "admin",
    "tls",
    "telemetry",
)


def effective(config: Config) -> dict[str, Any]:
    """Every section with the values that hold, as JSON has them (sizes and durations as a file would say them)."""
    sections: dict[str, Any] = {name: _section(getattr(config, name)) for name in _SECTIONS}
    sections["admin"]["listen"] = config.admin_listen
    sections["shim"]["engines"] = list(config.engine_addresses)
    sections["plans"] = {name: _section(plan) for name, plan in config.plans.items()}
    sections["models"] = [_model(model) for model in config.models]
    return sections


def to_toml(config: Config) -> str:
    """The same as TOML. Keys without a value (no certificate, say) are left out."""
    sections = effective(config)
    lines: list[str] = []
    for name in _SECTIONS:
        lines += _toml_table(f"[{name}]", sections[name])
    for name, plan in sections["plans"].items():
        lines += _toml_table(f"[plans.{name}]", plan)
    for model in sections["models"]:
        vllm = model.pop("vllm", None)
        lines += _toml_table("[[models]]", model)
        if vllm is not None:
            lines += _toml_table("[models.vllm]", vllm)
    return "\n".join(lines).rstrip("\n") + "\n"


def _model(model: ModelSpec) -> dict[str, Any]:
    section = _section(model, leave_out=("weights", "vllm"))
    if model.vllm is None:
        return section | {"backend": NATIVE}
    return section | {"backend": VLLM, "vllm": _section(model.vllm)}


def _section(value: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    names = [field.name for field in fields(value) if field.name not in leave_out]
    return {name: _plain(name, getattr(value, name)) for name in names}


def _plain(name: str, value: Any) -> Any:
    if name in _SIZES:
        return format_size(value) if value else "auto"
    if (name in _AUTO and value is None) or (name in _COUNTS and not value):
        return "auto"
    if name in _LIMITS and value is None:
        return UNLIMITED
    if name in _ABSENT and not value:
        return None
    if isinstance(value, RopeScaling):
        return value.to_json()
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, Path):
        return str(value)
    return [_plain("", item) for item in value] if isinstance(value, tuple) else value


def _toml_table(header: str, values: dict[str, Any]) -> list[str]:
    return [header, *(f"{key} = {_toml(value)}" for key, value in values.items() if value is not None), ""]


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    # JSON writes strings, numbers and booleans as TOML does, but leaves DEL as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
