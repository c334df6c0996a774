"""Low-rank adapters on a product's output (E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021).

Each token has an adapter or none, so requests with many adapters run in one batch (L. Chen et al., "Punica", 2023). The
adapters of one product lie in slots of one table; a token says its slot. Products that were fused (q, k and v)
keep their own low-rank factors: the first factors are stacked and computed together, and each second factor adds to its
own columns of the output.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_ADAPTER = -1
RANK_MULTIPLE = 16  # tables are padded to it, with zeros
_NO_RESERVE = mmap.MAP_ANONYMOUS | (0x4000 if sys.platform == "linux" else 0)  # mmap(2) calls it MAP_NORESERVE
_SLACK = 64  # bytes: whole vectors are read where a row ends
_NO_LARGE_PAGES = getattr(mmap, "MADV_NOHUGEPAGE", 0)


@dataclass(frozen=True, slots=True)
class LoraTable:
    """The adapters of one product, S slots of them.

    a [S, P, R, K]: the first factors of the P parts of a fused product. b [S, R, N]: the second factors, transposed and
    side by side, with alpha / r in them; columns from `ends[p-1]` to `ends[p]` belong to part p. ranks int32 [S]: rows
    of `a` and `b` from there on are zero up to a multiple of RANK_MULTIPLE and are not read beyond, where anything may
    lie. R is a multiple of RANK_MULTIPLE. In the model's dtype; on a CPU in float32 where that is not bfloat16.
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    ends: tuple[int, ...]
    host_ends: torch.Tensor  # `ends`, int64 [P] in host memory

    @classmethod
    def empty(
        cls,
        *,
        num_slots: int,
        max_rank: int,
        in_features: int,
        part_sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> LoraTable:
        """Slots of rank 0, which add nothing. `part_sizes`: columns of the output by part; `dtype` is the model's.

        On a CPU they take no memory before they are filled.
        """
        dtype = table_dtype(dtype, device)
        rank = -(-max_rank // RANK_MULTIPLE) * RANK_MULTIPLE
        ends = tuple(sum(part_sizes[: part + 1]) for part in range(len(part_sizes)))
        return cls(
            _zeros((num_slots, len(ends), rank, in_features), dtype, device),
            _zeros((num_slots, rank, ends[-1]), dtype, device),
            torch.zeros(num_slots, dtype=torch.int32, device=device),
            ends,
            torch.tensor(ends, dtype=torch.int64),
        )

    def put(self, slot: int, parts: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        """Fill a slot: of each part its factors [r, K] and [n, r], scaled, or None where the adapter leaves it alone.

        Ranks may differ between parts; each is at most R.
        """
        rank = max((factors[0].shape[0] for factors in parts if factors is not None), default=0)
        read = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
        self.a[slot, :, :read].zero_()
        self.b[slot, :read].zero_()
        start = 0
        for part, (factors, end) in enumerate(zip(parts, self.ends, strict=True)):
            if factors is not None:
                first, second = factors
                own_rank = first.shape[0]
                self.a[slot, part, :own_rank].copy_(first)
                self.b[slot, :own_rank, start:end].copy_(second.t())
            start = end
        self.ranks[slot] = rank

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.ranks[slot] = 0


def order_of(slots: torch.Tensor) -> torch.Tensor:
    """Tokens by their slots, int32 [T]: those with the same adapter follow each other."""
    return torch.argsort(slots, stable=True).to(torch.int32)


def table_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the factors of a model of `dtype` are kept in."""
    return torch.float32 if device.type == "cpu" and dtype != torch.bfloat16 else dtype


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU, pages of the system's that are there once they are written to; small ones: a slot is rarely filled."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize + _SLACK, flags=mmap.MAP_PRIVATE | _NO_RESERVE)
    with contextlib.suppress(OSError):  # a system without large pages
        memory.madvise(_NO_LARGE_PAGES)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def add_lora_reference(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, table: LoraTable) -> None:
    """out [T, N] += (x Aᵀ) B of each token's adapter, in float32 inside; rounded to out's dtype once.

    x [T, K] is the product's input, `slots` int32 [T] a slot of `table` or NO_ADAPTER.
    """
    for slot in sorted(set(slots.tolist()) - {NO_ADAPTER}):
        tokens = (slots == slot).nonzero()[:, 0]
        rank = int(table.ranks[slot])
        added = out[tokens].float()
        start = 0
        for part, end in enumerate(table.ends):
            inner = x[tokens].float() @ table.a[slot, part, :rank].float().t()
            added[:, start:end] += inner @ table.b[slot, :rank, start:end].float()
            start = end
        out[tokens] = added.to(out.dtype)


def add_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    table: LoraTable,
    *,
    order: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """See `add_lora_reference`. `batch_invariant`: a token's bits depend on that token alone, as on a CPU always.
    `order`, for a CPU: the tokens by their slots (`order_of`), where that is known already.
    """
    if out.device.type == "cpu":
        from aiexport_edge.kernels.cpu import lora as cpu

        cpu.add_lora(out, x, slots, order_of(slots) if order is None else order, table)
    elif out.is_cuda:
        from aiexport_edge.kernels.gpu import lora as gpu

        gpu.add_lora(out, x, slots, table, batch_invariant=batch_invariant)
    else:
        add_lora_reference(out, x, slots, table)
