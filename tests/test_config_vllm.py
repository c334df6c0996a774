"""`backend` and `[models.vllm]`: defaults, what a file may say, what it is told where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiexport_edge.proto.config import Config, ConfigError, check_sources, load
from aiexport_edge.proto.config_text import effective, to_toml
from aiexport_edge.proto.config_vllm import VllmConfig

MODEL = '[[models]]\nids = ["big"]\nfamily = "opus"\nsource = "demo"\n'


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    return load(file, tmp_path / "state")


def test_the_native_backend_is_the_default(tmp_path: Path) -> None:
    config = load(None, tmp_path)
    assert [model.vllm for model in config.models] == [None] * 3
    assert [weights.vllm for weights in config.weights] == [None]
    assert {model["backend"] for model in effective(config)["models"]} == {"native"}


def test_defaults_of_vllm(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL + 'backend = "vllm"\n')
    expected = VllmConfig(None, 1, 1, 1, "auto", (), 0.9, 0, "", None, "auto")
    assert config.models[0].vllm == config.weights[0].vllm == expected
    assert not config.weights[0].deterministic  # though the demo model's default is true


def test_what_is_written_holds_and_is_shown(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        MODEL
        + 'backend = "vllm"\n'
        + '[models.vllm]\npython = "venv/bin/python"\ntensor_parallel = 4\npipeline_parallel = 2\ndata_parallel = 3\n'
        + 'distributed = "ray"\nmemory_share = 0.8\nkv_cache_bytes = "2GiB"\nquantization = "fp8"\neager = true\n'
        + 'attention = "aiexport-edge"\n'
        + MODEL.replace("big", "small"),
    )
    python = tmp_path / "venv/bin/python"
    expected = VllmConfig(python, 4, 2, 3, "ray", (), 0.8, 2 << 30, "fp8", True, "aiexport-edge")
    assert [model.vllm for model in config.models] == [expected, None]
    assert [weights.name for weights in config.weights] == ["demo", "demo-2"]
    again = read(tmp_path, to_toml(config))
    assert (again.models, again.weights) == (config.models, config.weights)


def test_two_models_share_weights_only_where_all_is_alike(tmp_path: Path) -> None:
    same = MODEL + 'backend = "vllm"\n'
    alias, other = same.replace("big", "alias"), same.replace("big", "other")
    config = read(tmp_path, same + alias + other + "[models.vllm]\ngpus = [1]\n")
    assert [model.weights for model in config.models] == ["demo", "demo", "demo-2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('backend = "vlm"\n', "models.0.backend: must be one of native, vllm, not 'vlm'; did you mean \"vllm\"?"),
        ("[models.vllm]\ntensor_parallel = 2\n", 'models.0.vllm: is there, but backend is not "vllm"'),
        ('backend = "vllm"\ndeterministic = true\n', "models.0.deterministic: cannot be promised by vLLM"),
        ('backend = "vllm"\nquantize = "int8"\n', "models.0.quantize: is of the native backend"),
        ('backend = "vllm"\n[models.vllm]\ntensor_paralel = 2\n', 'did you mean "tensor_parallel"?'),
        ('backend = "vllm"\n[models.vllm]\ngpus = [0, 0]\n', "models.0.vllm.gpus: names a card twice"),
        ('backend = "vllm"\n[models.vllm]\ngpus = [0]\ntensor_parallel = 2\n', "models.0.vllm.gpus: lists 1, but"),
        (
            'backend = "vllm"\n[models.vllm]\ngpus = [0]\ndistributed = "ray"\n',
            "models.0.vllm.gpus: is for one machine",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        read(tmp_path, MODEL + text)
    assert problem in str(wrong.value)


def test_an_engine_that_is_to_be_deterministic_as_a_whole_refuses_vllm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        read(tmp_path, "[engine]\ndeterministic = true\n" + MODEL + 'backend = "vllm"\n')
    assert "set deterministic = false for this model" in str(wrong.value)


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL + 'backend = "vllm"\n[models.vllm]\npython = "nowhere/python"\n')
    with pytest.raises(ConfigError) as wrong:
        check_sources(config)
    assert "models.0.vllm.python: there is no program" in str(wrong.value)
