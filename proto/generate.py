"""Writes the Python stubs of `engine.proto` beside it, or checks that the committed ones are what it would write.

python -m aiexport_edge.proto.generate            write
python -m aiexport_edge.proto.generate --check    exit 1 if they differ
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUBS = ("engine_pb2.py", "engine_pb2.pyi", "engine_pb2_grpc.py")


def generate(out: Path) -> None:
    """Runs protoc so that the stubs land in `out`/aiexport_edge/proto and import each other by the project's names."""
    from grpc_tools import protoc

    include = resources.files("grpc_tools") / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-Iaiexport_edge/proto={HERE}",
            f"-I{include}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            "aiexport_edge/proto/engine.proto",
        ]
    )
    if code != 0:
        raise SystemExit(f"protoc failed with {code}: see its message above")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        written = Path(tmp) / "aiexport_edge" / "proto"
        stale = [
            name
            for name in STUBS
            if not (HERE / name).exists() or (HERE / name).read_bytes() != (written / name).read_bytes()
        ]
        if not check:
            for name in stale:
                (HERE / name).write_bytes((written / name).read_bytes())
        for name in stale:
            print(f"{name}: {'differs; run python -m aiexport_edge.proto.generate' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
