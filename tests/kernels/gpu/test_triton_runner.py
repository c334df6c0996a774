"""The runner over the Triton kernels, as it runs on a card, in the interpreter: a whole small model, drawn ids and all.

What the kernels' own tests do not see: that every tensor the runner makes (views of fixed inputs, expanded positions,
strided pages, padding rows) is one that the kernels take.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fake_accelerator import FakeAccelerator
from support.tiny_models import greedy, make, prompts, save

from aiexport_edge.engine.core.plan import PENDING_ID, Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import CoreConfig, Priority, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner, make_runner
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

    def decode(*arguments: torch.Tensor, plan: torch.Tensor, **options: float) -> torch.Tensor:
        return decode_attention.decode_attention(*arguments, num_splits=plan, **options)  # type: ignore[arg-type]

    for name, operation in {
        "gather_rows": gather.gather_rows,
        "rms_norm": rms_norm.rms_norm,
        "add_rms_norm": rms_norm.add_rms_norm,
        "qk_norm_rope": qk_norm_rope.qk_norm_rope,
        "paged_attention": paged_attention.paged_attention,
        "plan_decode": decode_attention.plan_splits,
        "decode_attention": decode,
        "swiglu": swiglu.swiglu,
    }.items():
        monkeypatch.setattr(f"{decoder}.{name}", operation)
    monkeypatch.setattr("aiexport_edge.engine.core.runner.sample", sampler.sample)


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


def _runner(directory: Path) -> Runner:
    models = [load_model(directory, dtype="float32", context_window=64)]
    config = CoreConfig([], "cuda:0", 0, 1 << 20, 3, 32, 1, 0.0)
    return make_runner(config, models, torch.device("cpu"), FakeAccelerator())


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
