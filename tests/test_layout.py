"""How the house is laid out: who may import whom, and that the links, not bare names, are what everything goes by."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("engine", "kernels", "shim", "proto")
HEAVY = ("torch", "numpy", "numba", "transformers", "tokenizers", "safetensors")
# The core's verbs but `run`: pure bookkeeping, tested in milliseconds.
TENSOR_FREE = (
    "admission",
    "commit",
    "drafting",
    "fairness",
    "loop",
    "pages",
    "pictures",
    "pipeline",
    "plan",
    "prefill_pace",
    "prefix",
    "protocol",
    "ranking",
    "request",
    "roster",
    "scheduler",
    "suspects",
    "vision_work",
    "waiting",
)


# What each of the engine's folders may not know: those above it.
ABOVE = {
    "adapters": ("backends", "core", "server", "structured", "text"),
    "images": ("backends", "core", "server", "structured", "text"),
    "models": ("backends", "core", "server", "structured", "text"),
    "structured": ("adapters", "backends", "core", "images", "models", "server", "text"),
    "text": ("adapters", "backends", "core", "images", "models", "server", "structured"),
    "core": ("backends", "server", "text"),
    "backends": ("server", "text"),
}


def sources(part: str) -> list[Path]:
    found = sorted(path for path in (ROOT / part).rglob("*.py") if "_pb2" not in path.name)
    assert found
    return found


def package_of(path: Path) -> str:
    """The dotted package that relative imports in `path` count from."""
    return ".".join(("aiexport_edge", *path.relative_to(ROOT).parent.parts))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere, type-checking blocks included: line and dotted name.

    `from a import b` yields both `a` and `a.b`, since `b` may be a module.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package_of(path).split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def needed(path: Path) -> Iterator[str]:
    """What a file imports at module level, and so before it can be imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(paths: list[Path], forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return sorted(
        {
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for path in paths
            for line, name in imports(path)
            if within(name, forbidden) and not within(name, allowed)
        }
    )


def ours(*except_parts: str) -> tuple[str, ...]:
    return tuple(f"aiexport_edge.{part}" for part in PARTS if part not in except_parts)


def test_shim_knows_no_tensors_and_no_engine() -> None:
    assert offences(sources("shim"), (*HEAVY, *ours("shim", "proto"))) == []


def test_proto_knows_only_itself() -> None:
    assert offences(sources("proto"), (*HEAVY, *ours("proto"))) == []


def test_kernels_know_only_themselves() -> None:
    assert offences(sources("kernels"), ours("kernels")) == []


def test_engine_knows_no_shim() -> None:
    assert offences(sources("engine"), ours("engine", "kernels", "proto")) == []


def test_scheduling_knows_no_tensors() -> None:
    paths = [ROOT / "engine" / "core" / f"{name}.py" for name in TENSOR_FREE]
    assert [path.name for path in paths if not path.exists()] == []
    assert offences(paths, (*HEAVY, "aiexport_edge.kernels", "aiexport_edge.engine.core.runner")) == []


def test_core_knows_no_text_and_no_grpc() -> None:
    assert offences(sources("engine/core"), ("grpc", "jinja2", "tokenizers", "aiexport_edge.proto.engine_pb2")) == []


@pytest.mark.parametrize("folder", ABOVE)
def test_the_engine_has_floors(folder: str) -> None:
    above = tuple(f"aiexport_edge.engine.{name}" for name in ABOVE[folder])
    assert offences(sources(f"engine/{folder}"), above) == []


def test_kernels_of_one_device_know_no_other() -> None:
    assert offences(sources("kernels/cpu"), ("triton", "aiexport_edge.kernels.gpu")) == []
    assert offences(sources("kernels/gpu"), ("llvmlite", "numba", "aiexport_edge.kernels.cpu")) == []


def test_files_can_be_read_in_an_order() -> None:
    """No file needs, by way of others, one that needs it."""
    paths = {
        ".".join(("aiexport_edge", *path.relative_to(ROOT).with_suffix("").parts)): path
        for part in PARTS
        for path in sources(part)
    }
    graph = {name: {other for other in needed(path) if other in paths} for name, path in paths.items()}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_nothing_goes_by_a_bare_name() -> None:
    everywhere = [path for part in (*PARTS, "tests", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    assert offences(everywhere, PARTS) == []


def test_the_four_are_namespace_folders() -> None:
    assert [part for part in PARTS if (ROOT / part / "__init__.py").exists()] == []
    for part in PARTS:
        link = ROOT / "aiexport_edge" / part
        assert link.is_symlink()
        assert link.resolve() == ROOT / part


@pytest.mark.parametrize("part", PARTS)
def test_folders_below_have_their_docstring(part: str) -> None:
    for folder in sorted({path.parent for path in sources(part)} - {ROOT / part}):
        if "versions" in folder.parts or "migrations" in folder.parts:
            continue  # Alembic loads these by path
        init = folder / "__init__.py"
        assert init.exists(), f"{folder.relative_to(ROOT)} has no __init__.py"
        assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), init


@pytest.mark.parametrize(
    "module",
    [
        "aiexport_edge.shim.server",
        "aiexport_edge.shim.app",
        "aiexport_edge.shim.cli.main",
        "aiexport_edge.shim.cli.serve",
        "aiexport_edge.shim.cli.doctor",
        "aiexport_edge.proto.config",
        "aiexport_edge.engine.core.loop",  # and with it all of TENSOR_FREE
    ],
)
def test_importing_loads_no_torch(module: str) -> None:
    """What the source says is one thing, what its imports drag in another."""
    code = f"import sys, {module}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_command_line_starts_without_the_server() -> None:
    """`--version` and `--help` answer at once: nothing heavy is imported before a command needs it."""
    heavy = (*HEAVY, "grpc", "sqlalchemy", "starlette", "uvicorn", "alembic", "google.protobuf")
    code = (
        "import sys\nfrom aiexport_edge.shim.cli.main import build_parser\nbuild_parser().parse_args(['serve'])\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_an_engine_begins_its_core_before_all_else() -> None:
    """A core's imports are the longest part of a start: what its parent imports before it forks comes on top."""
    later = (*HEAVY, "asyncio", "msgspec", "grpc", "uvloop", "google.protobuf")
    code = (
        "import sys, aiexport_edge.engine.__main__, aiexport_edge.engine.backends.spawn\n"
        f"print([name for name in {later!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
