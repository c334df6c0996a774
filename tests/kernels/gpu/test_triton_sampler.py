"""The sampler in the interpreter: the same ids as the reference, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernel_cases import poisoned, randn

from aiexport_edge.kernels.gpu.launch import A100, H200, Architecture
from aiexport_edge.kernels.gpu.sampler import MOST_CANDIDATES, TILE, sample, settings
from aiexport_edge.kernels.sampler import sample_reference

# (temperature, top_k, top_p)
ROWS = [
    (0.0, 0, 1.0),
    (1.0, 0, 1.0),
    (0.7, 40, 1.0),
    (1.0, 0, 0.9),
    (1.3, 50, 0.8),
    (1.0, 1, 1.0),
    (1.0, 0, 1e-6),
    (0.01, 5, 0.99),
    (5.0, 0, 0.97),
]


def parameters(rows: list[tuple[float, int, float]], *, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(rows)
    return {
        "temperature": torch.tensor([row[0] for row in rows], dtype=torch.float32),
        "top_k": torch.tensor([row[1] for row in rows], dtype=torch.int32),
        "top_p": torch.tensor([row[2] for row in rows], dtype=torch.float32),
        "seeds": torch.randint(-(1 << 63), (1 << 63) - 1, (batch,), generator=generator),
        "output_index": torch.randint(0, 1 << 40, (batch,), generator=generator),
    }


def check(logits: torch.Tensor, given: dict[str, Any], *, bitmask: torch.Tensor | None = None, sms: int = 4) -> None:
    with poisoned():
        ids, logprobs = sample(logits, **given, bitmask=bitmask, architecture=Architecture(80, sms))
    expected_ids, expected_logprobs = sample_reference(logits.float(), **given, bitmask=bitmask)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [7, 1100, pytest.param(5000, marks=pytest.mark.prove)])
def test_every_kind_of_row_in_one_batch(vocabulary: int) -> None:
    check(4 * randn(torch.Generator().manual_seed(1), len(ROWS), vocabulary), parameters(ROWS, seed=vocabulary))


def test_coarse_logits_tie_at_the_pivot() -> None:
    """Of equal scores exactly the lowest ids stay."""
    logits = randn(torch.Generator().manual_seed(2), len(ROWS), 1500).mul(2).round().div(2)
    check(logits, parameters(ROWS, seed=3))


def test_all_equal_and_peaked_rows() -> None:
    rows = [(1.0, 30, 1.0), (1.0, 0, 0.5), (1.0, 30, 0.5), (0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 10, 0.9)]
    logits = torch.zeros(len(rows), 1500)
    logits[5, 700] = 50.0
    check(logits, parameters(rows))


def test_a_flat_row_overflows_the_candidates() -> None:
    rows = [(1.0, 0, 0.95), (1.0, MOST_CANDIDATES + 100, 1.0)]
    check(0.1 * randn(torch.Generator().manual_seed(4), 2, MOST_CANDIDATES + 2000), parameters(rows))


def test_a_guess_that_collects_too_little() -> None:
    """Scores at a bin's far edge weigh less than its middle: the whole row is searched."""
    logits = torch.full((1, 2000), -0.1249)
    logits[0, :10] = 0.0
    logits[0, 1000:] = -20.0
    check(logits, parameters([(1.0, 0, 0.999999)]))


def test_top_k_larger_than_what_is_possible() -> None:
    logits = randn(torch.Generator().manual_seed(5), 3, 100)
    logits[1, 10:] = float("-inf")
    logits[2, :] = float("-inf")
    logits[2, 99] = -3.0
    check(logits, parameters([(1.0, 200, 1.0), (1.0, 50, 0.9), (1.0, 50, 0.9)]))


def test_rows_without_a_distribution() -> None:
    logits = randn(torch.Generator().manual_seed(6), 8, 300)
    logits[0, 5] = logits[4, 299] = float("nan")
    logits[1, 5] = logits[5, 0] = float("inf")
    logits[2] = logits[6] = float("-inf")
    check(logits, parameters([(0.0, 0, 1.0)] * 4 + [(1.0, 5, 0.9)] * 4))


def test_grammar_bitmask() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = 3 * randn(generator, len(ROWS), 1001)
    bitmask = torch.randint(-(1 << 31), 1 << 31, (len(ROWS), 32), generator=generator).int()
    bitmask[0] = 0
    bitmask[1] = 0
    bitmask[1, 31] = 1 << 8  # token 1000 alone
    check(logits, parameters(ROWS, seed=8), bitmask=bitmask)


@pytest.mark.prove
def test_a_draw_does_not_depend_on_the_batch_or_the_card() -> None:
    logits = 2 * randn(torch.Generator().manual_seed(9), len(ROWS), 2500)
    given = parameters(ROWS, seed=10)
    together, _ = sample(logits, **given, architecture=A100)
    for row in range(len(ROWS)):
        alone, _ = sample(
            logits[row : row + 1],
            **{name: value[row : row + 1] for name, value in given.items()},
            architecture=Architecture(90, 1),
        )
        assert alone.tolist() == together[row : row + 1].tolist()


@pytest.mark.prove
def test_logits_in_16_bits() -> None:
    logits = (3 * randn(torch.Generator().manual_seed(11), len(ROWS), 1200)).bfloat16()
    check(logits, parameters(ROWS, seed=12))


@pytest.mark.prove
def test_many_draws() -> None:
    for seed in range(10):
        scale = 0.5 + seed / 2
        check(scale * randn(torch.Generator().manual_seed(seed), len(ROWS), 2100), parameters(ROWS, seed=seed))


def test_settings_fill_the_card() -> None:
    alone = settings(H200, batch=1, vocabulary=151_936)
    assert alone.num_chunks >= H200.num_sms
    full = settings(H200, batch=512, vocabulary=151_936)
    assert full.num_chunks <= 2
    for setting in (alone, full):
        assert setting.chunk_tiles * setting.num_chunks * TILE >= 151_936
