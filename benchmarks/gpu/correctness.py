"""Part a: every kernel against its float32 reference, on random shapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from aiexport_edge.kernels.decode_attention import decode_attention, decode_attention_reference
from aiexport_edge.kernels.gather import gather_rows, gather_rows_reference
from aiexport_edge.kernels.linear import PackedLinear
from aiexport_edge.kernels.packed_linear import packed_linear_reference
from aiexport_edge.kernels.paged_attention import paged_attention, paged_attention_reference
from aiexport_edge.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from aiexport_edge.kernels.quantization import int8_weight, quantize_fp8, quantize_int4
from aiexport_edge.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from aiexport_edge.kernels.sampler import sample, sample_reference
from aiexport_edge.kernels.swiglu import swiglu, swiglu_reference
from benchmarks.gpu.paged import paged
from benchmarks.gpu.report import Bench

PART = "a"
SHAPES, TIMES = 10, 3  # of each kernel, which compiles them anew; and with other lengths and numbers
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # two steps of the last bit
HEAD_DIMS = (64, 80, 96, 128, 256)
HIDDEN = (64, 576, 1024, 2560, 4096)
T = TypeVar("T")
Pairs = list[tuple[Tensor, Tensor]]  # (result, reference in float32)
Check = Callable[[Bench, random.Random, torch.dtype, int], Pairs]  # the last is the number of the shape


def run(bench: Bench) -> None:
    """A row for each kernel and dtype: the worst deviation as a share of what rounding explains; above 1 is wrong."""
    dtypes = (torch.float32, torch.bfloat16) if bench.dry_run else (torch.float32, torch.bfloat16, torch.float16)
    # A processor rounds the rows of such products: there its own tests hold them.
    checks: list[Check] = [_norm, _add_norm, _swiglu, _gather, _rope, _prefill, _decode]
    checks += [_packed_product] if bench.device.type == "cuda" else []
    for check in checks:
        for dtype in dtypes:
            generator = random.Random(7)
            torch.manual_seed(7)
            worst = 0.0
            cases = 2 if bench.dry_run else SHAPES * TIMES
            for case in range(cases):
                pairs = check(bench, generator, dtype, case % SHAPES)
                worst = max(worst, *[_deviation(*pair, dtype) for pair in pairs])
            name = f"{check.__name__[1:]} {str(dtype).removeprefix('torch.')}"
            bench.add(PART, name, {"cases": cases, "deviation": worst, "ok": worst <= 1.0})
    _check_sampler(bench)


def _deviation(result: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest |result - expected| over what is allowed; infinite where one is not finite.

    Allowed is a share of the number and of the largest of its row: a sum that comes to little had larger parts.
    """
    if not bool(torch.isfinite(result).all()):
        return float("inf")
    expected = expected.float()
    allowed = ROUNDING[dtype] * (expected.abs() + expected.abs().amax(-1, keepdim=True))
    return float(((result.float() - expected).abs() / allowed.clamp(min=1e-30)).max())


def _random(bench: Bench, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=bench.device).to(dtype)


def _packed_product(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    """Weights in four and eight bits, rows few enough not to be rounded."""
    size = _turn(shape, (96, 128), (1000, 300), (6144, 4096))
    weight = _random(bench, *size, dtype=torch.float32) / size[1] ** 0.5
    x = _random(bench, generator.randint(1, 64), size[1], dtype=dtype)
    forms = (
        quantize_int4(weight, 32),
        quantize_int4(weight, 128),
        int8_weight(weight),
        quantize_fp8(weight),
    )
    pairs = []
    for quantized in forms:
        product = PackedLinear(quantized, dtype=dtype, deterministic=generator.random() < 0.5)
        pairs.append((product(x), packed_linear_reference(x.float(), quantized)))
    return pairs


def _norm(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    hidden = _turn(shape, *HIDDEN)
    x, weight = _random(bench, generator.randint(1, 70), hidden, dtype=dtype), _random(bench, hidden, dtype=dtype)
    return [(rms_norm(x, weight, 1e-6), rms_norm_reference(x.float(), weight, 1e-6))]


def _add_norm(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    size = generator.randint(1, 70), _turn(shape, *HIDDEN)
    x, residual = _random(bench, *size, dtype=dtype), _random(bench, *size, dtype=dtype)
    weight = _random(bench, size[1], dtype=dtype)
    # The sum is rounded before it is normed, so the reference takes the inputs as they are.
    return list(
        zip(add_rms_norm(x, residual, weight, 1e-6), add_rms_norm_reference(x, residual, weight, 1e-6), strict=True)
    )


def _swiglu(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    gate_up = _random(bench, generator.randint(1, 70), 2 * _turn(shape, 48, 1000, 3072), dtype=dtype)
    return [(swiglu(gate_up), swiglu_reference(gate_up.float()))]


def _gather(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    hidden = _random(bench, generator.randint(1, 70), _turn(shape, 64, 1000), dtype=dtype)
    rows = torch.randint(len(hidden), (generator.randint(1, 9),), device=bench.device)
    return [(gather_rows(hidden, rows), gather_rows_reference(hidden, rows))]


def _rope(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    head_dim, kv_heads = _turn(shape, *HEAD_DIMS), _turn(shape, 1, 2, 8)
    q_heads, tokens = kv_heads * _turn(shape, 1, 2, 4, 16), generator.randint(1, 40)
    tokens_per_page = _turn(shape, 1, 7, 16, 28)
    qkv = _random(bench, tokens, (q_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos_sin = torch.randn(512, head_dim, device=bench.device)
    positions = torch.randint(512, (tokens,), device=bench.device).expand(3, tokens)
    slots = torch.randperm(4 * tokens_per_page * tokens, device=bench.device)[:tokens]
    slots[generator.randrange(tokens)] = -1
    weights = [_random(bench, head_dim, dtype=dtype) if shape % 3 else None for _ in range(2)]

    def compute(op: Callable[..., Tensor], dtype: torch.dtype, qkv: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(4 * tokens, 2, kv_heads, tokens_per_page, head_dim, dtype=dtype, device=bench.device)
        q = op(
            qkv,
            cos_sin,
            positions,
            slots,
            cache[:, 0],
            cache[:, 1],
            num_q_heads=q_heads,
            num_kv_heads=kv_heads,
            q_weight=weights[0],
            k_weight=weights[1],
        )
        return q, cache

    return list(
        zip(
            compute(qk_norm_rope, dtype, qkv),
            compute(qk_norm_rope_reference, torch.float32, qkv.float()),
            strict=True,
        )
    )


def _attention_case(shape: int) -> dict[str, int]:
    """Each head dim with two group sizes, each group size with two page sizes, and so on."""
    kv_heads = _turn(shape, 1, 2, 8)
    return {
        "kv_heads": kv_heads,
        "q_heads": kv_heads * _turn(shape + shape // 5, 1, 3, 4, 8, 16),
        "head_dim": _turn(shape, *HEAD_DIMS),
        "tokens_per_page": _turn(2 * shape + shape // 5, 1, 7, 16, 28, 64),
        "window": _turn(shape, 0, 100, 0, 5),
    }


def _turn(number: int, *values: T) -> T:
    """One of the values, each in its turn."""
    return values[number % len(values)]


def _prefill(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    case = _attention_case(shape)
    longest = 40 if bench.dry_run else 400
    chunks = [generator.randint(1, longest) for _ in range(generator.randint(1, 5))]
    lengths = [chunk + generator.randint(0, longest) for chunk in chunks]
    pages = paged(
        lengths,
        chunks,
        num_kv_heads=case["kv_heads"],
        head_dim=case["head_dim"],
        tokens_per_page=case["tokens_per_page"],
        dtype=dtype,
        device=bench.device,
    )
    q = _random(bench, sum(chunks), case["q_heads"], case["head_dim"], dtype=dtype)
    arguments = (pages.k_cache, pages.v_cache, pages.block_tables, pages.query_start_loc, pages.seq_lens)
    options = {"scale": case["head_dim"] ** -0.5, "sliding_window": case["window"]}
    return [(paged_attention(q, *arguments, **options), paged_attention_reference(q.float(), *arguments, **options))]


def _decode(bench: Bench, generator: random.Random, dtype: torch.dtype, shape: int) -> Pairs:
    case = _attention_case(shape)
    longest = 60 if bench.dry_run else 5000
    lengths = [generator.randint(1, longest) for _ in range(generator.randint(1, 40))]
    pages = paged(
        lengths,
        [1] * len(lengths),
        num_kv_heads=case["kv_heads"],
        head_dim=case["head_dim"],
        tokens_per_page=case["tokens_per_page"],
        dtype=dtype,
        device=bench.device,
    )
    q = _random(bench, len(lengths), case["q_heads"], case["head_dim"], dtype=dtype)
    arguments = (pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens)
    options = {"scale": case["head_dim"] ** -0.5, "sliding_window": case["window"]}
    return [(decode_attention(q, *arguments, **options), decode_attention_reference(q.float(), *arguments, **options))]


def _check_sampler(bench: Bench) -> None:
    """The ids are to be the same bit for bit, whatever rules the rows have."""
    generator = torch.Generator().manual_seed(3)
    num_rows, vocabulary = (6, 500) if bench.dry_run else (96, 32_003)
    logits = 3 * torch.randn(num_rows, vocabulary, generator=generator)
    arguments = (
        torch.tensor([0.0, 1.0, 0.7, 1.3])[torch.arange(num_rows) % 4],
        torch.tensor([0, 0, 20, 1000, 1], dtype=torch.int32)[torch.arange(num_rows) % 5],
        torch.tensor([1.0, 0.9, 0.5])[torch.arange(num_rows) % 3],
        torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator),
        torch.randint(0, 1 << 34, (num_rows,), generator=generator),
    )
    expected_ids, expected_logprobs = sample_reference(logits, *arguments)
    ids, logprobs = sample(logits.to(bench.device), *[argument.to(bench.device) for argument in arguments])
    equal = int((ids.cpu() == expected_ids).sum())
    deviation = float((logprobs.cpu() - expected_logprobs).abs().max())
    ok = equal == num_rows and deviation < 1e-4
    bench.add(PART, "sampler", {"rows": num_rows, "equal": equal, "logprob_deviation": deviation, "ok": ok})
