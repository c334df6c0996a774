"""Run by an interpreter that has vLLM: its metadata through our attention backend, against dense attention in torch.

    python check_vllm_attention.py        prints "checked N steps", or fails

Steps mix decodes, chunks of prefills and whole prompts, with blocks in any order, both physical orders of a layer's
cache, rows of padding, sliding windows. The cache is written by the backend itself.
"""

from __future__ import annotations

import itertools
import random

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from aiexport_edge.engine.backends.vllm.attention import EdgeAttentionImpl, EdgeAttentionMetadataBuilder

NUM_BLOCKS, PADDING = 64, 3


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Causal attention of the last len(q) of len(k) positions: q [n, Hq, D], k and v [m, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    positions = torch.arange(len(k))
    own = positions[len(k) - len(q) :, None]
    visible = (positions <= own) & ((positions > own - window) if window else True)
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def check(block_size: int, head_dim: int, heads: tuple[int, int], window: int, head_major: bool, seed: int) -> int:
    """A few steps of a few sequences; how many there were."""
    torch.manual_seed(seed)
    rng, (num_q, num_kv) = random.Random(seed), heads
    order = (NUM_BLOCKS, num_kv, block_size) if head_major else (NUM_BLOCKS, block_size, num_kv)
    cache = torch.full((*order, 2 * head_dim), float("nan"))
    kv_cache = cache if head_major else cache.transpose(1, 2)  # logical [blocks, heads, block_size, 2 * D]
    scale = head_dim**-0.5
    layer = EdgeAttentionImpl(num_q, head_dim, scale, num_kv, sliding_window=window or None)
    builder = EdgeAttentionMetadataBuilder.__new__(EdgeAttentionMetadataBuilder)  # `build` needs nothing of its making
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    sequences: list[tuple[list[torch.Tensor], list[torch.Tensor], list[int]]] = [([], [], []) for _ in range(5)]
    steps = 0
    for step in range(4):
        # vLLM hands over decodes first, then what has more than one new token.
        lengths = sorted(1 if step and rng.random() < 0.5 else rng.randrange(2, 2 * block_size) for _ in sequences)
        seq_lens, slots, queries, expected = [], [], [], []
        for (keys, values, blocks), new in zip(sequences, lengths, strict=True):
            for _ in range(new):
                if len(keys) == len(blocks) * block_size:
                    blocks.append(free.pop())
                slots.append(blocks[-1] * block_size + len(keys) % block_size)
                keys.append(torch.randn(num_kv, head_dim))
                values.append(torch.randn(num_kv, head_dim))
            q = torch.randn(new, num_q, head_dim)
            queries.append(q)
            seq_lens.append(len(keys))
            expected.append(dense(q, torch.stack(keys), torch.stack(values), scale, window))
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        width = max(len(blocks) for _, _, blocks in sequences) + 2
        table = torch.tensor([blocks + [0] * (width - len(blocks)) for _, _, blocks in sequences], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            num_reqs=len(sequences),
            num_actual_tokens=sum(lengths),
            max_query_len=max(lengths),
            max_seq_len=max(seq_lens),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots + [-1] * PADDING),
        )
        new_keys = [k for (keys, _, _), new in zip(sequences, lengths, strict=True) for k in keys[-new:]]
        new_values = [v for (_, values, _), new in zip(sequences, lengths, strict=True) for v in values[-new:]]
        padded = torch.randn(PADDING, num_q, head_dim)
        output = torch.full((sum(lengths) + PADDING, num_q, head_dim), 7.0)
        layer.forward(
            None,
            torch.cat([*queries, padded]),
            torch.stack([*new_keys, *[torch.zeros(num_kv, head_dim)] * PADDING]),
            torch.stack([*new_values, *[torch.zeros(num_kv, head_dim)] * PADDING]),
            kv_cache,
            builder.build(0, common),
            output,
        )
        torch.testing.assert_close(output[:-PADDING], torch.cat(expected), atol=2e-5, rtol=2e-5)
        assert (output[-PADDING:] == 7.0).all(), "padding stays as it is"
        steps += 1
    return steps


def main() -> None:
    cases = itertools.product((16, 32, 24), (64, 128), ((4, 2), (6, 1)), (0, 20), (True, False))
    total = sum(check(*case, seed=index) for index, case in enumerate(cases))
    print(f"checked {total} steps")


if __name__ == "__main__":
    main()
