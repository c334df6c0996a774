"""Positions beyond the window that a model was trained at: every scaling of every family that uses it, and the
operator's own, against transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import DYNAMIC_ROPE, LINEAR_ROPE, LLAMA3_ROPE, SHAPE, YARN_ROPE, PreTrainedModel, prompts
from support.tiny_vision import save_vision

from aiexport_edge.engine.core.kv_memory import KVMemory, PoolShape
from aiexport_edge.engine.models.config import ModelConfig, ModelError, Yarn
from aiexport_edge.engine.models.decoder import Batch
from aiexport_edge.engine.models.loader import LoadedModel, load_model
from aiexport_edge.engine.models.revision import model_revision

LENGTH = 240  # past the 64 positions that the scalings extend
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 24, **MOE}),
}
# By the models that are published: Llama 3.1 and its kin; Qwen and Mistral directories that people extend.
SCALINGS = [
    ("llama", LINEAR_ROPE),
    ("llama", DYNAMIC_ROPE),
    ("llama", LLAMA3_ROPE),
    ("llama", YARN_ROPE),
    ("llama", YARN_ROPE | {"beta_fast": 24.0, "beta_slow": 1.5, "attention_factor": 1.1}),
    ("mistral", LINEAR_ROPE),
    ("mistral", YARN_ROPE),
    ("qwen2", YARN_ROPE),
    ("qwen3", YARN_ROPE),
    ("qwen3", LINEAR_ROPE),
    ("qwen3_moe", YARN_ROPE),
]


def make(family: str, rope: dict[str, Any] | None, **changes: Any) -> PreTrainedModel:
    """A small random model; `rope` None: without a scaling."""
    name, shape = FAMILIES[family]
    parameters = {"rope_type": "default", "rope_theta": 10000.0} if rope is None else dict(rope)
    config = getattr(transformers, name)(**SHAPE | shape | changes, rope_parameters=parameters)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = None, 1, 2
    auto: Any = transformers.AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.6 / parameter.shape[1] ** 0.5))
    return model


@torch.inference_mode()
def every_logit(model: LoadedModel, ids: list[int], positions: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [T, vocabulary], in two chunks; `positions` [3, T] are those of text by themselves."""
    has_axes = positions is not None
    if positions is None:
        positions = torch.arange(len(ids)).repeat(3, 1)
    config = model.config
    page_bytes = len(ids) * config.kv_bytes_per_token(4)
    memory = KVMemory(PoolShape(page_bytes, 2, (len(ids),)), torch.device("cpu"))
    caches = memory.layers(
        0,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )
    logits = []
    for start, end in ((0, 100), (100, len(ids))):
        batch = Batch(
            input_ids=torch.tensor(ids[start:end]),
            inputs_embeds=None,
            positions=positions[:, start:end].contiguous(),
            slots=torch.arange(start, end) + len(ids),
            block_tables=torch.tensor([[1]], dtype=torch.int32),
            query_start_loc=torch.tensor([0, end - start], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            rows=None,
            has_axes=has_axes,
        )
        logits.append(model.decoder.logits(model.decoder.forward(batch, caches)))
    return torch.cat(logits)


@pytest.mark.parametrize(
    ("family", "rope"), SCALINGS, ids=[f"{family}-{rope['rope_type']}" for family, rope in SCALINGS]
)
@torch.inference_mode()
def test_logits_beyond_the_original_window(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(family, rope)
    theirs.save_pretrained(tmp_path)
    ids = prompts([LENGTH])[0]
    ours = every_logit(load_model(tmp_path, dtype="float32"), ids)
    torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_an_operators_yarn_is_what_transformers_computes(family: str, tmp_path: Path) -> None:
    """The same weights twice: saved without a scaling and extended here, and made with the scaling there."""
    make(family, None, max_position_embeddings=64).save_pretrained(tmp_path)
    theirs = make(family, YARN_ROPE)
    ids = prompts([LENGTH])[0]
    model = load_model(tmp_path, dtype="float32", yarn=Yarn(4.0), context_window=LENGTH)
    assert model.config.context_window == 256
    torch.testing.assert_close(every_logit(model, ids), theirs(torch.tensor([ids])).logits[0], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_yarn_over_positions_of_three_axes(tmp_path: Path) -> None:
    """Qwen3-VL, as its makers say that it is extended: the sections of axes stay, by each of which the scaled
    frequencies turn."""
    save_vision("qwen3_vl", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, **scaling}
    auto: Any = transformers.Qwen3VLForConditionalGeneration
    theirs = auto.from_pretrained(tmp_path, config=config, dtype=torch.float32).eval()
    ids = prompts([LENGTH], vocabulary=300)[0]
    steps = torch.tensor([[1, 2, 3]]).T * torch.arange(LENGTH) // torch.tensor([[3, 2, 3]]).T
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, LENGTH, dtype=torch.int64)}
    hidden = theirs.model.language_model(**inputs, position_ids=steps[:, None]).last_hidden_state
    model = load_model(tmp_path, dtype="float32", yarn=Yarn(4.0, 64))
    assert model.config.rope.mrope_section is not None
    torch.testing.assert_close(every_logit(model, ids, steps), theirs.lm_head(hidden)[0], rtol=0, atol=1e-4)
    plain = every_logit(load_model(tmp_path, dtype="float32"), ids, steps)
    assert (plain - theirs.lm_head(hidden)[0]).abs().max() > 0.1, "the scaling matters"


def test_an_operators_yarn_over_a_window_that_is_said(tmp_path: Path) -> None:
    """Qwen3's directories say 40960 positions, and are extended from the 32768 that it was trained at."""
    make("qwen3", None, max_position_embeddings=80).save_pretrained(tmp_path)
    assert ModelConfig.load(tmp_path).context_window == 80
    extended = ModelConfig.load(tmp_path, yarn=Yarn(4.0, 64))
    assert (extended.context_window, extended.rope.original_max_position_embeddings) == (256, 64)
    assert extended.rope == ModelConfig.load(_saved(make("qwen3", YARN_ROPE), tmp_path / "theirs")).rope


def test_a_yarn_in_the_directory_is_replaced_and_other_scalings_are_not(tmp_path: Path) -> None:
    yarn = _saved(make("qwen3", YARN_ROPE), tmp_path / "yarn")
    assert ModelConfig.load(yarn, yarn=Yarn(8.0, 64)).context_window == 512
    llama = _saved(make("llama", LLAMA3_ROPE), tmp_path / "llama")
    with pytest.raises(ModelError, match=r"llama3.*has a scaling of its own; leave rope_scaling out"):
        ModelConfig.load(llama, yarn=Yarn(2.0))


def test_prefixes_of_two_scalings_are_kept_apart(tmp_path: Path) -> None:
    _saved(make("qwen3", None), tmp_path)
    revisions = {model_revision(tmp_path, yarn=yarn) for yarn in (None, Yarn(2.0), Yarn(4.0), Yarn(4.0, 64))}
    assert len(revisions) == 4


def _saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory
