"""How the CPU operations are compiled and where the machine code is kept. Knows no operation.

Importing a module of this package compiles its kernels, or loads them from the cache: each kernel has one signature
(addresses and sizes as integers), so nothing is ever compiled while serving. numba's parallel loops are not used: they
double compile time and a launch costs 40 µs; `aiexport_edge.kernels.threads` shares out the work.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import compiler, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

_TYPES: dict[str, Any] = {"int": types.int64, "float": types.float64, "bool": types.boolean, "None": types.none}
_njit: Any = numba.njit  # numba is typed only in part
_compiler: Any = compiler

_HERE = Path(__file__).parent
# What machine code is made from. numba's own key for a cached function covers that function's file alone.
_SOURCES = [*sorted(_HERE.glob("*.py")), _HERE.parent / "philox.py", _HERE.parent / "sampler.py"]


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _copy_tree(source: Path, target: Path) -> None:
    """Copy a directory so that other processes see all of it or nothing; does nothing where the target exists."""
    if not source.is_dir() or target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        copy = shutil.copytree(source, Path(scratch) / "copy")
        try:
            copy.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster
                raise


def _places(beside: Path) -> Iterator[Path]:
    if wanted := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(wanted)
    yield beside
    import platformdirs  # vLLM's environment, where some of these kernels run too, does not have it

    yield platformdirs.user_cache_path("aiexport-edge")


def find_cache_directory() -> Path:
    """NUMBA_CACHE_DIR, beside the code, the user's cache directory, or a directory of this process alone.

    The first of them that can be written, and in it a directory for this very code. What was compiled when the package
    was installed (`kernels.warm`) lies beside the code and is taken along where that place is read-only.
    """
    code = [numba.__version__.encode(), *(source.read_bytes() for source in _SOURCES)]
    name = f"kernels-{hashlib.sha256(bytes(1).join(code)).hexdigest()[:16]}"
    beside = _HERE / "__pycache__"
    place = next((place for place in _places(beside) if _is_writable(place)), None)
    if place is None:
        place = Path(tempfile.mkdtemp(prefix="aiexport-edge-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    _copy_tree(beside / name, place / name)
    return place / name


CACHE_DIRECTORY = find_cache_directory()
_settings: Any = numba.config
_settings.CACHE_DIR = str(CACHE_DIRECTORY)


def kernel(function: Function) -> Function:
    """Compile now, or load from the cache. Parameters are int (int64) or float (float64). Runs without the GIL."""
    compiled = _njit(_signature(function), cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    return cast(Function, compiled)


def address_of(kernel: Callable[..., Any]) -> int:
    """Where a kernel's machine code begins. Its parameters come after numba's own two, a result and an exception."""
    compiled: Any = kernel
    (overload,) = compiled.overloads.values()
    return int(overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name))


def inner(function: Function) -> Function:
    """A function that kernels call, with parameters as theirs; returns int, bool, float or None.

    It is compiled into each kernel that calls it, once, and not inlined: to inline these takes a third longer to
    compile and runs no faster. (numba's own way, a dispatcher each, compiles every function by itself first.)
    """
    signature = _signature(function)

    def typer(_context: Any, *_arguments: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            library = context.active_code_library
            compiled = vars(library).setdefault("aiexport_edge_inner", {})
            if function not in compiled:
                compiled[function] = _compiler.compile_internal(
                    context.typing_context,
                    context,
                    library,
                    function,
                    signature.args,
                    signature.return_type,
                    _flags(),
                    {},
                ).fndesc
            callee = context.declare_function(builder.module, compiled[function])
            _, result = context.call_conv.call_function(
                builder, callee, signature.return_type, signature.args, values, attrs=("noinline",)
            )
            return result

        return signature, generate

    typer.__name__, typer.__doc__ = function.__name__, function.__doc__
    named = inspect.signature(function)
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    typer.__signature__ = named.replace(parameters=[context, *named.parameters.values()])  # type: ignore[attr-defined]
    return cast(Function, intrinsic(typer))


def _signature(function: Callable[..., Any]) -> Any:
    """numba's types for a function's annotations."""
    named = inspect.signature(function)
    parameters = [_TYPES[parameter.annotation] for parameter in named.parameters.values()]
    return _TYPES[named.return_annotation](*parameters)


def _flags() -> Any:
    flags: Any = _compiler.Flags()
    flags.nrt = flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    return flags
