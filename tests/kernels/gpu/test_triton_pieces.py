"""What the kernels and their tests stand on: FP8 by its bits, and the interpreter's bfloat16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.elementwise import E4M3_DECODED_SCALE, decode_e4m3, encode_e4m3


@triton.jit
def _encode(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, encode_e4m3(tl.load(x + index)))


@triton.jit
def _decode(codes, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, decode_e4m3(tl.load(codes + index), out.dtype.element_ty))


@triton.jit
def _arithmetic(x, y, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(out + index, tl.where(a > b, a * b + a, a - b))


def finite_codes() -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[(codes & 0x7F) != 0x7F]


def test_every_e4m3_code_decodes_exactly() -> None:
    codes = torch.nn.functional.pad(finite_codes(), (0, 2))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = torch.full((256,), float("nan"), dtype=dtype)
        _decode[(1,)](codes, out, BLOCK=256)
        expected = codes.view(torch.float8_e4m3fn).float()
        torch.testing.assert_close(out.float() * E4M3_DECODED_SCALE, expected, rtol=0, atol=0)


def test_e4m3_rounds_like_torch_and_saturates() -> None:
    exact = finite_codes().view(torch.float8_e4m3fn).float().unique()
    ties = (exact[1:] + exact[:-1]) / 2
    values = torch.cat((exact, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)))
    values = torch.cat((values, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 2**-10, 3 * 2**-10])))
    values = torch.cat((values, 200 * torch.randn(1000, generator=torch.Generator().manual_seed(0))))
    block = 4096
    values = torch.nn.functional.pad(values, (0, block - len(values)))
    codes = torch.full((block,), 0xAA, dtype=torch.uint8)
    _encode[(1,)](values, codes, BLOCK=block)
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes, expected.view(torch.uint8))
    beyond = torch.tensor([1e9, -1e9, float("inf"), 449.0])
    codes = torch.zeros(4, dtype=torch.uint8)
    _encode[(1,)](beyond, codes, BLOCK=4)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 448.0, 448.0]


def test_the_interpreter_computes_bfloat16() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 256, generator=generator).bfloat16()
    out = torch.full_like(x, float("nan"))
    _arithmetic[(1,)](x, y, out, BLOCK=256)
    assert torch.equal(out, torch.where(x > y, x * y + x, x - y))
