"""Rounded weights against the same model's own dtype, on models that were trained: what rounding costs is here."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.decoding import logits_of
from support.driver import Driver
from support.tiny_models import save, shared_data

from aiexport_edge.engine.core.loading import load
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.engine.models.loader import load_model
from aiexport_edge.engine.models.revision import model_revision

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo" / "model"
NUM_TOKENS, NUM_TEXTS = 96, 3

# Of the next token's distribution: mean Kullback-Leibler divergence in nats, and how often the likeliest stays so. The
# smaller model is 64 wide and has nothing to spare.
LIMITS = {
    ("model", "int8"): (0.003, 0.97),
    ("model", "int4"): (0.1, 0.87),
    ("model", "fp8"): (0.012, 0.95),
    ("stories260K", "int8"): (0.004, 0.94),
    ("stories260K", "int4"): (0.25, 0.72),
    ("stories260K", "fp8"): (0.025, 0.90),
}


@pytest.fixture(params=["demo", "stories260K"])
def directory(request: pytest.FixtureRequest) -> Path:
    return DEMO if request.param == "demo" else shared_data() / "models" / "stories260K"


@functools.cache
def drawn_texts(directory: Path) -> list[torch.Tensor]:
    """Texts of the model's own, drawn at temperature 1: what it was trained on looks like them."""
    model = load_model(directory)
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(NUM_TEXTS):
        ids = torch.randint(10, model.config.vocab_size // 2, (1,), generator=generator)
        while ids.shape[0] < NUM_TOKENS:
            probabilities = torch.softmax(logits_of(model, ids)[-1], dim=-1)
            ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=generator)))
        texts.append(ids)
    return texts


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_distributions_hardly_change(directory: Path, quantize: str) -> None:
    plain = load_model(directory)
    rounded = load_model(directory, quantize=quantize)
    divergence, agreement = [], []
    for ids in drawn_texts(directory):
        before = torch.log_softmax(logits_of(plain, ids), dim=-1)
        after = torch.log_softmax(logits_of(rounded, ids), dim=-1)
        divergence.append((before.exp() * (before - after)).sum(-1).mean())
        agreement.append((before.argmax(-1) == after.argmax(-1)).float().mean())
    most_divergence, least_agreement = LIMITS[directory.name, quantize]
    assert torch.stack(divergence).mean() <= most_divergence
    assert torch.stack(agreement).mean() >= least_agreement


def test_rounded_weights_are_smaller() -> None:
    """The vision tower is not rounded."""
    plain, rounded = load_model(DEMO), load_model(DEMO, quantize="int8")
    assert rounded.weight_bytes < 0.66 * plain.weight_bytes


def test_rounding_is_part_of_the_revision() -> None:
    assert model_revision(DEMO, quantize="int8") != model_revision(DEMO)
    assert model_revision(DEMO, quantize="none") == model_revision(DEMO)


def test_a_core_rounds_what_its_configuration_says() -> None:
    models = [CoreModel(name, str(DEMO), "auto", 256, True, "", quantize=name) for name in ("none", "int8")]
    runner = load(CoreConfig(models, "cpu", 0, 64 << 20, 4, 64, 1, 0.0))
    assert runner.weight_bytes[1] < 0.66 * runner.weight_bytes[0]


def test_what_a_device_cannot_multiply_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = CoreModel("fp8", str(DEMO), "auto", 256, True, "", quantize="fp8")
    load(CoreConfig([model], "cpu", 0, 64 << 20, 4, 64, 1, 0.0))
    assert "model fp8: 24 of 25 products have quantized weights" in capsys.readouterr().err


def test_keys_and_values_in_fp8(directory: Path) -> None:
    """What it costs, as above; a token takes half the bytes of bfloat16, a quarter of float32."""
    plain, coded = load_model(directory), load_model(directory, kv_cache_dtype="fp8")
    assert coded.kv_dtype.itemsize == 1
    divergence = []
    for ids in drawn_texts(directory):
        before = torch.log_softmax(logits_of(plain, ids), dim=-1)
        after = torch.log_softmax(logits_of(coded, ids), dim=-1)
        divergence.append((before.exp() * (before - after)).sum(-1).mean())
    assert torch.stack(divergence).mean() <= (0.01 if directory == DEMO else 0.05)


def test_a_core_keeps_keys_and_values_as_its_configuration_says() -> None:
    """Prefilled in chunks, cached and decoded by recorded programs: greedy text stays that of one chunk."""
    texts = {}
    for kv_cache_dtype, chunk in (("auto", 64), ("fp8", 64), ("fp8", 7)):
        model = CoreModel("demo", str(DEMO), "auto", 256, True, "", kv_cache_dtype=kv_cache_dtype)
        runner = load(CoreConfig([model], "cpu", 0, 8 << 20, 4, 64, 1, 0.0), keep_logits=True)
        driver = Driver(runner)
        request = driver.add(list(range(40, 70)))
        driver.run([request], 24, chunk)
        texts[kv_cache_dtype, chunk] = driver.outcome(request)[0]
        if kv_cache_dtype == "fp8":
            token_bytes = load_model(DEMO).config.kv_bytes_per_token(1)
            assert runner.tokens_per_page[0] == runner.page_bytes // token_bytes == 16
    assert texts["fp8", 64] == texts["fp8", 7]


def test_scales_of_keys_and_values_come_from_the_checkpoint(tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    file = tmp_path / "model.safetensors"
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.full(shape, 0.05)
        for layer, shape in enumerate([(1,), (), (2,)])
        for name in ("k_scale", "v_scale")
    }
    save_file(load_file(file) | scales, file)
    coded = load_model(tmp_path, kv_cache_dtype="fp8")
    assert [layer.k_scale.tolist() for layer in coded.decoder.layers if layer.k_scale is not None] == [
        pytest.approx([0.05, 0.05])
    ] * 3
    assert load_model(tmp_path).decoder.layers[0].k_scale is None
    ids = torch.arange(3, 60)
    exact = logits_of(load_model(tmp_path), ids)
    assert (logits_of(coded, ids) - exact).norm() <= 0.15 * exact.norm()
    scales["model.layers.1.self_attn.v_scale"] = torch.tensor(0.0)
    save_file(load_file(file) | scales, file)
    with pytest.raises(ModelError, match=r"v_scale is \[0.0, 0.0\]; positive numbers are needed"):
        load_model(tmp_path, kv_cache_dtype="fp8")
    scales["model.layers.1.self_attn.v_scale"] = torch.ones(3)
    save_file(load_file(file) | scales, file)
    with pytest.raises(ModelError, match="v_scale is F32"):
        load_model(tmp_path)


def test_the_form_of_keys_and_values_is_part_of_the_revision() -> None:
    assert model_revision(DEMO, kv_cache_dtype="fp8") != model_revision(DEMO)
    assert model_revision(DEMO, kv_cache_dtype="auto") == model_revision(DEMO)
