"""The runner against transformers: the same tokens and logits, however requests are batched, chunked and paged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.driver import Driver, load_runner
from support.tiny_models import CONFIGS, SHAPE, PreTrainedModel, greedy, make, make_of, prompts, save, shared_data
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3VLForConditionalGeneration

from aiexport_edge.engine.core.loading import load
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel, Sampling
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.kernels.linear import supports_bf16

NUM_TOKENS = 64
LENGTHS = [1, 5, 16, 37, 90]
DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo" / "model"

Outcome = tuple[list[int], torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(driver: Driver, texts: list[list[int]]) -> list[Outcome]:
    requests = [driver.add(text) for text in texts]
    for request in requests:
        driver.run([request], NUM_TOKENS)
    return [driver.outcome(request) for request in requests]


def mixed_lengths(driver: Driver, texts: list[list[int]]) -> list[Outcome]:
    """All in one batch, each arriving a step after the one before: prefills run beside decodes."""
    requests = [driver.add(text) for text in texts]
    for arrived in range(1, len(requests)):
        driver.step(requests[:arrived])
    driver.run(requests, NUM_TOKENS)
    return [driver.outcome(request) for request in requests]


def chunks_of_seven(driver: Driver, texts: list[list[int]]) -> list[Outcome]:
    requests = [driver.add(text) for text in texts]
    driver.run(requests, NUM_TOKENS, chunk=7)
    return [driver.outcome(request) for request in requests]


def prefix_hit(driver: Driver, texts: list[list[int]]) -> list[Outcome]:
    """Each begins with the pages of an earlier request of the same prompt."""
    outcomes = []
    for text in texts:
        first, second = driver.add(text), driver.add(text)
        driver.run([first], 2)
        cached = driver.share(first, second)
        assert cached > 0 or len(text) <= driver.runner.tokens_per_page[0]
        driver.run([second], NUM_TOKENS)
        outcomes.append(driver.outcome(second))
    return outcomes


def preempted(driver: Driver, texts: list[list[int]]) -> list[Outcome]:
    """All lose their pages after 20 tokens, and are computed again in chunks, in other pages."""
    requests = [driver.add(text) for text in texts]
    driver.run(requests, 20)
    for request in requests:
        driver.preempt(request)
    driver.run(requests, NUM_TOKENS, chunk=23)
    return [driver.outcome(request) for request in requests]


SCENARIOS: list[Callable[[Driver, list[list[int]]], list[Outcome]]] = [
    alone,
    mixed_lengths,
    chunks_of_seven,
    prefix_hit,
    preempted,
]


def assert_same_as_transformers(runner: Runner, model: PreTrainedModel, texts: list[list[int]]) -> None:
    expected = [greedy(model, text, NUM_TOKENS) for text in texts]
    for scenario in SCENARIOS:
        for (ids, logits), (expected_ids, expected_logits) in zip(
            scenario(Driver(runner), texts), expected, strict=True
        ):
            assert ids == expected_ids, scenario.__name__
            torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4, msg=scenario.__name__)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_transformers(name: str, tmp_path: Path) -> None:
    directory = save(name, tmp_path)
    assert_same_as_transformers(load_runner(directory), make(name), prompts(LENGTHS))


def test_stories_equals_transformers() -> None:
    directory = shared_data() / "models" / "stories260K"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = [[1], *prompts([9, 40, 150], vocabulary=512)]
    assert_same_as_transformers(load_runner(directory), model, texts)


def test_the_demo_model_equals_transformers() -> None:
    kind = Qwen3VLForConditionalGeneration if (DEMO / "preprocessor_config.json").exists() else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(DEMO, dtype=torch.float32)
    texts = [[max(token, 7) for token in text] for text in prompts([3, 40, 150], vocabulary=2000)]  # none of pictures
    assert_same_as_transformers(load_runner(DEMO), model, texts)


@pytest.mark.parametrize("tokens_per_page", [1, 3])
def test_pages_of_any_number_of_tokens(tokens_per_page: int, tmp_path: Path) -> None:
    """Pages of 1 and 3 tokens, where no power of two helps."""
    directory = save("qwen3", tmp_path)
    token_bytes = 3 * 2 * 2 * 24 * 4
    runner = load_runner(directory, page_bytes=tokens_per_page * token_bytes)
    assert runner.tokens_per_page == [tokens_per_page]
    assert_same_as_transformers(runner, make("qwen3"), prompts([5, 37]))


DTYPES = [
    "float32",
    pytest.param("bfloat16", marks=pytest.mark.skipif(not supports_bf16(), reason="processor has no bfloat16")),
]


def checkpoint(name: str, directory: Path) -> Path:
    """A model of CONFIGS, the trained one of the shared data, or the demo model."""
    if name == "demo":
        return DEMO
    return shared_data() / "models" / name if name == "stories260K" else save(name, directory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama_biases", "qwen3", "mistral_window", "stories260K", "demo"])
def test_deterministic_logits_are_bitwise_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    runner = load_runner(checkpoint(name, tmp_path), dtype=dtype, deterministic=True)
    texts = prompts([*LENGTHS, 65, 33, 2])
    expected = alone(Driver(runner), texts)
    for scenario in SCENARIOS[1:]:
        for (ids, logits), (expected_ids, expected_logits) in zip(
            scenario(Driver(runner), texts), expected, strict=True
        ):
            assert ids == expected_ids, scenario.__name__
            assert torch.equal(logits, expected_logits), scenario.__name__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama3", "demo"])
def test_deterministic_in_batches_larger_than_a_tile(name: str, dtype: str, tmp_path: Path) -> None:
    """70 sequences decode at once: more rows than the matrix units take in one tile."""
    runner = load_runner(checkpoint(name, tmp_path), dtype=dtype, deterministic=True, max_num_running=70)
    texts = prompts(list(range(1, 71)))
    driver = Driver(runner)
    apart = [driver.add(text) for text in texts]
    for request in apart:
        driver.run([request], 5)
    together = [driver.add(text) for text in texts]
    driver.run(together, 5)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(driver.outcome(one)[1], driver.outcome(other)[1])


@pytest.mark.skipif(not supports_bf16(), reason="processor has no bfloat16")
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_bfloat16_is_as_close_to_float32_as_transformers(name: str, tmp_path: Path) -> None:
    directory = save(name, tmp_path, dtype=torch.bfloat16)
    text = prompts([120])[0]
    half = make(name, torch.bfloat16)
    with torch.inference_mode():
        theirs = half(torch.tensor([text])).logits[0, -1].float()
        exact = half.float()(torch.tensor([text])).logits[0, -1]
    driver = Driver(load_runner(directory, dtype="auto"))
    request = driver.add(text)
    driver.run([request], 1)
    ours = driver.outcome(request)[1][0]
    allowed = 2 * (theirs - exact).square().mean().sqrt()
    assert (ours - exact).square().mean().sqrt() < allowed
    assert (ours - theirs).square().mean().sqrt() < 2 * allowed


@pytest.mark.skipif(not supports_bf16(), reason="processor has no bfloat16")
def test_rows_of_an_odd_number_of_bfloat16(tmp_path: Path) -> None:
    """Pairs of numbers end in the middle of a row: what lies behind it has no part in the next one's step."""
    config = MistralConfig(**SHAPE | {"hidden_size": 65, "intermediate_size": 33, "head_dim": 16}, sliding_window=None)
    model = make_of(config)
    model.save_pretrained(tmp_path)
    runner, texts = load_runner(tmp_path, dtype="bfloat16", deterministic=True), prompts([1, 5, 33])
    driver = Driver(runner)
    apart, together = ([driver.add(text) for text in texts] for _ in range(2))
    for request in apart:
        driver.run([request], 8)
    driver.run(together, 8, chunk=7)
    for one, other, text in zip(apart, together, texts, strict=True):
        logits = driver.outcome(one)[1]
        assert torch.equal(logits, driver.outcome(other)[1])
        with torch.inference_mode():
            exact = model(torch.tensor([text])).logits[0, -1]
        assert (logits[0] - exact).square().mean() < 0.05 * exact.square().mean()


def test_several_models_share_one_pool(tmp_path: Path) -> None:
    """Models of different bytes per token, in the same steps; a page that one frees serves another."""
    names = ["qwen3", "llama2", "mistral_window"]
    runner = load_runner(*(save(name, tmp_path / name) for name in names))
    assert len(set(runner.tokens_per_page)) > 1
    texts = prompts([30, 11, 50, 3, 24, 41])
    driver = Driver(runner)
    requests = [driver.add(text, model=i % 3) for i, text in enumerate(texts)]
    driver.run(requests, 10, chunk=9)
    for request in requests[:3]:
        driver.preempt(request)
    driver.run(requests, NUM_TOKENS)
    for i, request in enumerate(requests):
        assert driver.outcome(request)[0] == greedy(make(names[i % 3]), texts[i], NUM_TOKENS)[0]


def test_a_draw_depends_on_seed_and_index_only(tmp_path: Path) -> None:
    runner = load_runner(save("qwen3", tmp_path), deterministic=True)
    texts = prompts([20, 3, 50, 20])
    samplings = [Sampling(1.0, 1.0, 0, 2**64 - 1), Sampling(0.7, 0.9, 20, 1), Sampling(1.0, 1.0, 5, 3)]

    driver = Driver(runner)
    apart = [driver.add(text, sampling=sampling) for text, sampling in zip(texts, samplings, strict=False)]
    for request in apart:
        driver.run([request], NUM_TOKENS)
    together = [driver.add(text, sampling=sampling) for text, sampling in zip(texts, samplings, strict=False)]
    greedy_beside = driver.add(texts[3])
    driver.run([greedy_beside, *reversed(together)], 30, chunk=11)
    for request in together:
        driver.preempt(request)
    driver.run(together, NUM_TOKENS, chunk=40)
    for one, other in zip(apart, together, strict=True):
        assert one.token_ids == other.token_ids

    other_seed = driver.add(texts[0], sampling=Sampling(1.0, 1.0, 0, 5))
    driver.run([other_seed], NUM_TOKENS)
    assert other_seed.token_ids != apart[0].token_ids


def test_the_core_imports_nothing_heavy_but_torch() -> None:
    """Each of these would add to the time until the first token."""
    code = (
        "import sys, aiexport_edge.engine.core.runner;"
        "print([m for m in ('transformers', 'torch._dynamo', 'torch._inductor', 'sympy', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_budget_of_a_step_follows_the_device(tmp_path: Path) -> None:
    model = CoreModel("m", str(save("qwen3", tmp_path)), "float32", 0, False, "")
    for asked, given in ((0, 512), (40, 40)):
        assert load(CoreConfig([model], "cpu", 0, 64 << 20, 4, asked, 1, 0.0)).max_step_tokens == given


def test_a_device_that_is_not_supported_is_refused() -> None:
    config = CoreConfig([], "cuda:0", 0, 0, 1, 512, 1, 0.0)
    with pytest.raises(ModelError, match="device cuda:0"):
        load(config)
