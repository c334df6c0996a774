"""Sharing kernels among threads, and where their machine code is kept."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from aiexport_edge.kernels import threads
from aiexport_edge.kernels.cpu import jit
from aiexport_edge.kernels.cpu.memory import set_int64
from aiexport_edge.kernels.rms_norm import rms_norm, rms_norm_reference
from aiexport_edge.kernels.warm import warm


def test_number_of_threads() -> None:
    before = threads.num_threads()
    try:
        for number in (1, 3, 2):
            threads.set_num_threads(number)
            assert threads.num_threads() == torch.get_num_threads() == number
    finally:
        threads.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_small_work_of_the_library_stays_on_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MIN_SHARED_NANOSECONDS", 100.0)
    with threads.sharing(100.0):
        assert torch.get_num_threads() == 3
    with threads.sharing(99.0):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads.num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_former_helpers_end() -> None:
    former = [thread for thread in threading.enumerate() if thread.name.startswith("kernel-")]
    assert len(former) >= 2
    threads.set_num_threads(1)
    for thread in former:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.usefixtures("three_threads")
def test_units_are_shared_and_each_done_once() -> None:
    """A kernel in Python: three threads meet in their first units, so all of them take part."""
    barrier = threading.Barrier(3)
    lock = threading.Lock()
    done: list[tuple[int, int]] = []

    def kernel(control: int, scratch: int, num_units: int, offset: int) -> None:
        words = threads._Control.from_address(control)
        with lock:
            words[1] += 1
        first = True
        while True:
            with lock:
                unit = words[0]
                words[0] += 1
            if unit >= num_units:
                break
            if first:
                barrier.wait(10)
                first = False
            with lock:
                done.append((unit + offset, scratch))
        with lock:
            words[1] -= 1

    threads.launch(kernel, 20, 1e9, 100, 7)
    assert sorted(unit for unit, _ in done) == list(range(7, 27))
    assert len({scratch for _, scratch in done}) == 3
    assert all(scratch % 64 == 0 for _, scratch in done)


def test_small_kernels_stay_on_their_thread() -> None:
    ran: list[str] = []

    def kernel(*_arguments: Any) -> None:
        ran.append(threading.current_thread().name)

    threads.launch(kernel, 20, 1.0, 0)
    assert ran == [threading.current_thread().name]


def test_any_thread_may_launch() -> None:
    x, weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), torch.ones(40)
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(rms_norm(x, weight, 1e-6)))
    thread.start()
    thread.join(10)
    torch.testing.assert_close(results[0], rms_norm_reference(x, weight, 1e-6))


def test_warm_leaves_machine_code() -> None:
    directory = warm()
    assert directory == jit.CACHE_DIRECTORY
    kernels = [file for file in directory.iterdir() if file.suffix == jit.SUFFIX]
    assert len(kernels) > 10
    code = (
        "import sys; from aiexport_edge.kernels.cpu import attention, norm, program, rope, sampler, swiglu\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_machine_code_that_is_not_whole_is_compiled_again() -> None:
    code = jit._code_of(_kernel_to_spoil)
    (file,) = jit.CACHE_DIRECTORY.glob(f"*_kernel_to_spoil*{jit.SUFFIX}")
    whole = file.read_bytes()
    for spoiled in (whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"no\nsuch thing"):
        file.write_bytes(spoiled)
        assert jit._code_of(_kernel_to_spoil).address != code.address
        assert file.read_bytes() != spoiled


def _kernel_to_spoil(address: int) -> None:
    set_int64(address, 0, 7)


def writable(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """Nothing else can be written."""
    monkeypatch.setattr(jit, "_is_writable", lambda place: any(place.is_relative_to(base) for base in places))


def test_cache_beside_the_code_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    beside = Path(jit.__file__).parent / "__pycache__"
    writable(monkeypatch, beside, tmp_path)
    assert jit.find_cache_directory().parent == beside
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert jit.find_cache_directory().parent == tmp_path


def test_cache_of_a_read_only_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was compiled at installation is taken along, to the user's cache or to a directory of the process's own."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    installed = tmp_path / "installed"
    monkeypatch.setattr(jit, "_HERE", installed)
    writable(monkeypatch, tmp_path / "user")
    (tmp_path / "user").mkdir()
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _name: tmp_path / "user")
    name = jit.find_cache_directory().name  # nothing installed yet
    (installed / "__pycache__" / name).mkdir(parents=True)
    (installed / "__pycache__" / name / "norm.nbc").write_text("code")

    in_user = jit.find_cache_directory()
    assert in_user == tmp_path / "user" / name
    assert (in_user / "norm.nbc").read_text() == "code"
    writable(monkeypatch)
    own = jit.find_cache_directory()
    assert (own / "norm.nbc").read_text() == "code"
    assert own.parent.stat().st_mode & 0o777 == 0o700


def test_cache_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writable(monkeypatch)
    assert jit.find_cache_directory().parent.parent == tmp_path


def test_operations_are_imported_without_numba() -> None:
    """The core loads weights meanwhile."""
    modules = "paged_attention, qk_norm_rope, rms_norm, swiglu, sampler, linear, gather, threads"
    code = f"import sys; from aiexport_edge.kernels import {modules}; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
