"""What a PEFT directory says about its low-rank adapter, held against the model that it is for.

Owns reading `adapter_config.json` and the header of `adapter_model.safetensors`: whether every factor has a place in
the model and the right shape, what it is scaled by, and the content's digest. Reads no tensor's numbers and imports no
torch. Field names and meanings are PEFT's (`LoraConfig`). Pickles are never read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from aiexport_edge.engine.models.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 256
MAX_CONFIG_BYTES = 1 << 20
DTYPES = ("F32", "F16", "BF16")
DIGEST_BYTES = 32
_HASHED_AT_ONCE = 1 << 20

# Of a layer, where the checkpoint's product goes: the product it is fused into, and its part of that.
PLACES: Mapping[str, tuple[str, int]] = {
    "self_attn.q_proj": ("qkv", 0),
    "self_attn.k_proj": ("qkv", 1),
    "self_attn.v_proj": ("qkv", 2),
    "self_attn.o_proj": ("o", 0),
    "mlp.gate_proj": ("gate_up", 0),
    "mlp.up_proj": ("gate_up", 1),
    "mlp.down_proj": ("down", 0),
}
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:[\w]+\.)*layers\.(?P<layer>\d+)\.(?P<product>[\w.]+?))"
    r"\.lora_(?P<factor>[AB])(?:\.default)?\.weight",
    re.ASCII,
)
# What a LoRA can be besides two factors a product. Each changes the sum that is computed.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Beginnings of values of `init_lora_weights` for which the model's own weights are changed before the factors count.
_CHANGES_MODEL = ("pissa", "corda", "olora", "loftq")


class AdapterError(Exception):
    """An adapter that cannot be served: one sentence for the operator that names the file and the cause."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors of one product in one layer, by their names in the file; `scale` belongs to their product.

    `product` is one of qkv, o, gate_up, down, and `part` its part, as in PLACES.
    """

    layer: int
    product: str
    part: int
    rank: int
    scale: float
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """A directory that fits its model. `digest` is of the content: another adapter never has the same."""

    directory: Path
    digest: bytes
    rank: int  # the largest
    factors: tuple[Factors, ...]

    @property
    def weights(self) -> Path:
        """The file that holds the factors."""
        return self.directory / WEIGHTS


def read_adapter(directory: Path, model: ModelConfig, *, max_rank: int = MAX_RANK) -> Adapter:
    """The adapter in `directory`, for `model`. Reads every byte once, for the digest.

    Raises `AdapterError`.
    """
    factors = read_header(directory, model)
    rank = max(each.rank for each in factors)
    if rank > max_rank:
        raise AdapterError(
            f"{directory / WEIGHTS}: the rank {rank} is more than {max_rank}, the most that this engine has room for"
        )
    return Adapter(directory, _digest(directory / CONFIG, directory / WEIGHTS), rank, factors)


def read_header(directory: Path, model: ModelConfig) -> tuple[Factors, ...]:
    """What `read_adapter` finds of an adapter's factors, without its numbers. Raises `AdapterError`."""
    config = _Config.read(directory / CONFIG)
    file = directory / WEIGHTS
    factors = _factors(file, _shapes(file), config, model)
    rank = max(each.rank for each in factors)
    if rank > MAX_RANK:
        raise AdapterError(f"{file}: the rank {rank} is more than {MAX_RANK}, the most that is served")
    return factors


@dataclass(frozen=True, slots=True)
class _Config:
    """What scales the factors."""

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool

    @classmethod
    def read(cls, file: Path) -> _Config:
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise AdapterError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes; it is no PEFT configuration")
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise AdapterError(f"{file} does not exist; name the directory that PEFT's save_pretrained wrote") from None
        except (OSError, ValueError) as error:
            raise AdapterError(f"{file} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise AdapterError(f"{file} is not a JSON object")
        if values.get("peft_type") != "LORA":
            raise AdapterError(f"{file}: peft_type is {values.get('peft_type')!r}; only LORA is served")
        for key, neutral in _NEUTRAL.items():
            if values.get(key) not in neutral:
                raise AdapterError(f"{file}: {key} {values[key]!r} is not served; train without it")
        start = values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_MODEL):
            raise AdapterError(
                f"{file}: init_lora_weights {start!r} takes parts out of the model's own weights, which others use; "
                "save the adapter with path_initial_model_for_weight_conversion"
            )
        return cls(
            file,
            _number(file, values, "r", integer=True),
            _number(file, values, "lora_alpha"),
            _pattern(file, values, "rank_pattern", integer=True),
            _pattern(file, values, "alpha_pattern"),
            bool(values.get("use_rslora")),
        )

    def rank_of(self, module: str) -> int:
        rank: int = _matching(self.rank_pattern, module, self.rank)
        return rank

    def scale(self, module: str, rank: int) -> float:
        alpha: float = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def _number(file: Path, values: Mapping[str, Any], key: str, *, integer: bool = False) -> Any:
    value = values.get(key)
    _check_number(file, key, value, integer=integer)
    return value


def _check_number(file: Path, key: str, value: object, *, integer: bool) -> None:
    is_number = isinstance(value, int) or (isinstance(value, float) and not integer and math.isfinite(value))
    if isinstance(value, bool) or not is_number or (integer and value < 1):  # type: ignore[operator]
        raise AdapterError(f"{file}: {key} must be {'an integer above 0' if integer else 'a number'}, not {value!r}")


def _pattern(file: Path, values: Mapping[str, Any], key: str, *, integer: bool = False) -> Mapping[str, Any]:
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{file}: {key} must be an object")
    for name, value in pattern.items():
        _check_number(file, f"{key}.{name}", value, integer=integer)
        try:
            re.compile(name)
        except re.error as error:
            raise AdapterError(f"{file}: {key} has {name!r}, which is no regular expression: {error}") from error
    return pattern


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first key that is the module's name or ends it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    try:
        with safe_open(file, framework="numpy") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            for name, part in parts.items():
                if part.get_dtype() not in DTYPES:
                    raise AdapterError(f"{file}: {name} is {part.get_dtype()}; supported are {', '.join(DTYPES)}")
            return shapes
    except FileNotFoundError:
        pickled = sorted(path.name for path in file.parent.glob("*.bin"))
        if pickled:
            raise AdapterError(
                f"{file.parent} holds pickled weights only ({pickled[0]}), which are never read: unpickling runs code; "
                "save it anew with safe_serialization=True"
            ) from None
        raise AdapterError(f"{file} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} is not a readable safetensors file: {error}") from error


def _factors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], config: _Config, model: ModelConfig
) -> tuple[Factors, ...]:
    """Every pair of factors, in the order of layers. Raises where one has no place, no partner or a wrong shape."""
    pairs: dict[tuple[int, str, str], dict[str, str]] = {}
    for name in sorted(shapes):
        match = _NAME.fullmatch(name)
        if match is None or match["product"] not in PLACES:
            raise AdapterError(f"{file}: {name} {_refusal(name)}")
        pairs.setdefault((int(match["layer"]), match["product"], match["module"]), {})[match["factor"]] = name
    if not pairs:
        raise AdapterError(f"{file} holds no factors (lora_A, lora_B)")
    factors = []
    taken: set[tuple[int, str]] = set()
    for (layer, product, module), names in sorted(pairs.items()):
        if len(names) < 2 or (layer, product) in taken:
            raise AdapterError(f"{file}: {module} must have one lora_A and one lora_B")
        taken.add((layer, product))
        _check_place(file, module, layer, product, model)
        out_features, in_features = product_sizes(model, product)
        a, b = shapes[names["A"]], shapes[names["B"]]
        rank = a[0] if len(a) == 2 else 0
        if a != (rank, in_features) or b != (out_features, rank) or rank < 1:
            raise AdapterError(
                f"{file}: the factors of {module} have the shapes {list(a)} and {list(b)}; this model's product takes "
                f"[r, {in_features}] and [{out_features}, r]. Was the adapter trained on another model?"
            )
        if rank != config.rank_of(module):
            raise AdapterError(
                f"{file}: {module} has rank {rank}, {CONFIG} says {config.rank_of(module)}: a torn copy?"
            )
        fused, part = PLACES[product]
        factors.append(Factors(layer, fused, part, rank, config.scale(module, rank), names["A"], names["B"]))
    return tuple(factors)


def _check_place(file: Path, module: str, layer: int, product: str, model: ModelConfig) -> None:
    if layer >= model.num_layers:
        raise AdapterError(
            f"{file}: {module} is in layer {layer}, but this model has {model.num_layers} layers; was the adapter "
            "trained on another model?"
        )
    if "visual." in module:
        raise AdapterError(f"{file}: {module} {_refusal(module)}")
    if product.startswith("mlp.") and model.mixture is not None and layer in model.mixture.layers:
        raise AdapterError(f"{file}: {module} is no product of this model: layer {layer} is a mixture of experts")


def product_sizes(model: ModelConfig, product: str) -> tuple[int, int]:
    """Outputs and inputs of a product of PLACES."""
    q_rows, kv_rows = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    return {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }[product]


def _refusal(name: str) -> str:
    if "visual." in name or "vision_" in name:
        return (
            "is part of the vision tower, which adapters cannot change here; train the language model alone: "
            'exclude_modules=".*visual.*"'
        )
    if "embed_tokens" in name or "lm_head" in name or "lora_embedding" in name:
        return "changes the embeddings or the head, which adapters cannot do here; train without them"
    if ".experts." in name or name.endswith(("mlp.gate.lora_A.weight", "mlp.gate.lora_B.weight")):
        return "changes experts or their router, which adapters cannot do here; train the attention's products"
    return f"is not a factor of {', '.join(sorted(PLACES))}, which adapters may change"


def _digest(*files: Path) -> bytes:
    """Of the files' sizes and bytes, in their order."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(file.stat().st_size.to_bytes(8, "little"))
                while piece := stream.read(_HASHED_AT_ONCE):
                    digest.update(piece)
        except OSError as error:
            raise AdapterError(f"{file} cannot be read: {error.strerror}") from error
    return digest.digest()
