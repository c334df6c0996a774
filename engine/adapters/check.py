"""`python -m aiexport_edge.engine.adapters.check --model DIR --adapter DIR`: whether an adapter fits a model.

Prints one JSON document: "rank", the largest of its products, and "problem", a sentence or null. Reads headers alone,
and imports no torch. Exit status: 0, or 1 with a problem.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from aiexport_edge.engine.adapters.peft import AdapterError, read_header
from aiexport_edge.engine.models.config import ModelConfig, ModelError


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m aiexport_edge.engine.adapters.check", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        factors = read_header(options.adapter, ModelConfig.load(options.model))
    except (AdapterError, ModelError) as error:
        print(json.dumps({"rank": None, "problem": str(error)}))
        return 1
    print(json.dumps({"rank": max(each.rank for each in factors), "problem": None}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
