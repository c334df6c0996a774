"""`rope_scaling` and a context window beyond the model's own: what is read, refused, and shown again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiexport_edge.engine.models.config import ModelConfig, Yarn
from aiexport_edge.engine.models.window import served_window, yarn_of
from aiexport_edge.proto.config import Config, ConfigError, load, source_directory
from aiexport_edge.proto.config_rope import RopeScaling
from aiexport_edge.proto.config_text import to_toml

MODEL = '[[models]]\nids = ["m"]\nfamily = "opus"\nsource = "model"\n'
SCALING = 'rope_scaling = { rope_type = "yarn", factor = 4.0, original_max_position_embeddings = 32768 }\n'


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "edge.toml"
    file.write_text(text)
    return load(file, tmp_path / "state")


def test_is_read_and_shown_again(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL + SCALING)
    assert config.weights[0].rope_scaling == RopeScaling(4.0, 32768)
    again = read(tmp_path, to_toml(config))
    assert again.models == config.models
    assert again.weights == config.weights
    assert yarn_of(again.weights[0]) == Yarn(4.0, 32768)
    assert yarn_of(read(tmp_path, MODEL).weights[0]) is None


def test_two_scalings_are_two_sets_of_weights(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL + SCALING + MODEL.replace('"m"', '"n"'))
    assert len(config.weights) == 2


@pytest.mark.parametrize(
    ("scaling", "complaint"),
    [
        ('"yarn"', 'must be a table such as { rope_type = "yarn", factor = 4.0 }'),
        ("{ factor = 4.0 }", 'must have rope_type = "yarn"'),
        ('{ rope_type = "linear", factor = 4.0 }', 'must have rope_type = "yarn"'),
        ('{ rope_type = "yarn" }', "has no factor"),
        ('{ rope_type = "yarn", factor = 0.5 }', "has a factor that must be a number from 1 to 256, not 0.5"),
        ('{ rope_type = "yarn", factr = 2 }', 'has an unknown key "factr"; did you mean "factor"?'),
        (
            '{ rope_type = "yarn", factor = 2, original_max_position_embeddings = -1 }',
            "has a original_max_position_embeddings that must be a whole number",
        ),
    ],
)
def test_refusals(scaling: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, MODEL + f"rope_scaling = {scaling}\n")
    assert refused.value.key == "models.0.rope_scaling"
    assert complaint in refused.value.problem


def test_a_window_beyond_the_models_own_is_refused_with_a_remedy(tmp_path: Path) -> None:
    directory = source_directory("demo")
    (tmp_path / "model").mkdir()
    values = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))

    def window(text: str) -> int:
        config = read(tmp_path, MODEL + text)
        weights = config.weights[0]
        model = ModelConfig.load(weights.source, yarn=yarn_of(weights))
        return served_window(config, weights, model)

    assert window("") == 4096
    assert window("context_window = 100\n") == 100
    with pytest.raises(
        ConfigError, match=r"models\.0\.context_window: is 10000, but model is made for 4096.*factor = 2\.5"
    ):
        window("context_window = 10000\n")
    yarn = 'rope_scaling = { rope_type = "yarn", factor = 2.5 }\n'
    assert window("context_window = 10000\n" + yarn) == 10000
    assert window(yarn) == 10240
    with pytest.raises(ConfigError, match="raise the factor of rope_scaling"):
        window("context_window = 10241\n" + yarn)
