"""Low-rank adapters in the interpreter against the reference."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, poisoned, randn

from aiexport_edge.kernels.gpu.lora import FEW_TOKENS, add_lora
from aiexport_edge.kernels.lora import NO_ADAPTER, LoraTable, add_lora_reference

CPU = torch.device("cpu")


def check(
    slots: list[int],
    *,
    ranks: tuple[int, ...] = (4, 0, 17, 32),
    in_features: int = 80,
    part_sizes: tuple[int, ...] = (130,),
    dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
) -> None:
    """Every slot has factors in all its parts but the second."""
    generator = torch.Generator().manual_seed(len(slots))
    cpu = LoraTable.empty(
        num_slots=len(ranks),
        max_rank=max(ranks),
        in_features=in_features,
        part_sizes=part_sizes,
        dtype=dtype,
        device=CPU,
    )
    table = LoraTable(cpu.a.to(dtype), cpu.b.to(dtype), cpu.ranks, cpu.ends, cpu.host_ends)
    for slot, rank in enumerate(ranks):
        if rank:
            factors = [
                (randn(generator, rank, in_features) / in_features**0.5, randn(generator, size, rank) / rank**0.5)
                for size in part_sizes
            ]
            table.put(slot, [None if part == 1 else each for part, each in enumerate(factors)])
    x = randn(generator, len(slots), in_features, dtype=dtype)
    out = randn(generator, len(slots), sum(part_sizes), dtype=dtype)
    expected, places = out.clone(), torch.tensor(slots, dtype=torch.int32)
    add_lora_reference(expected, x, places, table)
    with poisoned():
        add_lora(out, x, places, table, batch_invariant=batch_invariant)
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part_sizes", [(130,), (64, 33), (96, 20, 40)])
def test_few_tokens(part_sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check([0, NO_ADAPTER, 3, 2, 1, 2], part_sizes=part_sizes, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part_sizes", [(70,), (64, 33), (96, 20, 40)])
def test_many_tokens(part_sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole runs of one adapter, tiles of several, tiles of none."""
    slots = [3] * 20 + [0] * 5 + [2, 1, 0, NO_ADAPTER] * 2 + [NO_ADAPTER] * 20
    assert len(slots) > FEW_TOKENS
    check(slots, part_sizes=part_sizes, dtype=dtype)


@pytest.mark.parametrize("num_tokens", [12, FEW_TOKENS + 12])
@pytest.mark.parametrize("part_sizes", [(70,), (64, 33)])
def test_a_broken_adapter_is_its_own_tokens_trouble(num_tokens: int, part_sizes: tuple[int, ...]) -> None:
    """In a tile that it shares with others: 0 * NaN would be NaN in their rows too."""
    generator = torch.Generator().manual_seed(5)
    table = LoraTable.empty(
        num_slots=3, max_rank=16, in_features=80, part_sizes=part_sizes, dtype=torch.float32, device=CPU
    )
    for slot, number in ((0, 1.0), (2, float("nan"))):
        factors = [
            (number * randn(generator, 16, 80) / 9, number * randn(generator, size, 16) / 4) for size in part_sizes
        ]
        table.put(slot, list(factors))
    slots = torch.tensor([0, 2, NO_ADAPTER] * (num_tokens // 3) + [0] * (num_tokens % 3), dtype=torch.int32)
    x, out = randn(generator, num_tokens, 80), randn(generator, num_tokens, sum(part_sizes))
    expected = out.clone()
    add_lora_reference(expected, x, slots, table)
    add_lora(out, x, slots, table)
    broken = slots == 2
    assert bool(out[broken].isnan().all())
    assert_close(out[~broken], expected[~broken], torch.float32)


def test_large_tiles() -> None:
    check([0] * 200 + [3] * 67, part_sizes=(70,))


@pytest.mark.parametrize("slots", [[NO_ADAPTER], [NO_ADAPTER] * 40, [], [1] * 3])
def test_nothing_to_add(slots: list[int]) -> None:
    check(slots)


def test_odd_widths_and_rank() -> None:
    check([0, 1, 2], ranks=(1, 64, 33), in_features=300, part_sizes=(17, 5, 129))


def test_batch_invariant() -> None:
    check([0, 3, 3, NO_ADAPTER], batch_invariant=True)
