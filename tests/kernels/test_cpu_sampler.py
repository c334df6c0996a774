"""The sampler on the CPU: the reference's ids bit for bit, and what the reference itself promises."""

from __future__ import annotations

import math

import pytest
import torch
from support.kernel_cases import poisoned
from torch import Tensor

from aiexport_edge.kernels.sampler import sample, sample_reference

# Per row: temperature, top_k, top_p.
SETTINGS = [
    (0.0, 0, 1.0),
    (1.0, 0, 1.0),
    (0.7, 1, 1.0),
    (1.5, 3, 1.0),
    (0.0, 5, 0.5),
    (1.0, 40, 0.9),
    (1.0, 1_000_000, 0.5),
    (0.9, 0, 0.99),
    (1e-40, 2, 0.1),
    (1e-3, 0, 0.0),
    (2.0, 7, 0.999),
    (0.8, 20, 0.3),
]


def settings(rows: list[tuple[float, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """temperature, top_k, top_p as tensors."""
    temperature, top_k, top_p = zip(*rows, strict=True)
    return torch.tensor(temperature), torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p)


def draws(number: int) -> tuple[Tensor, Tensor]:
    """Seeds over all 64 bits, and output indices beyond 32."""
    generator = torch.Generator().manual_seed(number)
    seeds = torch.randint(-(2**63), 2**63 - 1, (number,), generator=generator)
    return seeds, torch.randint(0, 2**40, (number,), generator=generator)


def check(logits: Tensor, rows: list[tuple[float, int, float]]) -> None:
    before = logits.clone()
    with poisoned():
        ids, logprobs = sample(logits, *settings(rows), *draws(len(rows)))
    expected_ids, expected_logprobs = sample_reference(logits, *settings(rows), *draws(len(rows)))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("vocabulary", [1, 5, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_against_the_reference(vocabulary: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(12, vocabulary, generator=generator)
    check(logits, SETTINGS)
    check(logits.bfloat16().float(), SETTINGS[3:] + SETTINGS[:3])  # many equal logits


def test_logits_of_minus_infinity() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(12, 200, generator=generator)
    logits[torch.rand(12, 200, generator=generator) < 0.8] = float("-inf")
    logits[:, 17] = 0.5
    check(logits, SETTINGS)
    ids, _ = sample(logits, *settings(SETTINGS), *draws(12))
    assert bool(logits[torch.arange(12), ids].isfinite().all())


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 65, 1000, 4099])
def test_a_bitmask_forbids(vocabulary: int) -> None:
    """As -inf in the logits themselves, for every kind of row; also where rows of the mask lie apart."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(12, vocabulary, generator=generator)
    words = -(-vocabulary // 32)
    bitmask = torch.randint(-(1 << 31), 1 << 31, (12, words + 3), generator=generator).int()[:, :words]
    bitmask[0] = 0
    bitmask[1] = 0
    bitmask[1, (vocabulary - 1) // 32] = torch.tensor(1 << ((vocabulary - 1) % 32)).int()  # the last token alone
    bitmask[2] = -1
    with poisoned():
        ids, logprobs = sample(logits, *settings(SETTINGS), *draws(12), bitmask)
    expected_ids, expected_logprobs = sample_reference(logits, *settings(SETTINGS), *draws(12), bitmask)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-6, atol=2e-6, equal_nan=True)
    allowed = [[bool(int(row[t // 32]) >> (t % 32) & 1) for t in range(vocabulary)] for row in bitmask]
    by_hand = logits.masked_fill(~torch.tensor(allowed), float("-inf"))
    assert torch.equal(expected_ids, sample_reference(by_hand, *settings(SETTINGS), *draws(12))[0])
    assert ids[1] == vocabulary - 1
    assert logprobs[0].isnan()


def test_rows_without_a_distribution() -> None:
    logits = torch.zeros(4, 70)
    logits[0, 69], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    rows = [(1.0, 0, 1.0), (0.0, 0, 1.0), (1.0, 5, 0.5), (0.0, 0, 1.0)]
    check(logits, rows)
    ids, logprobs = sample(logits, *settings(rows), *draws(4))
    assert ids.tolist() == [0, 0, 0, 0]
    assert logprobs.isnan().tolist() == [True, True, True, False]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.full((2, 300), -1.0)
    logits[0, [250, 7, 70]] = 2.0
    logits[1] = torch.where(torch.arange(300) < 9, -0.0, 0.0)
    ids, logprobs = sample(logits, *settings([(0.0, 0, 1.0)] * 2), *draws(2))
    assert ids.tolist() == [7, 0]
    assert logprobs.tolist() == pytest.approx([-math.log(3 + 297 * math.exp(-3)), -math.log(300)], abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 5, 64])
def test_top_k_keeps_exactly_k(top_k: int) -> None:
    """Of equal logits the lower ids."""
    logits = torch.zeros(1, 100)
    logits[0, 90:] = 1.0
    kept = {*range(90, 100)} if top_k > 10 else {*range(90, 90 + top_k)}
    kept |= {*range(max(0, top_k - 10))}
    number = 2000
    ids, _ = sample(logits.expand(number, -1), *settings([(3.0, top_k, 1.0)] * number), *draws(number))
    assert set(ids.tolist()) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.39, 1), (0.41, 2), (0.6, 2), (0.71, 3), (0.89, 3), (0.95, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    logits = torch.tensor([[0.1, 0.3, 0.4, 0.2]]).log()
    number = 1000
    ids, _ = sample(logits.expand(number, -1), *settings([(1.0, 0, top_p)] * number), *draws(number))
    assert set(ids.tolist()) == set([2, 1, 3, 0][:kept])


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()  # of the first two, the first has 0.57
    number = 1000
    for top_p, kept in ((0.5, {0}), (0.6, {0, 1})):
        ids, _ = sample(logits.expand(number, -1), *settings([(1.0, 2, top_p)] * number), *draws(number))
        assert set(ids.tolist()) == kept


def test_frequencies_and_log_probabilities() -> None:
    """Chi-square of 20,000 draws from 8 tokens: below 24.3 with probability 0.999."""
    number, temperature = 20_000, 0.7
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.3, 1.5]])
    distribution = torch.softmax(logits[0] / temperature, dim=0)
    rows = settings([(temperature, 0, 1.0)] * number)
    for seeds, indices in (
        (torch.arange(number), torch.zeros(number, dtype=torch.int64)),
        (torch.full((number,), 9), torch.arange(number)),
    ):
        ids, logprobs = sample(logits.expand(number, -1), *rows, seeds, indices)
        expected = number * distribution
        assert float(((torch.bincount(ids, minlength=8) - expected) ** 2 / expected).sum()) < 24.3
        torch.testing.assert_close(logprobs, distribution.log()[ids], rtol=1e-6, atol=2e-6)


@pytest.mark.usefixtures("three_threads")
def test_a_draw_is_the_same_in_every_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = SETTINGS * 5
    logits = 4 * torch.randn(60, 777, generator=generator)
    seeds, indices = draws(60)
    ids, logprobs = sample(logits, *settings(rows), seeds, indices)
    for number in (1, 2, 7, 59):
        some = torch.randperm(60, generator=generator)[:number]
        again = sample(logits[some], *settings([rows[i] for i in some.tolist()]), seeds[some], indices[some])
        assert torch.equal(again[0], ids[some])
        assert torch.equal(again[1], logprobs[some])


def test_rows_may_lie_apart() -> None:
    logits = torch.randn(12, 90, generator=torch.Generator().manual_seed(3))
    wide = torch.full((12, 200), float("nan"))
    wide[:, 5:95] = logits
    for view in (wide[:, 5:95], logits.t().contiguous().t()):
        ids, _ = sample(view, *settings(SETTINGS), *draws(12))
        assert torch.equal(ids, sample(logits, *settings(SETTINGS), *draws(12))[0])


def test_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(4)
    check(
        3 * torch.randn(4, 151_936, generator=generator), [(1.0, 0, 1.0), (1.0, 50, 0.9), (0.8, 0, 0.95), (0.0, 0, 1.0)]
    )
