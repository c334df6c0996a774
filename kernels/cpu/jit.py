"""How the CPU operations are compiled and where the machine code is kept. Knows no operation.

Importing a module of this package compiles its kernels, or loads them from the cache: each kernel has one signature
(addresses and sizes as integers), so nothing is ever compiled while serving. numba compiles, and is imported only then:
that takes as long as a third of torch does. Machine code from the cache is linked by LLVM alone and called through
ctypes. numba's parallel loops are not used: they double compile time and a launch costs 40 µs;
`aiexport_edge.kernels.threads` shares out the work.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite  # type: ignore[import-untyped]
import llvmlite.binding as llvm  # type: ignore[import-untyped]

Function = TypeVar("Function", bound=Callable[..., Any])

_NUMBA_NAMES = {"int": "int64", "float": "float64", "bool": "boolean", "None": "none"}
_C_TYPES = {"int": ctypes.c_int64, "float": ctypes.c_double}

_HERE = Path(__file__).parent
# What machine code is made from, all of it: kernels call functions of other files.
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

    with contextlib.suppress(RuntimeError):  # of a user without a home
        yield platformdirs.user_cache_path("aiexport-edge")


def host_features() -> str:
    """The processor that is compiled for, feature by feature: this one, unless NUMBA_CPU_FEATURES says otherwise."""
    features: str = os.environ.get("NUMBA_CPU_FEATURES") or llvm.get_host_cpu_features().flatten()
    return features


def _compilers() -> Iterator[bytes]:
    """What else than the sources machine code depends on."""
    numba = importlib.util.find_spec("numba")
    assert numba is not None
    assert numba.origin is not None
    yield (Path(numba.origin).parent / "_version.py").read_bytes()
    yield llvmlite.__version__.encode()
    yield (os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()).encode()
    yield host_features().encode()


def find_cache_directory() -> Path:
    """NUMBA_CACHE_DIR, beside the code, the user's cache directory, or a directory of this process alone.

    The first of them that can be written, and in it a directory for this very code. What was compiled when the package
    was installed (`kernels.warm`) lies beside the code and is taken along where that place is read-only.
    """
    code = [*_compilers(), *(source.read_bytes() for source in _SOURCES)]
    name = f"kernels-{hashlib.sha256(bytes(1).join(code)).hexdigest()[:16]}"
    beside = _HERE / "__pycache__"
    place = next((place for place in _places(beside) if _is_writable(place)), None)
    if place is None:
        place = Path(tempfile.mkdtemp(prefix="aiexport-edge-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    _copy_tree(beside / name, place / name)
    return place / name


CACHE_DIRECTORY = find_cache_directory()
SUFFIX = ".code"


class Kernel:
    """Machine code that is called with its parameters, without the GIL. `address`: where it begins. Its parameters come
    after two that numba's functions have, a result and an exception.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        functools.update_wrapper(self, function)
        self._code = _code_of(function)
        self.address: int = self._code.address
        named = inspect.signature(function).parameters.values()
        parameters: list[Any] = [_C_TYPES[parameter.annotation] for parameter in named]
        form = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *parameters)
        self._call = form(self.address)

    def __call__(self, *arguments: float) -> None:
        status = self._call(_NOWHERE, _NOWHERE, *arguments)
        assert status in (0, _NONE_RETURNED), status


_nowhere = ctypes.create_string_buffer(16)  # for results and exceptions, of which there are none
_NOWHERE = ctypes.addressof(_nowhere)
_NONE_RETURNED = -2  # numba's word for a function that returns None


def kernel(function: Function) -> Function:
    """Compile now, or load from the cache. Parameters are int (int64) or float (float64). Runs without the GIL."""
    return cast(Function, Kernel(function))


def address_of(kernel: Callable[..., Any]) -> int:
    """Where a kernel's machine code begins."""
    return cast(Kernel, kernel).address


class _Code:
    """A function's machine code, linked."""

    def __init__(self, symbol: str, code: bytes) -> None:
        machine = _target().create_target_machine(opt=3, jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)  # owns the memory
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(symbol)
        if not self.address:
            raise ValueError(f"no {symbol} in this machine code")


@functools.cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


@functools.cache
def _hash_of_file(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _code_of(function: Callable[..., None]) -> _Code:
    """From the cache, where it is there and whole; else from the compiler, and then into the cache if that can be."""
    source = _hash_of_file(function.__code__.co_filename)  # a test's kernels are none of `_SOURCES`
    file = CACHE_DIRECTORY / f"{function.__module__}.{function.__qualname__}-{source}{SUFFIX}"
    try:
        symbol, digest, code = file.read_bytes().split(b"\n", 2)
        if hashlib.sha256(code).hexdigest().encode() == digest:
            return _Code(symbol.decode(), code)
    except (OSError, ValueError):
        pass
    name, code = _compile(function)
    with contextlib.suppress(OSError):  # the next process compiles again
        CACHE_DIRECTORY.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE_DIRECTORY) as scratch:
            whole = Path(scratch) / file.name
            whole.write_bytes(b"\n".join((name.encode(), hashlib.sha256(code).hexdigest().encode(), code)))
            whole.replace(file)
    return _Code(name, code)


def _compile(function: Callable[..., None]) -> tuple[str, bytes]:
    """The symbol of a function's machine code, and the object file that it is in."""
    import numba

    njit: Any = numba.njit  # numba is typed only in part
    compiled = njit(_signature(function), error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True)(function)
    (overload,) = compiled.overloads.values()
    _, _, (code, _) = overload.library.serialize_using_object_code()
    return overload.fndesc.llvm_func_name, code


class Inline:
    """A function that kernels call and Python cannot. numba, when it compiles a kernel, asks for `_numba_type_`."""

    def __init__(self, typer: Callable[..., Any]) -> None:
        """`typer`: as `numba.extending.intrinsic` has it."""
        self.__name__, self.__doc__ = typer.__name__, typer.__doc__
        self._typer = typer

    @functools.cached_property
    def _numba_type_(self) -> Any:
        from numba.core import types
        from numba.core.typing.templates import make_intrinsic_template

        make: Any = make_intrinsic_template
        return types.Function(make(self, self._typer, self._typer.__name__))


def inner(function: Function) -> Function:
    """A function that kernels call, with parameters as theirs; returns int, bool, float or None.

    It is compiled into each kernel that calls it, once, and not inlined: to inline these takes a third longer to
    compile and runs no faster. (numba's own way, a dispatcher each, compiles every function by itself first.)
    """

    def typer(_context: Any, *_arguments: Any) -> Any:
        from numba.core import compiler

        compile_internal: Any = compiler.compile_internal
        signature = _signature(function)

        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            library = context.active_code_library
            compiled = vars(library).setdefault("aiexport_edge_inner", {})
            if function not in compiled:
                compiled[function] = compile_internal(
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
    return cast(Function, Inline(typer))


def _signature(function: Callable[..., Any]) -> Any:
    """numba's types for a function's annotations."""
    from numba.core import types

    named = inspect.signature(function)
    parameters = [getattr(types, _NUMBA_NAMES[parameter.annotation]) for parameter in named.parameters.values()]
    return getattr(types, _NUMBA_NAMES[named.return_annotation])(*parameters)


def _flags() -> Any:
    from numba.core import compiler

    make: Any = compiler.Flags
    flags = make()
    flags.nrt = flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    return flags
