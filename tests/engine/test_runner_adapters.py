"""Requests with adapters on a runner: each as `peft` and `transformers` have it alone, whatever is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.driver import Driver
from support.fake_accelerator import FakeAccelerator
from support.peft_adapters import load_adapter, save_adapter
from support.tiny_models import greedy, make, prompts, save

from aiexport_edge.engine.adapters.peft import read_adapter
from aiexport_edge.engine.core.adapter_slots import AdapterSlots
from aiexport_edge.engine.core.loading import load, make_runner
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import AdapterRef, CoreConfig, CoreModel
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.models.loader import load_model

NUM_TOKENS = 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VARIANTS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 16, "use_rslora": True},
    {"r": 7, "target_modules": ["q_proj", "v_proj"]},
    {"r": 64, "target_modules": ["down_proj", "gate_proj"], "size": 0.03},
    {"r": 3, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"q_proj": 20}},
]


def runner_of(directory: Path, *, slots: int, dtype: str = "float32", deterministic: bool = False) -> Runner:
    models = [CoreModel("model", str(directory), dtype, 0, deterministic, "")]
    config = CoreConfig(models, "cpu", 0, 256 << 20, 64, 512, 1, 0.0)
    config = msgspec.structs.replace(config, adapter_slots=slots, max_adapter_rank=64, adapter_host_bytes=1 << 20)
    return load(config, lambda model, done, total: None, keep_logits=True)


def save_adapters(base: Any, directory: Path, variants: list[dict[str, Any]]) -> list[AdapterRef]:
    """Each variant, by PEFT."""
    refs = []
    shape = ModelConfig.load(directory / "base")
    for number, variant in enumerate(variants):
        place = directory / f"adapter-{number}"
        save_adapter(base, place, seed=number, **variant).unload()
        refs.append(AdapterRef(str(place), read_adapter(place, shape).digest))
    return refs


def expected_of(
    base: Any, directory: Path, number: int | None, prompt: list[int], num_tokens: int = NUM_TOKENS
) -> tuple[list[int], torch.Tensor]:
    """What `peft` and `transformers` generate greedily; `number` None is the base model."""
    if number is None:
        return greedy(base, prompt, num_tokens)
    adapted = load_adapter(base, directory / f"adapter-{number}")
    try:
        return greedy(adapted, prompt, num_tokens)
    finally:
        adapted.unload()


def give(request: Request, slots: AdapterSlots, adapter: AdapterRef) -> Request:
    slot = slots.take(adapter.digest)
    assert slot is not None
    request.adapter, request.adapter_slot = adapter, slot
    return request


@pytest.mark.parametrize("family", ["qwen3", "llama_biases", "qwen3_moe"])
def test_a_batch_of_adapters_is_as_peft_has_them(family: str, tmp_path: Path) -> None:
    """Prompts in chunks, decodes together with the base model; every request alone by `peft`."""
    save(family, tmp_path / "base")
    base = make(family)
    variants = [v | {"target_modules": ATTENTION} for v in VARIANTS[:3]] if family == "qwen3_moe" else VARIANTS
    refs = save_adapters(base, tmp_path, variants)
    runner = runner_of(tmp_path / "base", slots=len(refs))
    driver, slots = Driver(runner), AdapterSlots(len(refs))
    numbers: list[int | None] = [None, *range(len(refs)), 0]
    texts = prompts([9 + 5 * index for index in range(len(numbers))])
    requests = []
    for number, text in zip(numbers, texts, strict=True):
        request = driver.add(text)
        requests.append(request if number is None else give(request, slots, refs[number]))
    driver.run(requests, NUM_TOKENS, chunk=7)
    different = set()
    for number, text, request in zip(numbers, texts, requests, strict=True):
        ids, logits = driver.outcome(request)
        expected_ids, expected = expected_of(base, tmp_path, number, text)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
        assert ids == expected_ids
        different.add(tuple(ids[:3]))
    assert len(different) > 1


def test_adapters_take_turns_in_a_slot(tmp_path: Path) -> None:
    """More adapters than slots, more than host memory holds: each still finds its own factors."""
    save("qwen3", tmp_path / "base")
    base = make("qwen3")
    refs = save_adapters(base, tmp_path, [{"r": 32}, {"r": 2}, {"r": 48}])
    driver, slots = Driver(runner_of(tmp_path / "base", slots=1)), AdapterSlots(1)
    (text,) = prompts([12])
    outcomes: dict[int, list[int]] = {}
    for number in (0, 1, 2, 1, 0, 2):
        request = give(driver.add(text), slots, refs[number])
        driver.run([request], 6)
        ids, _ = driver.outcome(request)
        assert outcomes.setdefault(number, ids) == ids
        slots.give_back(request.adapter_slot)
    assert len({tuple(ids) for ids in outcomes.values()}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_bits_do_not_depend_on_company(dtype: str, tmp_path: Path) -> None:
    save("qwen3", tmp_path / "base")
    refs = save_adapters(make("qwen3"), tmp_path, VARIANTS)
    texts = prompts([11, 30, 5, 17, 23])

    def run(batches: list[list[int]], chunk: int) -> dict[int, torch.Tensor]:
        driver = Driver(runner_of(tmp_path / "base", slots=len(refs), dtype=dtype, deterministic=True))
        slots = AdapterSlots(len(refs))
        logits: dict[int, torch.Tensor] = {}
        for batch in batches:
            requests = {number: give(driver.add(texts[number]), slots, refs[number]) for number in batch}
            driver.run(list(requests.values()), 5, chunk=chunk)
            logits |= {number: driver.outcome(request)[1] for number, request in requests.items()}
        return logits

    together, alone = run([[0, 1, 2, 3, 4]], 512), run([[number] for number in range(5)], 4)
    for number in range(5):
        assert torch.equal(together[number], alone[number])


def test_an_adapter_that_is_gone_ends_its_request_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("qwen3", tmp_path / "base")
    base = make("qwen3")
    refs = save_adapters(base, tmp_path, [{"r": 4}, {"r": 8}])
    runner = runner_of(tmp_path / "base", slots=2)
    (tmp_path / "adapter-1" / "adapter_config.json").unlink()
    driver, slots = Driver(runner), AdapterSlots(2)
    texts = prompts([9, 9])
    kept, lost = (give(driver.add(text), slots, ref) for text, ref in zip(texts, refs, strict=True))
    for request in (kept, lost):
        request.pages.append(driver.free.pop())
    result = runner.step(StepPlan([ModelPlan(0, [Chunk(kept, 0, 9, True), Chunk(lost, 0, 9, True)])]))
    assert result.faulty == {lost.handle}
    assert "adapter_config.json does not exist" in capsys.readouterr().err
    expected, _ = expected_of(base, tmp_path, 0, texts[0])
    assert result.ids[kept.handle] == expected[:1]


def test_graphs_hold_adapters(tmp_path: Path) -> None:
    """As on a card: decodes of the base model by one graph, those in which any row has an adapter by another."""
    save("qwen3", tmp_path / "base")
    base = make("qwen3")
    refs = save_adapters(base, tmp_path, VARIANTS[:2])
    accelerator = FakeAccelerator()
    config = CoreConfig([], "cuda:0", 0, 64 << 20, 8, 64, 1, 0.0)
    config = msgspec.structs.replace(config, adapter_slots=2, max_adapter_rank=16, adapter_host_bytes=1 << 20)
    models = [load_model(tmp_path / "base", dtype="float32")]
    runner = make_runner(config, models, torch.device("cpu"), accelerator, keep_logits=True)
    driver, slots = Driver(runner), AdapterSlots(2)
    texts = prompts([9, 14, 21])
    plain = driver.add(texts[0])
    driver.run([plain], 4)
    replays = accelerator.replays
    requests = [plain, *(give(driver.add(text), slots, ref) for text, ref in zip(texts[1:], refs, strict=True))]
    driver.run(requests, NUM_TOKENS)
    assert accelerator.replays - replays >= NUM_TOKENS - 1
    for number, text, request in zip((None, 0, 1), texts, requests, strict=True):
        assert driver.outcome(request)[0] == expected_of(base, tmp_path, number, text)[0]


def test_thirty_two_adapters_and_the_base_model_in_one_batch(tmp_path: Path) -> None:
    """Ranks 4 to 64, in one decode step."""
    save("qwen3", tmp_path / "base")
    base = make("qwen3")
    refs = save_adapters(
        base, tmp_path, [{"r": rank, "size": 0.3 / rank**0.5} for rank in range(4, 65, 2)] + [{"r": 64}]
    )
    assert len(refs) == 32
    driver, slots = Driver(runner_of(tmp_path / "base", slots=32)), AdapterSlots(32)
    texts = prompts([5 + number for number in range(33)])
    requests = [
        driver.add(texts[32]),
        *(give(driver.add(text), slots, ref) for text, ref in zip(texts, refs, strict=False)),
    ]
    driver.run(requests, 5)
    numbers: list[int | None] = [None, *range(32)]
    for number, request in zip(numbers, requests, strict=True):
        prompt = request.token_ids[: request.num_prompt_tokens]
        assert driver.outcome(request)[0] == expected_of(base, tmp_path, number, prompt, 5)[0]


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.35), ("int4", 0.8)])
def test_on_weights_that_are_rounded(quantize: str, most: float, tmp_path: Path) -> None:
    """An adapter changes logits there much as it does on whole weights; any other's change would be off by 1.4."""
    save("qwen3", tmp_path / "base")
    base = make("qwen3")
    (ref,) = save_adapters(base, tmp_path, [{"r": 8, "size": 0.05}])
    (text,) = prompts([24])
    models = [CoreModel("model", str(tmp_path / "base"), "float32", 0, False, "", quantize)]
    config = CoreConfig(models, "cpu", 0, 256 << 20, 64, 512, 1, 0.0, adapter_host_bytes=1 << 20)

    def logits(*, adapted: bool) -> torch.Tensor:
        driver, slots = Driver(load(config, lambda model, done, total: None, keep_logits=True)), AdapterSlots(2)
        request = driver.add(text)
        driver.run([give(request, slots, ref) if adapted else request], 1)
        return driver.outcome(request)[1]

    rounded = logits(adapted=True) - logits(adapted=False)
    whole = expected_of(base, tmp_path, 0, text, 1)[1] - expected_of(base, tmp_path, None, text, 1)[1]
    assert float((rounded - whole).norm() / whole.norm()) < most
