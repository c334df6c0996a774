"""The runner over the Triton kernels, as it runs on a card, in the interpreter: a whole small model, drawn ids and all.

What the kernels' own tests do not see: that every tensor the runner makes (views of fixed inputs, expanded positions,
strided pages, padding rows) is one that the kernels take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_accelerator import FakeAccelerator
from support.tiny_models import greedy, make, prompts, save

from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.plan import PENDING_ID, Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import CoreConfig, Priority, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.loader import load_model
from aiexport_edge.kernels.gpu import (
    decode_attention,
    gather,
    paged_attention,
    qk_norm_rope,
    rms_norm,
    sampler,
    swiglu,
)


@pytest.fixture(autouse=True)
def _triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = "aiexport_edge.engine.models.decoder"

    def plan(*arguments: torch.Tensor, batch_invariant: bool, **options: Any) -> torch.Tensor | None:
        return None if batch_invariant else decode_attention.plan_splits(*arguments, **options)

    def decode(
        q: torch.Tensor, *arguments: torch.Tensor, plan: torch.Tensor, batch_invariant: bool, **options: Any
    ) -> torch.Tensor:
        if not batch_invariant:
            return decode_attention.decode_attention(q, *arguments, num_splits=plan, **options)
        k_cache, v_cache, block_tables, seq_lens = arguments
        starts = torch.arange(q.shape[0] + 1, dtype=torch.int32)
        return paged_attention.paged_attention(
            q, k_cache, v_cache, block_tables, starts, seq_lens, batch_invariant=True, **options
        )

    def attend(*arguments: Any, plan: None, **options: Any) -> torch.Tensor:
        return paged_attention.paged_attention(*arguments, **options)

    # Made-up steps take the interpreter a minute, and show nothing that the requests below do not.
    monkeypatch.setattr("aiexport_edge.engine.core.runner.warm_up", lambda *arguments: None)
    monkeypatch.setattr("aiexport_edge.engine.core.runner.largest_steps", lambda runner: [])
    for name, operation in {
        "gather_rows": gather.gather_rows,
        "rms_norm": rms_norm.rms_norm,
        "add_rms_norm": rms_norm.add_rms_norm,
        "qk_norm_rope": qk_norm_rope.qk_norm_rope,
        "plan_attention": lambda *arguments, **options: None,
        "paged_attention": attend,
        "plan_decode": plan,
        "decode_attention": decode,
        "swiglu": swiglu.swiglu,
    }.items():
        monkeypatch.setattr(f"{decoder}.{name}", operation)
    monkeypatch.setattr("aiexport_edge.engine.core.step_sampler.sample", sampler.sample)


def _request(handle: int, prompt: list[int], pages: list[int]) -> Request:
    return Request(
        handle=handle,
        model=0,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        max_tokens=9,
        stop_ids=frozenset(),
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0),
        tenant="",
        weight=1.0,
        salt=b"",
        priority=Priority.INTERACTIVE,
        arrival=handle,
        pages=pages,
    )


def _runner(directory: Path, *, deterministic: bool = False) -> Runner:
    models = [load_model(directory, dtype="float32", context_window=64, deterministic=deterministic)]
    config = CoreConfig([], "cuda:0", 0, 1 << 20, 3, 32, 1, 0.0)
    return make_runner(config, models, torch.device("cpu"), FakeAccelerator(), keep_logits=deterministic)


@pytest.mark.parametrize("name", ["qwen3", pytest.param("mistral_window", marks=pytest.mark.prove)])
def test_a_model_by_triton_kernels_equals_transformers(name: str, tmp_path: Path) -> None:
    """Two requests, the second a step later: prefill, a decode beside a prefill, then decodes launched ahead."""
    runner = _runner(save(name, tmp_path))
    texts = prompts([17, 6])
    requests = [_request(1, texts[0], [3, 5]), _request(2, texts[1], [4])]

    def launch(*running: Request) -> dict[int, list[int]]:
        chunks = [Chunk(r, r.num_computed_tokens, r.num_tokens - r.num_computed_tokens, True) for r in running]
        pending = runner.launch(StepPlan([ModelPlan(0, chunks)]))
        for request in running:
            if PENDING_ID in request.token_ids:
                request.token_ids[-1] = previous[request.handle][0]
            request.num_computed_tokens = request.num_tokens
            request.token_ids.append(PENDING_ID)
        return runner.collect(pending).ids

    previous: dict[int, list[int]] = {}
    previous = launch(requests[0])
    previous = launch(*requests)
    previous = launch(*requests)
    previous = launch(*requests)
    model = make(name)
    for request, text in zip(requests, texts, strict=True):
        request.token_ids[-1] = previous[request.handle][0]
        expected, _ = greedy(model, text, request.num_output_tokens)
        assert request.token_ids[len(text) :] == expected


def test_deterministic_bits_do_not_depend_on_the_step(tmp_path: Path) -> None:
    """The logits of a request's last token: prefilled whole, in chunks, and decoded beside another request."""
    runner = _runner(save("qwen3", tmp_path), deterministic=True)
    prompt, other = prompts([19, 7])

    def run(request: Request, start: int, end: int, *beside: Chunk) -> torch.Tensor:
        chunk = Chunk(request, start, end - start, end == len(prompt))
        runner.step(StepPlan([ModelPlan(0, [*beside, chunk])]))
        return runner.last_logits.get(request.handle, torch.empty(0))

    whole = run(_request(1, prompt, [3, 5]), 0, 19)
    chunked = _request(2, prompt, [7, 8])
    run(chunked, 0, 4)
    run(chunked, 4, 17)
    assert torch.equal(run(chunked, 17, 19), whole)
    decoded = _request(3, prompt, [9, 10])
    run(decoded, 0, 18)
    assert torch.equal(run(decoded, 18, 19, Chunk(_request(4, other, [11]), 0, 7, True)), whole)
    again = _request(5, other, [12])
    runner.step(StepPlan([ModelPlan(0, [Chunk(again, 0, 6, False)])]))
    assert torch.equal(run(decoded, 18, 19, Chunk(again, 6, 1, True)), whole)
