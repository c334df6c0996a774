"""`doctor` on a machine with an NVIDIA card: the card, its driver, and what Triton needs to compile at run time.

Triton builds a small launcher with a C compiler against Python's headers, and keeps what it has compiled in a cache.
Loads neither torch nor triton.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING, Check

LOWEST_CAPABILITY = (8, 0)
PATIENCE_S = 20
PROGRAM = "#include <Python.h>\nint main(void) { return 0; }\n"


def has_card() -> bool:
    """Whether there is an NVIDIA card, or at least something of its driver."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def cards() -> Iterator[Check]:
    """Each card, and whether the kernels run on it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield Check("gpu", PROBLEM, "there is one, but no nvidia-smi", "install the NVIDIA driver's tools")
        return
    try:
        done = _query(smi, "name,memory.total,driver_version")
        capabilities = _query(smi, "compute_cap")
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check("gpu", PROBLEM, f"nvidia-smi does not answer ({error})", "restart the driver, or the machine")
        return
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        detail = (done.stderr or done.stdout).strip() or "nvidia-smi lists none"
        yield Check("gpu", PROBLEM, detail, "install a driver that fits the card, then restart the machine")
        return
    # A driver that is too old to say the capability is not for that reason wrong: the engine asks the card itself.
    known = capabilities.stdout.strip().splitlines() if capabilities.returncode == 0 else []
    for index, line in enumerate(lines):
        capability = known[index].strip() if len(known) == len(lines) else ""
        if capability and _version(capability) < LOWEST_CAPABILITY:
            detail = f"{line}: compute capability {capability}, and the kernels need 8.0 (Ampere) or newer"
            yield Check("gpu", PROBLEM, detail, 'use another card, or the processor: [engine] device = "cpu"')
        else:
            yield Check("gpu", OK, line + (f", compute capability {capability}" if capability else ""))


def triton(cache: Path) -> Iterator[Check]:
    """What Triton needs at run time; `cache` is where it keeps compiled kernels."""
    try:
        yield Check("triton", OK, importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        remedy = "install a PyTorch built for CUDA, which brings it: https://pytorch.org/get-started"
        yield Check("triton", PROBLEM, "not installed: no kernel can run on the card", remedy)
    yield _compiler()
    yield _cache(cache)


def _compiler() -> Check:
    """A C compiler that Triton finds, and that compiles against Python's headers."""
    # As Triton looks for it: CC, else gcc, else clang; `cc` alone it does not take.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        remedy = "install gcc (Debian: apt install gcc): Triton builds its launchers with it"
        return Check("c compiler", PROBLEM, "none: neither CC, gcc nor clang", remedy)
    include = Path(sysconfig.get_paths(scheme="posix_prefix")["include"])
    if not (include / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        remedy = f"install Python's headers (Debian: apt install python{version}-dev): Triton compiles against them"
        return Check("python headers", PROBLEM, f"there is no {include / 'Python.h'}", remedy)
    command = [*shlex.split(compiler), "-fsyntax-only", f"-I{include}", "-x", "c", "-"]
    try:
        done = subprocess.run(command, input=PROGRAM, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("c compiler", PROBLEM, f"{compiler} does not run ({error})", "correct CC, or install gcc")
    if done.returncode != 0:
        said = next(iter(done.stderr.strip().splitlines()), f"status {done.returncode}")
        remedy = "install gcc with its C library's headers (Debian: apt install gcc libc6-dev)"
        return Check("c compiler", PROBLEM, f"{compiler} cannot compile a small program: {said}", remedy)
    return Check("c compiler", OK, f"{compiler}, with Python's headers")


def _cache(cache: Path) -> Check:
    """A directory that can be written, or made."""
    there = next(path for path in (cache, *cache.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        remedy = "give this user the right to write there, or name another place: TRITON_CACHE_DIR"
        return Check("kernel cache", PROBLEM, f"{cache} cannot be written", remedy)
    if there == cache and any(cache.iterdir()):
        return Check("kernel cache", OK, str(cache))
    return Check("kernel cache", WARNING, f"{cache} is empty: the first start compiles every kernel, a minute or two")


def _query(smi: str, fields: str) -> subprocess.CompletedProcess[str]:
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
