"""What a Hugging Face directory says about its model: `config.json` and `generation_config.json`, read strictly.

Owns the reading and its errors. Imports no torch, so that the engine process can learn the context window and the
stop ids without it. Knows nothing of the weights' bytes (`loader.py`) nor of the directory's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiexport_edge.engine.models.config_values import ModelError as ModelError
from aiexport_edge.engine.models.config_values import Values, read_json
from aiexport_edge.engine.models.formats.scheme import Quantization, read_quantization
from aiexport_edge.engine.models.registry import FAMILIES, Family
from aiexport_edge.engine.models.vision_config import VisionConfig, read_vision_config

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base, and how its frequencies are scaled for longer contexts.

    `kind` is one of ROPE_KINDS. Fields that a kind does not use hold their neutral value. "dynamic" changes nothing up
    to `max_position_embeddings`, and beyond it would change keys that are already cached: the context ends there.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float | None = None  # yarn; None: from factor and the two mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    mrope_section: tuple[int, int, int] | None = None  # of each half head, what turns by time, height, width


@dataclass(frozen=True, slots=True)
class Mixture:
    """The mixtures of experts of a model: how many each token takes, and in which layers they stand for the MLP.

    `normalize`: the weights of a token's experts sum to one.
    """

    num_experts: int
    top_k: int
    intermediate_size: int  # of an expert
    normalize: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Yarn:
    """An operator's wish for a longer context than `config.json` gives: YaRN by `factor` over `original` tokens, 0 for
    its `max_position_embeddings`.
    """

    factor: float
    original: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's shape. Sizes in elements, lengths in tokens.

    `context_window` is the longest sequence that the model is made for, prompt and output together.
    `sliding_windows` has one entry per layer: a token sees that many tokens, itself included; 0 means all.
    `dtype` is the checkpoint's as the file claims, None where it does not say.
    `stop_ids` end a turn: generation_config.json's `eos_token_id`, else config.json's. `vision` is of models that see.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    context_window: int
    sliding_windows: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str | None
    stop_ids: tuple[int, ...]
    mixture: Mixture | None = None
    vision: VisionConfig | None = None
    quantization: Quantization | None = None  # how the checkpoint stores quantized weights

    @classmethod
    def load(cls, directory: Path | str, *, yarn: Yarn | None = None) -> ModelConfig:
        """Read `directory`, with `yarn` in the place of its own scaling.

        Raises ModelError naming the file and the key that is missing or not supported.
        """
        directory = Path(directory)
        file = directory / "config.json"
        raw = read_json(file)
        nested = raw.get("text_config")
        values = {**raw, **nested} if isinstance(nested, dict) else raw
        if "tie_word_embeddings" in raw:  # of the whole model; in the part it can be a default that nobody meant
            values = {**values, "tie_word_embeddings": raw["tie_word_embeddings"]}
        if yarn is not None:
            values = _with_yarn(values, yarn, file)
        architecture, family = _family(raw, values, file)
        return _model_config(
            Values({**family.defaults, **values}, file), architecture, family, _stop_ids(directory, values, file)
        )

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token's keys and values of all layers take, `itemsize` bytes an element."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * itemsize


def _with_yarn(values: Mapping[str, Any], yarn: Yarn, file: Path) -> dict[str, Any]:
    """As if `config.json` had said so: what else stands beside its scaling (base, sections of axes) stays."""
    parameters = _rope_parameters(Values(values, file))
    kind = parameters.values.get("rope_type") or parameters.values.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise parameters.error("rope_type", f"is {kind!r}: the model has a scaling of its own; leave rope_scaling out")
    original = yarn.original or Values(values, file).integer("max_position_embeddings")
    said = {"rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": original}
    kept = {key: value for key, value in parameters.values.items() if key not in ("type", *said)}
    others = {key: value for key, value in values.items() if key not in ("rope_parameters", "rope_scaling")}
    return {
        **others,
        parameters.prefix.removesuffix("."): {**kept, **said},
        "original_max_position_embeddings": original,
    }


def _family(raw: Mapping[str, Any], values: Mapping[str, Any], file: Path) -> tuple[str, Family]:
    supported = ", ".join(FAMILIES)
    names = raw.get("architectures") or values.get("architectures")
    if names is None:
        model_type = raw.get("model_type") or values.get("model_type")
        names = [next((name for name, family in FAMILIES.items() if family.model_type == model_type), model_type)]
    if not isinstance(names, list):
        raise ModelError(f"{file}: architectures is {names!r}; a list with one of {supported} is needed")
    for name in names:
        if name in FAMILIES:
            model_type, own = raw.get("model_type"), FAMILIES[name].model_type
            if model_type not in (None, own):  # transformers goes by this one
                raise ModelError(f"{file}: model_type is {model_type!r}, but that of {name} is {own!r}; one is wrong")
            return name, FAMILIES[name]
    raise ModelError(f"{file}: architecture {', '.join(map(str, names))} is not supported; supported are {supported}")


def _stop_ids(directory: Path, values: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    ids = None
    if generation.exists():
        ids = read_json(generation).get("eos_token_id")
        if ids is not None:
            file = generation
    if ids is None:
        ids = values.get("eos_token_id")
    if ids is None:
        return ()
    listed = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in listed):
        raise ModelError(f"{file}: eos_token_id is {ids!r}; a token id or a list of them is needed")
    return tuple(dict.fromkeys(listed))


def _model_config(values: Values, architecture: str, family: Family, stop_ids: tuple[int, ...]) -> ModelConfig:
    values.choice("hidden_act", ("silu", "swish"), default="silu")  # two names of one
    if not values.flag("is_causal", default=True):
        raise values.error("is_causal", "is false; a model that sees what is still to come writes no text")
    hidden_size = values.integer("hidden_size")
    num_layers = values.integer("num_hidden_layers")
    num_q_heads = values.integer("num_attention_heads")
    if "num_key_value_heads" not in values.values:
        raise values.error("num_key_value_heads", "is missing")
    num_kv_heads = values.integer("num_key_value_heads", default=num_q_heads)
    if num_q_heads % num_kv_heads:
        raise values.error(
            "num_attention_heads", f"is {num_q_heads}, not a multiple of num_key_value_heads {num_kv_heads}"
        )
    # In some families it is 128 where it is left out, which was never the custom.
    follows = not family.qk_norm or "head_dim" in family.defaults
    head_dim = values.integer("head_dim", default=hidden_size // num_q_heads if follows else None)
    if head_dim % 2:
        raise values.error("head_dim", f"is {head_dim}; rotary embeddings need an even one")
    max_position_embeddings = values.integer("max_position_embeddings")
    rope = _rope(values, max_position_embeddings, axes=family.vision)
    if family.vision:
        rope = replace(rope, mrope_section=_mrope_section(values))
    context_window = max_position_embeddings
    if rope.kind == "yarn":  # directories may give the length before or after the extension
        context_window = max(context_window, int(rope.factor * rope.original_max_position_embeddings))
    tie_word_embeddings = values.flag("tie_word_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=values.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=values.integer("intermediate_size"),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=values.number("rms_norm_eps"),
        rope=rope,
        context_window=context_window,
        sliding_windows=_sliding_windows(values, family, num_layers),
        qkv_bias=_bias(values, family.qkv_bias),
        o_bias=_bias(values, family.o_bias),
        mlp_bias=_bias(values, family.mlp_bias),
        qk_norm=family.qk_norm,
        tie_word_embeddings=tie_word_embeddings,
        dtype=_dtype(values),
        stop_ids=stop_ids,
        quantization=read_quantization(values),
        mixture=_mixture(values, family, num_layers) if family.mixture else None,
        vision=read_vision_config(
            values, hidden_size=hidden_size, num_layers=num_layers, vocab_size=values.integer("vocab_size")
        )
        if family.vision
        else None,
    )


def _mixture(values: Values, family: Family, num_layers: int) -> Mixture | None:
    """None where every layer is dense."""
    key = "num_experts" if values.values.get("num_experts") is not None else "num_local_experts"  # transformers 5
    num_experts = values.integer(key, minimum=0)
    step = values.integer("decoder_sparse_step", default=1)
    dense = values.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise values.error("mlp_only_layers", f"is {dense!r}; a list of layer numbers is needed")
    layers = frozenset(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)
    if not num_experts or not layers:
        return None
    top_k = values.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise values.error("num_experts_per_tok", f"is {top_k}, more than the {num_experts} experts there are")
    normalize = values.flag("norm_topk_prob")
    if family.vision and not normalize:
        raise values.error("norm_topk_prob", "is false; in this architecture the weights of a token's experts sum to 1")
    return Mixture(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=values.integer("moe_intermediate_size"),
        normalize=normalize,
        layers=layers,
    )


def _bias(values: Values, bias: bool | str) -> bool:
    return values.flag(bias) if isinstance(bias, str) else bias


def _dtype(values: Values) -> str | None:
    key = "dtype" if values.values.get("dtype") is not None else "torch_dtype"  # the second until transformers 4.56
    dtype = values.values.get(key)
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
    if dtype is None or dtype in DTYPES:
        return dtype
    raise values.error(key, f"is {dtype!r}; supported are {', '.join(DTYPES)}")


def _sliding_windows(values: Values, family: Family, num_layers: int) -> tuple[int, ...]:
    layer_types = values.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not set(layer_types) <= {"full_attention", "sliding_attention"}
    ):
        raise values.error("layer_types", f"is not a list of {num_layers} of full_attention, sliding_attention")
    is_used = family.windowed == "all" or (family.windowed != "no" and values.flag("use_sliding_window"))
    window = values.integer("sliding_window") if is_used and values.values["sliding_window"] is not None else 0
    if family.windowed != "some":
        other = "full_attention" if window else "sliding_attention"
        if layer_types is not None and other in layer_types:
            raise values.error("layer_types", f"has {other}; this architecture attends alike in all layers")
        return (window,) * num_layers
    if layer_types is not None:
        if not is_used and "sliding_attention" in layer_types:
            raise values.error("layer_types", "has sliding_attention, but use_sliding_window is not true")
        return tuple(window if layer_type == "sliding_attention" else 0 for layer_type in layer_types)
    first = values.integer("max_window_layers", minimum=0)
    return tuple(window if layer >= first else 0 for layer in range(num_layers))


def _rope_parameters(values: Values) -> Values:
    """Both layouts: `rope_scaling` beside `rope_theta` (transformers 4), and `rope_parameters` holding all (5)."""
    found: dict[str, dict[str, Any]] = {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = values.values.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise values.error(key, f"is {parameters!r}; an object is needed")
        if any(isinstance(value, dict) for value in parameters.values()):
            raise values.error(key, "differs by layer type, which is not supported")
        if parameters:
            found[key] = parameters
    if len(found) == 2 and len({_spelled_out(parameters, values) for parameters in found.values()}) == 2:
        raise values.error("rope_scaling", "and rope_parameters say different things; leave out the wrong one")
    key, parameters = next(iter(found.items()), ("rope_scaling", {}))
    return Values(parameters, values.file, prefix=f"{key}.")


def _spelled_out(parameters: Mapping[str, Any], values: Values) -> str:
    """Equal where two objects of either layout mean the same."""
    said = {key: value for key, value in parameters.items() if value is not None}
    kind = said.pop("type", "default")
    return repr(sorted({"rope_type": kind, "rope_theta": values.values.get("rope_theta"), **said}.items()))


def _mrope_section(values: Values) -> tuple[int, int, int]:
    """They need not sum to the half head: what is too much counts for nothing, what is left turns by time."""
    inner = _rope_parameters(values)
    section = inner.values.get("mrope_section", [24, 20, 20])
    if (
        not isinstance(section, list)
        or len(section) != 3
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in section)
    ):
        raise inner.error("mrope_section", f"is {section!r}; three sizes are needed")
    if not inner.flag("mrope_interleaved", default=True):
        raise inner.error("mrope_interleaved", "is false; axes in blocks are not supported")
    time, height, width = section
    return time, height, width


def _rope(values: Values, max_position_embeddings: int, *, axes: bool) -> Rope:
    """`axes`: the family's positions may be of several axes."""
    inner = _rope_parameters(values)
    parameters = inner.values
    kind_key = "rope_type" if parameters.get("rope_type") is not None else "type"
    kind = inner.choice(kind_key, ROPE_KINDS, default="default")
    # Of families with axes transformers 4 and 5 assume different ones.
    theta = inner.optional_number("rope_theta") or values.number("rope_theta", default=None if axes else 10000.0)
    for owner in (inner, values):
        if owner.number("partial_rotary_factor", default=1.0) != 1.0:
            raise owner.error("partial_rotary_factor", "is not 1; rotating a part of each head is not supported")
    if parameters.get("mrope_section") is not None and not axes:
        raise inner.error("mrope_section", "is set; positions of several axes are not supported")
    if kind == "default":
        return Rope(kind=kind, theta=theta)
    if kind in ("linear", "dynamic"):
        return Rope(kind=kind, theta=theta, factor=inner.number("factor"))
    # A length beside the scaling object, as some directories have it, goes before the one inside.
    original = values.integer(
        "original_max_position_embeddings",
        default=inner.integer("original_max_position_embeddings", default=max_position_embeddings),
    )
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise inner.error("high_freq_factor", f"is {high}; more than low_freq_factor {low} is needed")
        return Rope(
            kind=kind,
            theta=theta,
            factor=inner.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return Rope(
        kind=kind,
        theta=theta,
        factor=inner.number("factor", default=max_position_embeddings / original),
        original_max_position_embeddings=original,
        beta_fast=inner.number("beta_fast", default=32.0),
        beta_slow=inner.number("beta_slow", default=1.0),
        truncate=inner.flag("truncate", default=True),
        attention_factor=inner.optional_number("attention_factor"),
        mscale=inner.optional_number("mscale"),
        mscale_all_dim=inner.optional_number("mscale_all_dim"),
    )
