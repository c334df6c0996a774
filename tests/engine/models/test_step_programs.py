"""Steps as programs: the same bits as without them, for prompts, chunks of them, and decodes beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiexport_edge.engine.models.decode_programs import can_record
from aiexport_edge.engine.models.decoder import Batch
from aiexport_edge.engine.models.loader import LoadedModel, load_model
from aiexport_edge.engine.models.step_programs import StepPrograms
from aiexport_edge.kernels import threads
from aiexport_edge.kernels.cpu import program as programs

DEMO = Path(__file__).resolve().parents[3] / "engine" / "demo" / "model"
TOKENS_PER_PAGE, PAGES_PER_ROW, NUM_ROWS = 12, 20, 4

# Of up to four sequences, in rows of pages of their own: where a chunk begins, its tokens, whether the last is wanted.
STEPS = [
    [(0, 100, True)],
    [(0, 33, False), (0, 7, True), (0, 1, True)],
    [(33, 90, True), (7, 1, True), (1, 1, True)],
    [(123, 1, True), (8, 1, True), (2, 5, False), (0, 40, True)],
    [(124, 1, True), (9, 1, True), (7, 1, True), (40, 1, True)],
    [(125, 20, False)],
]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(programs, "MIN_SHARED_NANOSECONDS", 0.0)
    monkeypatch.setattr(programs, "MIN_WAKING_NANOSECONDS", 0.0)
    before = threads.num_threads()
    threads.set_num_threads(2)
    yield
    threads.set_num_threads(before)


def caches(model: LoadedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config = model.config
    shape = (NUM_ROWS * PAGES_PER_ROW, config.num_kv_heads, TOKENS_PER_PAGE, config.head_dim)
    return [
        (torch.zeros(shape, dtype=model.kv_dtype), torch.zeros(shape, dtype=model.kv_dtype))
        for _ in range(config.num_layers)
    ]


def batch_of(chunks: list[tuple[int, int, bool]]) -> Batch:
    counts = torch.tensor([count for _, count, _ in chunks])
    ends = counts.cumsum(0)
    places = torch.cat([torch.arange(start, start + count) for start, count, _ in chunks])
    owners = torch.repeat_interleave(torch.arange(len(chunks)), counts)
    tables = torch.arange(NUM_ROWS * PAGES_PER_ROW).view(NUM_ROWS, PAGES_PER_ROW).flip(1)[: len(chunks)]
    slots = tables[owners, places // TOKENS_PER_PAGE] * TOKENS_PER_PAGE + places % TOKENS_PER_PAGE
    wanted = torch.tensor([wanted for _, _, wanted in chunks])
    is_decode = bool((counts == 1).all() and wanted.all())
    return Batch(
        input_ids=(7 * places + 13 * owners) % 500 + 5,
        inputs_embeds=None,
        positions=places.expand(3, -1).contiguous(),
        slots=slots,
        block_tables=tables.to(torch.int32).contiguous(),
        query_start_loc=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32),
        seq_lens=torch.tensor([start + count for start, count, _ in chunks], dtype=torch.int32),
        rows=None if is_decode else ends[wanted] - 1,
    )


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.usefixtures("two_threads")
@torch.inference_mode()
def test_steps_as_programs_have_the_same_bits(quantize: str) -> None:
    model = load_model(DEMO, dtype="bfloat16", quantize=quantize, deterministic=True)
    if not can_record(model.decoder):
        pytest.skip("this processor's products are a library's")
    kept, plain = caches(model), caches(model)
    step = StepPrograms(
        model.decoder,
        kept,
        num_tokens=128,
        num_rows=NUM_ROWS,
        pages_per_row=PAGES_PER_ROW,
        dtype=model.dtype,
    )
    for chunks in STEPS * 3:
        batch = batch_of(chunks)
        assert step.fits(batch)
        logits = step.logits(batch)
        hidden = model.decoder.forward(batch, plain)
        if any(wanted for _, _, wanted in chunks):
            assert logits is not None
            assert torch.equal(logits, model.decoder.logits(hidden))
        else:
            assert logits is None
        for (keys, values), (plain_keys, plain_values) in zip(kept, plain, strict=True):
            assert torch.equal(keys, plain_keys)
            assert torch.equal(values, plain_values)
