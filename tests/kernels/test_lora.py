"""Low-rank adapters on the CPU against the reference, and a token's bits against its company."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, randn

from aiexport_edge.kernels.lora import NO_ADAPTER, LoraTable, add_lora, add_lora_reference

CPU = torch.device("cpu")


def make_table(
    generator: torch.Generator, ranks: list[int], in_features: int, part_sizes: list[int], dtype: torch.dtype
) -> LoraTable:
    """Slot i has rank ranks[i] in its first part, less in the others, and nothing in the last of several."""
    table = LoraTable.empty(
        num_slots=len(ranks),
        max_rank=max(ranks),
        in_features=in_features,
        part_sizes=part_sizes,
        dtype=dtype,
        device=CPU,
    )
    for slot, rank in enumerate(ranks):
        parts: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for part, size in enumerate(part_sizes):
            own = max(1, rank - part)
            parts.append(
                (randn(generator, own, in_features) / in_features**0.5, randn(generator, size, own) / own**0.5)
            )
        if len(parts) > 1:
            parts[-1] = None
        if rank:
            table.put(slot, parts)
    return table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "part_sizes"), [(64, [96]), (37, [50, 18, 18]), (128, [32, 31])])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_matches_the_reference(num_tokens: int, in_features: int, part_sizes: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    table = make_table(generator, [4, 0, 17, 64, 1], in_features, part_sizes, dtype)
    slots = torch.randint(NO_ADAPTER, 5, (num_tokens,), generator=generator, dtype=torch.int32)
    x = randn(generator, num_tokens, in_features, dtype=dtype)
    out = randn(generator, num_tokens, sum(part_sizes), dtype=dtype)
    expected = out.clone()
    add_lora_reference(expected, x, slots, table)
    untouched = out[slots == NO_ADAPTER].clone()
    add_lora(out, x, slots, table)
    assert_close(out, expected, dtype)
    assert torch.equal(out[slots == NO_ADAPTER], untouched)


def test_a_tokens_bits_do_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    table = make_table(generator, [8, 32], 100, [60, 20], torch.bfloat16)
    slots = torch.tensor([0, 1, NO_ADAPTER, 1, 0, 0], dtype=torch.int32)
    x, out = randn(generator, 6, 100, dtype=torch.bfloat16), randn(generator, 6, 80, dtype=torch.bfloat16)
    together = out.clone()
    add_lora(together, x, slots, table)
    for token in range(6):
        one = slice(token, token + 1)
        alone = out[one].clone()
        add_lora(alone, x[one].clone(), slots[one].clone(), table)
        assert torch.equal(alone, together[one])


def test_a_slot_is_filled_anew_and_cleared() -> None:
    generator = torch.Generator().manual_seed(2)
    table = make_table(generator, [32], 64, [48], torch.float32)
    x, slots = randn(generator, 3, 64), torch.zeros(3, dtype=torch.int32)
    first, second = randn(generator, 2, 64), randn(generator, 48, 2)
    table.put(0, [(first, second)])
    out = torch.zeros(3, 48)
    add_lora(out, x, slots, table)
    assert_close(out, x @ first.t() @ second.t(), torch.float32)
    table.clear(0)
    before = out.clone()
    add_lora(out, x, slots, table)
    assert torch.equal(out, before)


def test_no_tokens() -> None:
    table = make_table(torch.Generator().manual_seed(3), [4], 16, [16], torch.float32)
    add_lora(torch.empty(0, 16), torch.empty(0, 16), torch.empty(0, dtype=torch.int32), table)
