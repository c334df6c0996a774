"""The generator against the vectors that its authors publish with Random123 (`kat_vectors`, philox4x32 10 rounds)."""

from __future__ import annotations

import pytest
import torch

from aiexport_edge.kernels.philox import philox_reference, uniform_reference

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    seed = key[1] << 32 | key[0]
    signed = seed - (1 << 64) if seed >> 63 else seed
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert philox_reference(torch.tensor(signed), (c0, c1, c2, c3)).tolist() == list(words)


def test_counters_broadcast() -> None:
    zero = torch.tensor(0)
    words = philox_reference(torch.tensor(7), (torch.arange(5), zero, zero, zero))
    assert words.shape == (5, 4)
    assert words[3].tolist() == philox_reference(torch.tensor(7), (torch.tensor(3), zero, zero, zero)).tolist()
    assert bool(((words >= 0) & (words < 1 << 32)).all())


def test_uniforms_stay_inside() -> None:
    uniform = uniform_reference(torch.tensor([0, 511, 512, 0xFFFFFFFF]))
    assert uniform.tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24]
