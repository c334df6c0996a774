"""The runner as it runs on a card, over an accelerator that is the CPU: graphs, padding, steps launched ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.driver import Driver
from support.fake_accelerator import FakeAccelerator
from support.tiny_models import greedy, make, prompts, save

from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.plan import PENDING_ID, Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import CoreConfig, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.engine.models.decoder import Batch
from aiexport_edge.engine.models.loader import load_model
from aiexport_edge.kernels.sampler import sample

CPU = torch.device("cpu")
NUM_TOKENS = 24


def graphed(
    *directories: Path,
    accelerator: FakeAccelerator | None = None,
    max_num_running: int = 20,
    deterministic: bool = False,
) -> tuple[Runner, FakeAccelerator]:
    accelerator = accelerator or FakeAccelerator()
    models = [load_model(path, dtype="float32", deterministic=deterministic) for path in directories]
    config = CoreConfig([], "cuda:0", 0, 64 << 20, 20, 64, 1, 0.0)
    return make_runner(config, models, CPU, accelerator, keep_logits=True), accelerator


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3_window", "mistral_window"])
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    """Requests that arrive a step apart, in chunks, then lose their pages: decodes by graph, beside prefills."""
    runner, _ = graphed(save(name, tmp_path))
    texts = prompts([1, 5, 16, 37, 90])
    driver = Driver(runner)
    requests = [driver.add(text) for text in texts]
    for arrived in range(1, len(requests)):
        driver.step(requests[:arrived], chunk=7)
    driver.run(requests, 12, chunk=7)
    for request in requests[1:4]:
        driver.preempt(request)
    driver.run(requests, NUM_TOKENS, chunk=23)
    model = make(name)
    for request, text in zip(requests, texts, strict=True):
        (ids, logits), (expected_ids, expected_logits) = driver.outcome(request), greedy(model, text, NUM_TOKENS)
        assert ids == expected_ids
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)


def test_several_models_share_a_step(tmp_path: Path) -> None:
    names = ["qwen3", "llama2"]
    runner, _ = graphed(*(save(name, tmp_path / name) for name in names))
    texts = prompts([30, 11, 3, 24])
    driver = Driver(runner)
    requests = [driver.add(text, model=i % 2) for i, text in enumerate(texts)]
    driver.run(requests, NUM_TOKENS, chunk=9)
    for i, request in enumerate(requests):
        assert driver.outcome(request)[0] == greedy(make(names[i % 2]), texts[i], NUM_TOKENS)[0]


def test_graphs_are_captured_largest_first_and_the_rest_when_needed(tmp_path: Path) -> None:
    runner, accelerator = graphed(save("qwen3", tmp_path))
    (graphs,) = runner._graphs
    assert graphs.captured == [20, 16, 8, 4, 2, 1]
    driver = Driver(runner)
    requests = [driver.add(text) for text in prompts([4] * 11)]
    driver.run(requests, 3)
    assert graphs.captured[6:] == [12]
    captures = accelerator.captures
    driver.run(requests, 6)
    assert accelerator.captures == captures


def test_padding_writes_to_page_0_alone(tmp_path: Path) -> None:
    runner, _ = graphed(save("qwen3", tmp_path))
    driver = Driver(runner)
    requests = [driver.add(text) for text in prompts([4, 6, 9])]
    driver.run(requests, 1)
    pages = runner.memory.bytes.view(runner.num_pages, runner.page_bytes)
    pages[0] = 0
    before = pages.clone()
    driver.run(requests, 2)
    changed = {int(page) for page in (pages != before).any(dim=1).nonzero().flatten()}
    assert changed == {0} | {request.pages[-1] for request in requests}


def ahead(runner: Runner, requests: Sequence[Request], num_tokens: int) -> None:
    """Decode with every step launched before the ids of the one before are collected."""

    def plan() -> StepPlan:
        for request in requests:
            while len(request.pages) * runner.tokens_per_page[0] < request.num_tokens:
                request.pages.append(next(fresh))
        chunks = [Chunk(r, r.num_computed_tokens, r.num_tokens - r.num_computed_tokens, samples=True) for r in requests]
        return StepPlan([ModelPlan(0, chunks)])

    fresh = iter(range(1, runner.num_pages))
    pending = None
    for _ in range(num_tokens):
        launched = runner.launch(plan())
        if pending is not None:
            fill(requests, runner.collect(pending).ids)
        for request in requests:
            request.num_computed_tokens = request.num_tokens
            request.token_ids.append(PENDING_ID)
        pending = launched
    assert pending is not None
    fill(requests, runner.collect(pending).ids)


def fill(requests: Sequence[Request], ids: dict[int, list[int]]) -> None:
    for request in requests:
        request.token_ids[request.token_ids.index(PENDING_ID)] = ids[request.handle][0]


def test_steps_launched_ahead_draw_the_same_ids(tmp_path: Path) -> None:
    runner, accelerator = graphed(save("qwen3", tmp_path), deterministic=True)
    texts = prompts([20, 3, 50])
    samplings = [Sampling(0.0, 1.0, 0, 0), Sampling(1.0, 0.9, 20, 2**64 - 1), Sampling(0.8, 1.0, 0, 4)]
    driver = Driver(runner)
    apart = [driver.add(text, sampling=sampling) for text, sampling in zip(texts, samplings, strict=True)]
    driver.run(apart, NUM_TOKENS)
    together = [driver.add(text, sampling=sampling) for text, sampling in zip(texts, samplings, strict=True)]
    accelerator.waited.clear()
    ahead(runner, together, NUM_TOKENS)
    assert [request.token_ids for request in together] == [request.token_ids for request in apart]
    assert accelerator.waited == sorted(accelerator.waited)
    assert len(accelerator.waited) == NUM_TOKENS


def test_a_prefill_runs_beside_the_decodes_which_do_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, accelerator = graphed(save("qwen3", tmp_path))
    _note_draws(accelerator, monkeypatch)
    driver = Driver(runner)
    requests = [driver.add(text) for text in prompts([4, 6, 9])]
    driver.run(requests[:2], 2)
    accelerator.events.clear()
    driver.step(requests)
    assert accelerator.events == ["fork", "replay", "draw 2", "beside", "draw 1 beside", "join", "mark"]
    accelerator.events.clear()
    driver.step(requests)
    assert accelerator.events == ["replay", "draw 3", "mark"], "nothing beside it, nothing to wait for"


def _note_draws(accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have draws, and in which stream they are, among the accelerator's events."""

    def noted(logits: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        accelerator.events.append(f"draw {len(logits)}{' beside' * accelerator.is_beside}")
        return sample(logits, *parameters)  # type: ignore[arg-type]

    monkeypatch.setattr("aiexport_edge.engine.core.step_sampler.sample", noted)


class Crowded(FakeAccelerator):
    """A card on which another program has taken memory since the start."""

    most_tokens = 1 << 30
    graphs = True

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if not self.graphs:
            raise torch.OutOfMemoryError
        return super().capture(run)


def test_a_prefill_that_does_not_fit_is_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Crowded()
    runner, _ = graphed(save("qwen3", tmp_path), accelerator=accelerator)
    decoder = runner._models[0].decoder
    forward, sizes = decoder.forward, list[int]()

    def crowded(batch: Batch, *caches: object) -> torch.Tensor:
        if len(batch.positions[0]) > accelerator.most_tokens:
            raise torch.OutOfMemoryError
        sizes.append(len(batch.positions[0]))
        return forward(batch, *caches)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "forward", crowded)
    accelerator.most_tokens = 20
    texts = prompts([5, 37, 90, 11])
    driver = Driver(runner)
    requests = [driver.add(text) for text in texts]
    driver.run(requests, 6)
    assert accelerator.num_reclaimed > 0
    assert max(sizes) <= 20
    model = make("qwen3")
    for request, text in zip(requests, texts, strict=True):
        assert driver.outcome(request)[0] == greedy(model, text, 6)[0]
    accelerator.most_tokens = 0
    with pytest.raises(torch.OutOfMemoryError):
        driver.run([driver.add(texts[0])], 1)


def test_a_graph_that_does_not_fit_is_replaced_by_a_larger_one(tmp_path: Path) -> None:
    accelerator = Crowded()
    runner, _ = graphed(save("qwen3", tmp_path), accelerator=accelerator)
    accelerator.graphs = False
    texts = prompts([4] * 11)
    driver = Driver(runner)
    requests = [driver.add(text) for text in texts]
    driver.run(requests, 4)
    assert 12 not in runner._graphs[0].captured
    model = make("qwen3")
    for request, text in zip(requests, texts, strict=True):
        assert driver.outcome(request)[0] == greedy(model, text, 4)[0]


def test_a_capture_while_serving_spoils_no_page(tmp_path: Path) -> None:
    """It runs what it captures, on padding: not on what the inputs hold of the step before."""
    runner, _ = graphed(save("qwen3", tmp_path))
    texts = prompts([9] * 11)
    driver = Driver(runner)
    requests = [driver.add(text) for text in texts]
    driver.run(requests[:8], 3)
    driver.run(requests, 8)  # eleven decodes need a graph of twelve rows
    assert 12 in runner._graphs[0].captured
    model = make("qwen3")
    for request, text in zip(requests, texts, strict=True):
        assert driver.outcome(request)[0][:8] == greedy(model, text, 8)[0]


def test_the_warm_up_tells_how_far_it_is(tmp_path: Path) -> None:
    models = [load_model(save("qwen3", tmp_path), dtype="float32")]
    told: list[tuple[int, int]] = []
    config = CoreConfig([], "cuda:0", 0, 64 << 20, 20, 64, 1, 0.0)
    make_runner(config, models, CPU, FakeAccelerator(), progress=lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert told == [(done, total) for done in range(total + 1)]
    assert total > 15


class TooSmall(FakeAccelerator):
    """A card whose memory ends during a trial, or at the graphs."""

    def __init__(self, *, at: str) -> None:
        super().__init__()
        self.at = at

    def peak_bytes(self, run: object) -> int:
        if self.at == "trial":
            raise torch.OutOfMemoryError
        return 0

    def capture(self, run: object) -> None:  # type: ignore[override]
        raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("accelerator", "sentence"),
    [
        (TooSmall(at="trial"), r"a step of 64 tokens and 20 requests does not fit .* lower engine\.max_step_tokens"),
        (TooSmall(at="graphs"), r"does not do for a page pool of \d+ bytes.*; lower engine\.pool_bytes"),
        (FakeAccelerator(peak=1 << 30), r"lower engine\.max_step_tokens or engine\.max_num_running"),
        (FakeAccelerator(free=600 << 20, peak=20 << 20), r"pool_bytes is 67108864, but cpu has only .* bytes left"),
    ],
)
def test_too_little_memory_says_what_to_lower(accelerator: FakeAccelerator, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=sentence):
        graphed(save("qwen3", tmp_path), accelerator=accelerator)


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_the_pool_takes_a_share_of_what_is_left(share: float, tmp_path: Path) -> None:
    models = [load_model(save("qwen3", tmp_path), dtype="float32")]
    config = CoreConfig([], "cuda:0", 0, 0, 20, 64, 1, 0.0, share)
    rest = 100 << 20
    accelerator = FakeAccelerator(free=rest + (512 << 20) + (2 << 20), peak=1 << 20)
    runner = make_runner(config, models, CPU, accelerator)
    assert runner.num_pages == int(share * rest) // runner.page_bytes
