"""Which tensors a checkpoint must hold, and what they are called.

Owns the names. All are checked by the files' headers before a byte is read: what is missing, left over, or of another
shape raises ModelError with its name. What becomes of them is `weights.py`'s.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from aiexport_edge.engine.models.checkpoint import DTYPES, Checkpoint
from aiexport_edge.engine.models.config import ModelConfig, ModelError
from aiexport_edge.engine.models.formats.fp8 import FusedWeight, find_fused
from aiexport_edge.engine.models.formats.scheme import Quantization
from aiexport_edge.engine.models.formats.stored import StoredWeight, empty_biases, find_all
from aiexport_edge.engine.models.vision_loader import PREFIX as TOWER
from aiexport_edge.engine.models.vision_loader import tower_shapes

# Products that share their input are one: the checkpoint's rows, stacked in this order.
FUSIONS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ROUTER = "mlp.gate"
KV_SCALES = ("k_scale", "v_scale")
# One tensor each for all experts of a layer, as Qwen3-VL's mixtures have them.
FUSED_GATE_UP, FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERT = re.compile(r"\.mlp\.experts\.0\.")
ROWS_AT_ONCE = 4096
HARMLESS = "rotary_emb.inv_freq"  # a table that old transformers saved; it follows from the configuration


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must hold, by its Hugging Face name."""
    return {own_name(name, config): shape for name, shape in named_shapes(config).items()}


def named_shapes(config: ModelConfig, *, has_fused_experts: bool | None = None) -> dict[str, tuple[int, ...]]:
    """The same, the decoder's by the names that they have in a model of text alone. Experts are fused in models that
    see; what quantizes those takes them apart (`has_fused_experts`).
    """
    if has_fused_experts is None:
        has_fused_experts = config.vision is not None
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    products = {
        "self_attn.q_proj": (q_rows, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_rows, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_rows, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_rows, config.o_bias),
    }
    dense = {
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    sparse = _mixture_shapes(config, has_fused_experts=has_fused_experts)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        mlp = sparse if config.mixture is not None and layer in config.mixture.layers else dense
        for product, (rows, columns, bias) in (products | mlp).items():
            shapes[f"{prefix}{product}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{product}.bias"] = (rows,)
        if mlp is sparse and config.mixture is not None and has_fused_experts:
            num_experts, expert_inner = config.mixture.num_experts, config.mixture.intermediate_size
            shapes[f"{prefix}{FUSED_GATE_UP}"] = (num_experts, 2 * expert_inner, hidden)
            shapes[f"{prefix}{FUSED_DOWN}"] = (num_experts, hidden, expert_inner)
        for norm, size in norms.items():
            shapes[f"{prefix}{norm}.weight"] = (size,)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    if config.vision is not None:
        shapes |= tower_shapes(config.vision)
    return shapes


def _mixture_shapes(config: ModelConfig, *, has_fused_experts: bool) -> dict[str, tuple[int, int, bool]]:
    """The products of a layer that is a mixture of experts."""
    mixture, hidden = config.mixture, config.hidden_size
    if mixture is None:
        return {}
    shapes = {ROUTER: (mixture.num_experts, hidden, False)}
    for expert in range(0 if has_fused_experts else mixture.num_experts):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (mixture.intermediate_size, hidden, False)
        shapes[f"mlp.experts.{expert}.up_proj"] = (mixture.intermediate_size, hidden, False)
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, mixture.intermediate_size, False)
    return shapes


@dataclass(frozen=True, slots=True)
class Found:
    """Where a model's tensors are: `names`, the checkpoint's name of every one that is stored in floats, `stored` and
    `fused` those that are quantized weights.
    """

    names: dict[str, str]
    stored: dict[str, StoredWeight]
    fused: dict[str, FusedWeight]

    @property
    def quantized_sources(self) -> list[str]:
        """The checkpoint's names of all that quantized weights are made of."""
        weights: list[StoredWeight | FusedWeight] = [*self.stored.values(), *self.fused.values()]
        return [name for weight in weights for name in weight.names]

    @property
    def has_fused_experts(self) -> bool:
        """Whether all experts of a layer are one tensor."""
        return bool(self.fused) or any(name.endswith(FUSED_DOWN) for name in self.names)


def check(checkpoint: Checkpoint, config: ModelConfig) -> Found:
    """Hold the headers against `named_shapes`. Raises ModelError naming what is missing, left over or has no place."""
    is_apart = any(EXPERT.search(name) for name in checkpoint.entries)
    expected = named_shapes(config, has_fused_experts=config.vision is not None and not is_apart)
    present = {name for name in checkpoint.entries if not name.endswith(HARMLESS)}
    present -= _kv_scales(checkpoint, config)
    names = {name: own_name(name, config) for name in expected}
    if config.tie_word_embeddings:
        if names[EMBEDDING] not in present and HEAD in present:
            names[EMBEDDING] = HEAD  # one tensor of two names: some writers keep the other one
        present.discard(HEAD if names[EMBEDDING] != HEAD else "")
    found = Found(names, {}, {})
    if config.quantization is not None:
        found = _find_quantized(checkpoint, config.quantization, names, expected)
        names = found.names
        present -= set(found.quantized_sources)
        present -= empty_biases(checkpoint, present - set(names.values()), found.stored)
    missing = [name for name, source in names.items() if source not in present]
    left_over = sorted(present - set(names.values()))
    problems = []
    if missing:
        problems.append(f"{_listed(missing)} missing{_half_merged(missing, present)}")
    if left_over:
        problems.append(f"{_listed(left_over)} not part of {config.architecture} as config.json describes it")
    if problems:
        raise ModelError(f"{checkpoint.directory}: {'; '.join(problems)}")
    for name, source in names.items():
        entry = checkpoint.entries[source]
        if entry.shape != expected[name] and not _is_transposed(name, entry.shape, expected[name]):
            raise ModelError(
                f"{entry.file}: {source} has shape {list(entry.shape)}, config.json asks for {list(expected[name])}"
            )
        if entry.dtype not in DTYPES:
            raise ModelError(f"{entry.file}: {source} is {entry.dtype}; supported are {', '.join(DTYPES)}")
    if config.tie_word_embeddings and HEAD in checkpoint.entries and names[EMBEDDING] != HEAD:
        _check_tied(checkpoint, names[EMBEDDING])
    return found


def _check_tied(checkpoint: Checkpoint, embedding: str) -> None:
    """Whether two tensors that are said to be one are. Some readers would take one of them, some each for itself."""
    rows = (torch.split(checkpoint.tensor(name), ROWS_AT_ONCE) for name in (embedding, HEAD))
    is_same = checkpoint.entries[embedding].shape == checkpoint.entries[HEAD].shape and all(
        torch.equal(one.float(), other.float()) for one, other in zip(*rows, strict=True)
    )
    if not is_same:
        raise ModelError(
            f"{checkpoint.directory}: tie_word_embeddings is true, but {HEAD} is not {embedding}; set it to false in "
            f"config.json, or take {HEAD} out"
        )


def _find_quantized(
    checkpoint: Checkpoint, quantization: Quantization, names: dict[str, str], expected: dict[str, tuple[int, ...]]
) -> Found:
    stored = find_all(checkpoint.entries, names, expected, quantization)
    fused = {}
    for name, shape in expected.items():
        if len(shape) == 3 and name.endswith((FUSED_GATE_UP, FUSED_DOWN)):
            weight = find_fused(checkpoint.entries, names[name], (shape[0], shape[1], shape[2]), quantization)
            if weight is not None:
                fused[name] = weight
    if any(weight.is_transposed for weight in fused.values()):  # of a square one the others tell
        fused = {name: replace(weight, is_transposed=True) for name, weight in fused.items()}
    left = {name: source for name, source in names.items() if name not in stored and name not in fused}
    return Found(left, stored, fused)


def _kv_scales(checkpoint: Checkpoint, config: ModelConfig) -> set[str]:
    """The scales of keys and values in FP8 that the checkpoint has. Raises ModelError for any of another shape."""
    names = (f"model.layers.{index}.self_attn.{name}" for index in range(config.num_layers) for name in KV_SCALES)
    found = {own_name(name, config) for name in names} & checkpoint.entries.keys()
    for name in found:
        entry = checkpoint.entries[name]
        if math.prod(entry.shape) not in (1, config.num_kv_heads) or entry.dtype not in DTYPES:
            raise ModelError(
                f"{entry.file}: {name} is {entry.dtype} {list(entry.shape)}; one number, or one for each of the "
                f"{config.num_kv_heads} KV heads, is needed"
            )
    return found


def own_name(name: str, config: ModelConfig) -> str:
    """A decoder's tensor in the checkpoint of a model that sees lies a level deeper."""
    if config.vision is None or name.startswith(TOWER) or not name.startswith("model."):
        return name
    return f"model.language_model.{name.removeprefix('model.')}"


def _is_transposed(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Fused experts come in both orders: as they were released, and as transformers 5 has them in memory."""
    return name.endswith((FUSED_GATE_UP, FUSED_DOWN)) and shape == (expected[0], expected[2], expected[1])


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    if len(names) > 8:
        shown += f" and {len(names) - 8} more"
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _half_merged(missing: list[str], present: set[str]) -> str:
    """Say so where a fused group has some of its parts: a torn checkpoint rather than another architecture."""
    for name in missing:
        for fused, parts in FUSIONS.items():
            for part in parts:
                if f".{part}." in name:
                    found = [other for other in parts if name.replace(part, other) in present]
                    if found:
                        return f" (of {name.replace(part, fused)} only {', '.join(found)} found)"
    return ""
