"""Loading: one file or shards, fused and converted; everything that does not fit is refused by name."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.driver import Driver, load_runner
from support.tiny_models import greedy, make, prompts, save

from aiexport_edge.engine.models import checkpoint as checkpoint_module
from aiexport_edge.engine.models.checkpoint import open_checkpoint
from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.engine.models.loader import load_model
from aiexport_edge.engine.models.weights import serving_dtype
from aiexport_edge.kernels.linear import supports_bf16

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def generate(directory: Path, prompt: list[int]) -> list[int]:
    driver = Driver(load_runner(directory))
    request = driver.add(prompt)
    driver.run([request], 16)
    return driver.outcome(request)[0]


def test_shards_are_one_model(tmp_path: Path) -> None:
    save("qwen2_window", tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    prompt = prompts([30])[0]
    assert generate(tmp_path, prompt) == greedy(make("qwen2_window"), prompt, 16)[0]


def test_float16_is_served_as_float32_where_asked(tmp_path: Path) -> None:
    save("llama3", tmp_path, dtype=torch.float16)
    prompt = prompts([30])[0]
    assert generate(tmp_path, prompt) == greedy(make("llama3", torch.float16).float(), prompt, 16)[0]


def test_serving_dtype() -> None:
    half = torch.bfloat16 if supports_bf16() else torch.float32
    assert serving_dtype("auto", torch.float32, CPU) == torch.float32
    assert serving_dtype("auto", torch.float16, CPU) == half
    assert serving_dtype("auto", torch.bfloat16, CPU) == half
    assert serving_dtype("float32", torch.bfloat16, CPU) == torch.float32
    with pytest.raises(ModelError, match="float16 is not served on a CPU"):
        serving_dtype("float16", torch.float16, CPU)


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    save("llama2", tmp_path)
    reports: list[tuple[int, int]] = []
    model = load_model(tmp_path, progress=lambda done, total: reports.append((done, total)))
    totals = {total for _, total in reports}
    assert totals == {model.weight_bytes}
    assert reports[0][0] == 0
    assert reports[-1][0] == model.weight_bytes
    assert reports == sorted(reports)
    assert len(reports) > 15


def test_old_rotary_tables_and_a_tied_head_are_harmless(tmp_path: Path) -> None:
    save("llama3", tmp_path)
    prompt = prompts([20])[0]
    expected = generate(tmp_path, prompt)
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert generate(tmp_path, prompt) == expected
    edit(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))  # tied weights under their other name
    assert generate(tmp_path, prompt) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            "model.layers.1.self_attn.k_proj.weight is missing (of model.layers.1.self_attn.qkv_proj.weight only "
            "self_attn.q_proj, self_attn.v_proj found)",
        ),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "model.layers.0.self_attn.q_proj.bias is not part of LlamaForCausalLM as config.json describes it",
        ),
        (
            lambda t: t.update({f"model.layers.9.extra{i}": torch.zeros(1) for i in range(12)}),
            "and 4 more are not part of",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(149, 64)}),
            "model.layers.2.mlp.up_proj.weight has shape [149, 64], config.json asks for [150, 64]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            "model.norm.weight is I8; supported are F32, F16, BF16",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[Tensors], object], complaint: str, tmp_path: Path) -> None:
    save("llama2", tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert complaint in str(caught.value)


def test_a_tied_head_that_is_another_is_refused(tmp_path: Path) -> None:
    """Some readers would take one of the two, some each for itself."""
    save("qwen3", tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(tmp_path)
    edit(tmp_path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ModelError, match=r"is true, but lm_head\.weight is not model\.embed_tokens"):
        load_model(tmp_path)


def test_files_that_are_absent_or_broken(tmp_path: Path) -> None:
    save("llama2", tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-100], b"", b"\xff" * 100):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors file"):
            load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "nowhere")


def test_one_file_goes_before_the_shards_of_an_older_save(tmp_path: Path) -> None:
    save("llama2", tmp_path, max_shard_size="50KB")
    save("llama2", tmp_path / "new")
    edit(tmp_path / "new", lambda t: t["lm_head.weight"].neg_())
    expected = generate(tmp_path / "new", prompts([20])[0])
    assert generate(tmp_path, prompts([20])[0]) != expected
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert generate(tmp_path, prompts([20])[0]) == expected


def test_an_index_that_does_not_match(tmp_path: Path) -> None:
    save("llama2", tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))

    def refused(weight_map: object) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError) as caught:
            load_model(tmp_path)
        return str(caught.value)

    assert "does not hold model.norm.bias" in refused(content["weight_map"] | {"model.norm.bias": files[0]})
    assert "'../x.safetensors' is not the name of a file" in refused({"model.norm.weight": "../x.safetensors"})
    assert "is not an index" in refused([])
    assert "is not an index" in refused({"model.norm.weight": 3})
    assert "gone.safetensors does not exist" in refused(content["weight_map"] | {"x": "gone.safetensors"})


def test_a_context_window_beyond_the_models_is_refused(tmp_path: Path) -> None:
    save("llama2", tmp_path)
    assert load_model(tmp_path, context_window=100).context_window == 100
    assert load_model(tmp_path).context_window == 256
    with pytest.raises(ModelError, match="257 tokens is more than the model's 256"):
        load_model(tmp_path, context_window=257)


def test_a_file_is_let_go_of_when_all_of_it_has_been_read(tmp_path: Path) -> None:
    """So that no more than a shard of the files is in memory; a tensor can still be read again."""
    save("qwen2_window", tmp_path, max_shard_size="50KB")
    with open_checkpoint(tmp_path) as checkpoint:
        files = sorted({entry.file for entry in checkpoint.entries.values()})
        first = [name for name, entry in checkpoint.entries.items() if entry.file == files[0]]
        wanted = {name: checkpoint.tensor(name).clone() for name in first}
        assert files[0].name not in Path("/proc/self/maps").read_text()
        assert files[1].name in Path("/proc/self/maps").read_text()
        assert all(torch.equal(checkpoint.tensor(name), wanted[name]) for name in first)
    assert files[1].name not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what of a file is in memory")
def test_pages_that_were_read_leave_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order shards are read in; who still looks at a tensor sees the same numbers."""
    monkeypatch.setattr(checkpoint_module, "READ_BYTES", 1 << 20)
    tensors = {f"t{number}": torch.randn(256, 1024) for number in range(16)}  # 1 MiB each
    for half in range(2):
        save_file({name: tensors[name] for name in list(tensors)[half::2]}, tmp_path / f"{half}.safetensors")
    weight_map = {name: f"{number % 2}.safetensors" for number, name in enumerate(tensors)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def resident() -> int:
        found, is_own = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(maxsplit=1)[0]:
                is_own = str(tmp_path) in line
            elif is_own and line.startswith("Rss:"):
                found += 1024 * int(line.split()[1])
        return found

    with open_checkpoint(tmp_path) as checkpoint:
        views = []
        for name, expected in tensors.items():
            views.append(checkpoint.tensor(name))
            assert torch.equal(views[-1], expected)
            assert resident() <= 4 << 20
        assert all(torch.equal(view, expected) for view, expected in zip(views, tensors.values(), strict=True))


class Fires:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("(_ for _ in ()).throw(SystemExit('code of a model repository ran'))",)


def test_no_code_of_a_directory_is_run(tmp_path: Path) -> None:
    """Neither modules that config.json names nor pickles: what a directory with weights beside them loads is weights,
    and one with pickles alone is refused.
    """
    save("llama3", tmp_path)
    prompt = prompts([20])[0]
    wanted = generate(tmp_path, prompt)
    module = "raise SystemExit('code of a model repository ran')"
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization_llama.py", "__init__.py"):
        (tmp_path / name).write_text(module)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "modeling_llama.Llama"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": own, "trust_remote_code": True}))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Fires()))
    assert generate(tmp_path, prompt) == wanted
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds pickled weights only .* never read: unpickling runs code"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Fires()))
    with pytest.raises(ModelError, match="is not a readable safetensors file"):
        load_model(tmp_path)
