"""Recorded launches: the same bits as launched one by one, with any number of threads; memory of recordings."""

from __future__ import annotations

import gc

import pytest
import torch
from support.kernel_cases import randn

from aiexport_edge.kernels import threads
from aiexport_edge.kernels.cpu import program as programs
from aiexport_edge.kernels.cpu.program import Arena, Program
from aiexport_edge.kernels.rms_norm import add_rms_norm
from aiexport_edge.kernels.swiglu import swiglu

NUM_ROWS, WIDTH, NUM_LAYERS = 40, 64, 30
ARENA_BYTES = 1 << 20


@pytest.fixture
def everything_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MIN_SHARED_NANOSECONDS", 0.0)
    monkeypatch.setattr(programs, "MIN_WAKING_NANOSECONDS", 0.0)


def chain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Operations of which each needs the one before; their results die on the way."""
    hidden, residual = x, x
    for _ in range(NUM_LAYERS):
        hidden, residual = add_rms_norm(hidden, residual, weight, 1e-6)
    return swiglu(hidden.view(NUM_ROWS // 2, 2 * WIDTH))


def record(arena: Arena, x: torch.Tensor, weight: torch.Tensor) -> tuple[Program, torch.Tensor]:
    program = Program(arena)
    with program.recording():
        out = chain(x, weight)
    return program, out


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.usefixtures("everything_is_shared")
def test_a_program_does_what_was_recorded_on_what_is_there_when_it_runs(num_threads: int) -> None:
    """Hundreds of runs in a row: a helper that is late for one run meets the next."""
    before = threads.num_threads()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.zeros(NUM_ROWS, WIDTH), randn(generator, WIDTH)
    try:
        threads.set_num_threads(num_threads)
        program, out = record(Arena(ARENA_BYTES), x, weight)
        inputs = [randn(generator, NUM_ROWS, WIDTH) for _ in range(10)]
        expected = [chain(rows, weight) for rows in inputs]
        for number in range(300):
            x.copy_(inputs[number % 10])
            out.fill_(float("nan"))
            program.run()
            assert torch.equal(out, expected[number % 10])
    finally:
        threads.set_num_threads(before)


def test_nothing_runs_while_it_is_recorded() -> None:
    x, weight = torch.ones(NUM_ROWS, WIDTH), torch.ones(WIDTH)
    arena = Arena(ARENA_BYTES)
    arena.empty((ARENA_BYTES // 4,), torch.float32).fill_(7.0)
    program, out = record(arena, x, weight)
    assert (out == 7.0).all()
    program.run()
    assert not (out == 7.0).any()


def test_programs_take_the_same_memory() -> None:
    """What dies on the way is used again, by the same program and by the next."""
    x, weight = torch.ones(NUM_ROWS, WIDTH), torch.ones(WIDTH)
    arena = Arena(6 * x.nbytes)
    for _ in range(5):
        program, out = record(arena, x, weight)
        program.run()
        assert torch.equal(out, chain(x, weight))
        seen = arena.view(out.data_ptr(), out.shape, out.dtype)
        assert torch.equal(seen, out)
        del program, out
        gc.collect()


def test_a_view_keeps_its_memory() -> None:
    arena = Arena(4096)
    view = arena.empty((512,), torch.float32).view(2, 256)[1]
    view.fill_(3.0)
    arena.empty((512,), torch.float32).fill_(5.0)
    assert (view == 3.0).all()
    with pytest.raises(MemoryError):
        arena.empty((1024,), torch.float32)


def test_an_arena_joins_what_comes_back() -> None:
    arena = Arena(4096)
    pieces = [arena.empty((256,), torch.float32) for _ in range(4)]
    for number in (1, 3, 0, 2):
        pieces[number] = torch.empty(0)
    gc.collect()
    assert arena.empty((1024,), torch.float32).shape == (1024,)
    assert arena.empty((0, 5), torch.float32).shape == (0, 5)
