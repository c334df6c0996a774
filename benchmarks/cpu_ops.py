"""The CPU operations at the shapes of Qwen3-0.6B, each against what torch offers for the same.

    python -m benchmarks.cpu_ops [--threads 2] [--cpu-time] [--json]

A ratio above 1 says how many times faster than its peer an operation is. Times are the best of several runs.
`--cpu-time` counts processor time instead of elapsed time, for one thread on a machine that does other work meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from aiexport_edge.kernels import threads

os.environ.update(threads.ENVIRONMENT)  # before torch is loaded

import torch

from aiexport_edge.kernels.linear import PackedLinear, supports_bf16
from aiexport_edge.kernels.paged_attention import paged_attention
from aiexport_edge.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from aiexport_edge.kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from aiexport_edge.kernels.sampler import sample
from aiexport_edge.kernels.swiglu import swiglu, swiglu_reference
from aiexport_edge.kernels.warm import OPERATIONS

HIDDEN, INTERMEDIATE, Q_HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1024, 3072, 16, 8, 128, 151_936
TOKENS_PER_PAGE = 28
DTYPE = torch.bfloat16 if supports_bf16() else torch.float32


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `note` says what else the time means."""

    name: str
    milliseconds: float
    peer: str
    peer_milliseconds: float
    note: str

    @property
    def ratio(self) -> float:
        return self.peer_milliseconds / self.milliseconds


class Stopwatch:
    """Best time of several runs, in milliseconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        start = self._clock()
        run()
        repeats = max(1, min(1000, int(0.02 / max(1e-6, self._clock() - start))))
        best = float("inf")
        for _ in range(7):
            start = self._clock()
            for _ in range(repeats):
                run()
            best = min(best, (self._clock() - start) / repeats)
        return 1e3 * best


@dataclass(frozen=True, slots=True)
class Sequences:
    """Arguments of attention for a batch of equal sequences in shuffled pages, one layer of two."""

    q: torch.Tensor
    cache: torch.Tensor
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def make(cls, batch: int, queries: int, length: int) -> Sequences:
        pages = -(-length // TOKENS_PER_PAGE)
        shape = (batch * pages + 1, 2, 2, KV_HEADS, TOKENS_PER_PAGE, HEAD_DIM)
        return cls(
            q=torch.randn(batch * queries, Q_HEADS, HEAD_DIM).to(DTYPE),
            cache=torch.randn(shape, dtype=DTYPE)[:, 1],
            block_tables=(torch.randperm(batch * pages) + 1).to(torch.int32).view(batch, pages),
            query_start_loc=torch.arange(0, batch * queries + 1, queries, dtype=torch.int32),
            seq_lens=torch.full((batch,), length, dtype=torch.int32),
        )

    def attend(self) -> torch.Tensor:
        return paged_attention(
            self.q,
            self.cache[:, 0],
            self.cache[:, 1],
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
            scale=HEAD_DIM**-0.5,
        )

    def gathered(self, half: int) -> torch.Tensor:
        """Keys (0) or values (1) as [batch, heads, positions, head_dim], copied together."""
        pages = self.cache[self.block_tables.long(), half]
        batch, _, heads = pages.shape[:3]
        whole = pages.transpose(1, 2).reshape(batch, heads, -1, HEAD_DIM)
        return whole[:, :, : int(self.seq_lens[0])]


def attention_rows(watch: Stopwatch) -> list[Row]:
    """Decode against gathering pages for SDPA; prefill against SDPA on keys that lie together already."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    batch, length = 16, 1100
    decode = Sequences.make(batch, 1, length)
    q = decode.q.view(batch, 1, Q_HEADS, HEAD_DIM).transpose(1, 2)
    bytes_read = 2 * batch * length * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    memory = torch.empty(bytes_read // 8, dtype=torch.int64).fill_(1)
    ours, theirs = watch(decode.attend), watch(lambda: sdpa(q, decode.gathered(0), decode.gathered(1), enable_gqa=True))
    reading = watch(memory.sum)
    note = f"a layer; to read these bytes in order takes {reading:.2f} ms, {ours / reading:.1f} times less"
    rows = [Row(f"attention, decode, {batch} x {length}", ours, "gather + SDPA", theirs, note)]
    for queries, total in ((512, 512), (512, 2048)):
        prefill = Sequences.make(1, queries, total)
        q = prefill.q.view(1, queries, Q_HEADS, HEAD_DIM).transpose(1, 2)
        keys, values = prefill.gathered(0), prefill.gathered(1)
        mask = torch.ones(queries, total, dtype=torch.bool).tril(total - queries)
        ours = watch(prefill.attend)
        how = {"is_causal": True} if queries == total else {"attn_mask": mask}
        theirs = watch(partial(sdpa, q, keys, values, enable_gqa=True, **how))
        flops = 4 * Q_HEADS * HEAD_DIM * queries * (total - queries / 2)
        note = f"a layer; {flops / ours / 1e6:.0f} GFLOP/s of what causality leaves"
        rows.append(Row(f"attention, prefill {queries} of {total}", ours, "SDPA", theirs, note))
    return rows


def run_all(products: Sequence[Callable[[torch.Tensor], object]], x: torch.Tensor) -> None:
    """Each product once, so that no weight stays in a cache."""
    for product in products:
        product(x)


def product_rows(watch: Stopwatch) -> list[Row]:
    """Gate and up in one, over weights far larger than a cache, against F.linear."""
    shape = (2 * INTERMEDIATE, HIDDEN)
    weights = [torch.randn(shape, dtype=torch.float32).to(DTYPE) * 0.03 for _ in range(16)]
    products = [PackedLinear(weight, dtype=DTYPE, deterministic=False) for weight in weights]
    fixed = [PackedLinear(weight, dtype=DTYPE, deterministic=True) for weight in weights]
    rows = []
    for num_rows in (1, 16, 256):
        x = torch.randn(num_rows, HIDDEN).to(DTYPE)
        ours, deterministic, theirs = (
            watch(run) / len(weights)
            for run in (
                partial(run_all, products, x),
                partial(run_all, fixed, x),
                partial(run_all, [partial(torch.nn.functional.linear, weight=weight) for weight in weights], x),
            )
        )
        speed = 2 * num_rows * weights[0].numel() / ours / 1e6
        reading = weights[0].numel() * DTYPE.itemsize / ours / 1e6
        note = f"{speed:.0f} GFLOP/s, {reading:.1f} GB/s; deterministic {deterministic:.2f} ms"
        rows.append(Row(f"product {shape[0]} x {shape[1]}, {num_rows} rows", ours, "F.linear", theirs, note))
    return rows


def token_rows(watch: Stopwatch) -> list[Row]:
    """What happens to tokens one by one, against the same in torch operations."""
    rows = []
    k_cache = torch.zeros(32, KV_HEADS, TOKENS_PER_PAGE, HEAD_DIM, dtype=DTYPE)
    v_cache, weight = k_cache.clone(), torch.ones(HEAD_DIM, dtype=DTYPE)
    cos_sin, norm_weight = torch.randn(2048, HEAD_DIM), torch.ones(HIDDEN, dtype=DTYPE)
    options: dict[str, Any] = {"num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "q_weight": weight, "k_weight": weight}
    for tokens in (1, 16, 256):
        qkv = torch.randn(tokens, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM).to(DTYPE)
        positions, slots = torch.arange(tokens).expand(3, -1), torch.arange(tokens)
        arguments = (qkv, cos_sin, positions, slots, k_cache, v_cache)
        x, gate_up = torch.randn(tokens, HIDDEN).to(DTYPE), torch.randn(tokens, 2 * INTERMEDIATE).to(DTYPE)
        for name, ours, theirs in (
            (
                "QK norm, RoPE, KV write",
                partial(qk_norm_rope, *arguments, **options),
                partial(qk_norm_rope_reference, *arguments, **options),
            ),
            (
                "sum and RMS norm",
                partial(add_rms_norm, x, x, norm_weight, 1e-6),
                partial(add_rms_norm_reference, x, x, norm_weight, 1e-6),
            ),
            ("SwiGLU", partial(swiglu, gate_up), partial(swiglu_reference, gate_up)),
        ):
            rows.append(Row(f"{name}, {tokens} tokens", watch(ours), "torch", watch(theirs), ""))
    return rows


def sampler_rows(watch: Stopwatch) -> list[Row]:
    """One row over the whole vocabulary, against softmax, sort and multinomial."""
    logits = 3 * torch.randn(1, VOCABULARY)

    def sorted_draw(top_p: float) -> torch.Tensor:
        probabilities = torch.softmax(logits, dim=-1)
        if top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
            return order.gather(1, torch.multinomial(ordered, 1))
        return torch.multinomial(probabilities, 1)

    rows = []
    for name, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("temperature", 1.0, 0, 1.0),
        ("top-k 50", 1.0, 50, 1.0),
        ("top-p 0.9", 1.0, 0, 0.9),
    ):
        arguments = (
            torch.tensor([temperature]),
            torch.tensor([top_k], dtype=torch.int32),
            torch.tensor([top_p]),
            torch.tensor([7]),
            torch.tensor([0]),
        )
        peers: dict[str, Callable[[], object]] = {
            "greedy": lambda: (torch.log_softmax(logits, dim=-1), logits.argmax(-1)),
            "temperature": lambda: sorted_draw(1.0),
            "top-k 50": lambda: torch.multinomial(torch.softmax(logits.topk(50).values, dim=-1), 1),
            "top-p 0.9": lambda: sorted_draw(0.9),
        }
        ours = watch(partial(sample, logits, *arguments))
        rows.append(Row(f"sample 1 of {VOCABULARY}, {name}", ours, "torch", watch(peers[name]), ""))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="CPU operations at the shapes of Qwen3-0.6B.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    start = clock()
    for name in OPERATIONS:
        importlib.import_module(f"aiexport_edge.kernels.cpu.{name}")
    loading = 1e3 * (clock() - start)
    threads.set_num_threads(options.threads)
    torch.manual_seed(0)
    watch = Stopwatch(clock)
    rows = [row for measure in (attention_rows, product_rows, token_rows, sampler_rows) for row in measure(watch)]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": options.threads,
        "dtype": str(DTYPE).removeprefix("torch."),
        "clock": clock.__name__,
        "load_ms": round(loading, 1),
    }
    if options.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for row in rows:
        print(
            f"{row.name:38} {row.milliseconds:9.3f} ms  {row.ratio:6.1f} x {row.peer:14}"
            f" {row.peer_milliseconds:9.3f} ms  {row.note}".rstrip()
        )


if __name__ == "__main__":
    main()
