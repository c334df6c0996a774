"""Estimates of memory against what loading says, and the presets that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import save

from aiexport_edge.engine.check import check, main
from aiexport_edge.engine.models.config import ModelConfig, ModelError
from aiexport_edge.engine.models.loader import load_model
from aiexport_edge.engine.models.memory import CARD_MIB, Served, card_memory, num_parameters, weight_bytes
from aiexport_edge.engine.models.presets import (
    CARD_QUANTIZATIONS,
    CHOICES,
    PUBLISHED,
    TIERS,
    preset,
    presets,
    published,
    to_table,
    to_toml,
)
from aiexport_edge.proto.config import load, source_directory
from aiexport_edge.proto.config_models import QUANTIZATIONS

FILES = Path(__file__).resolve().parents[3] / "deploy" / "presets"
# As the models' pages on Hugging Face count them, in billions.
PARAMETERS = {"2B": 2.13, "4B": 4.44, "8B": 8.77, "32B": 33.4, "30B-A3B": 31.07, "235B-A22B": 235.7}


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_models_have_the_parameters_that_are_known(size: str) -> None:
    config = published(f"Qwen3-VL-{size}-Instruct")
    assert config is not None
    assert config.vision is not None
    assert config.context_window == 262_144
    assert num_parameters(config) / 1e9 == pytest.approx(PARAMETERS[size], rel=2e-3)


@pytest.mark.parametrize("name", ["llama3", "llama_biases", "qwen2", "qwen3", "qwen3_moe_mixed"])
def test_weights_are_what_loading_counts(name: str, tmp_path: Path) -> None:
    model = load_model(save(name, tmp_path), dtype="float32")
    assert weight_bytes(model.config, "none", 4) == model.weight_bytes


@pytest.mark.parametrize("quantize", [name for name in QUANTIZATIONS if name != "none"])
def test_rounded_weights_are_what_loading_counts_and_their_scales(quantize: str) -> None:
    model = load_model(source_directory("demo"), quantize=quantize)
    estimate = weight_bytes(model.config, quantize, model.dtype.itemsize)
    assert model.weight_bytes <= estimate <= 1.07 * model.weight_bytes


def test_cards_take_the_roundings_that_loading_takes_there() -> None:
    """So that no preset asks for what a start would refuse: loading refuses a rounding before it touches a card."""
    for quantize in QUANTIZATIONS:
        refused = False
        try:
            load_model(source_directory("demo"), quantize=quantize, device=torch.device("cuda"))
        except ModelError as error:
            refused = "quantize" in str(error)
        except (RuntimeError, AssertionError):  # there is no card
            pass
        assert refused == (quantize not in CARD_QUANTIZATIONS), quantize


@pytest.mark.parametrize("card", CARD_MIB)
def test_a_preset_fits_its_card_and_no_longer_contexts_do(card: int) -> None:
    chosen = preset(card)
    assert chosen.memory.fits
    assert chosen.memory.pool_bytes > 0.05 * chosen.memory.card_bytes
    vendor = {tier.id: tier.window for tier in TIERS}
    for each in chosen.tiers:
        model = next(model for model in chosen.memory.models if model.name == each.model)
        assert each.window == vendor[each.tier.id] or each.window > 0.94 * model.pool_tokens - 1000


def test_presets_have_the_vendors_ids_families_contexts_and_prices() -> None:
    """The same as the default configuration's."""
    defaults = load(None, Path("/nowhere"))
    said = [
        (tier.id, tier.family, tier.display_name, tier.input_per_million, tier.output_per_million, tier.created_at)
        for tier in TIERS
    ]
    assert said == [
        (
            model.id,
            model.family,
            model.display_name,
            model.input_per_million,
            model.output_per_million,
            model.created_at.isoformat().replace("+00:00", "Z"),
        )
        for model in defaults.models
    ]
    assert [tier.window for tier in TIERS] == [200_000, 200_000, 100_000]


@pytest.mark.parametrize("card", CARD_MIB)
def test_the_files_are_current_and_pass_the_check(card: int) -> None:
    file = FILES / f"card-{card}.toml"
    assert file.read_text() == to_toml(preset(card)), f"write it anew: aiexport-edge config preset --card {card}"
    document = check(load(file, Path("/nowhere")), card)
    assert document["ok"], document["problem"]


def test_the_table_is_current() -> None:
    assert to_table(list(presets())) in (FILES / "README.md").read_text(), "write it anew: aiexport-edge config preset"


def test_every_choice_is_of_published_models_in_what_cards_have() -> None:
    assert set(CHOICES) == set(CARD_MIB)
    for choice in CHOICES.values():
        for size, quantize in choice:
            config = published(f"Qwen3-VL-{size}-Instruct")
            assert config is not None
            assert quantize in CARD_QUANTIZATIONS


def test_what_does_not_fit_says_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "edge.toml"
    window = preset(24).tiers[0].window
    file.write_text(to_toml(preset(24)).replace(f"context_window = {window}", "context_window = 200000", 1))
    assert main(["--config", str(file), "--card", "24"]) == 1
    said = capsys.readouterr().out
    assert "models.0.context_window: is 200000 tokens of Qwen3-VL-8B-Instruct" in said
    assert "the page pool holds " in said
    assert "set context_window = " in said
    assert main(["--config", str(file), "--card", "8"]) == 1
    assert "serve smaller models" in capsys.readouterr().out
    assert main(["--config", str(file), "--card", "141"]) == 0
    assert main(["--config", str(file)]) == 0


def test_pictures_take_less_where_they_are_made_smaller(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(to_toml(preset(8)))
    small = check(load(file, tmp_path), 8)["card"]["picture_bytes"]
    file.write_text(to_toml(preset(8)).replace("max_tokens = 4096", "max_tokens = 8192"))
    assert check(load(file, tmp_path), 8)["card"]["picture_bytes"] > 1.6 * small


def test_memory_of_one_request_is_whole_pages() -> None:
    config = ModelConfig.load(PUBLISHED / "Qwen3-VL-2B-Instruct")
    memory = card_memory(
        [Served("m", config, "none", 1000)], 24 << 30, max_num_running=8, max_step_tokens=512, memory_share=0.5
    )
    (model,) = memory.models
    assert model.token_bytes == 28 * 2 * 8 * 128 * 2
    assert model.request_bytes == 63 * 16 * model.token_bytes
    assert memory.pool_bytes - 2 * 16 * model.token_bytes < model.pool_tokens * model.token_bytes < memory.pool_bytes
