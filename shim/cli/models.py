"""`aiexport-edge models`: what the configuration serves, whether its files are whole, and an import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aiexport_edge.proto.config import Config, ModelSpec, source_directory
from aiexport_edge.shim.cli import manifest, models_import
from aiexport_edge.shim.cli.command import (
    CommandError,
    common_options,
    json_option,
    load_config,
    print_json,
    print_table,
)
from aiexport_edge.shim.cli.weights import inspect_weights

EPILOG = """\
example:
  aiexport-edge models list
  aiexport-edge models verify apex-haiku-4-20250401
  aiexport-edge models import /media/usb/Qwen2.5-0.5B-Instruct
"""

IMPORT_EPILOG = """\
Hard-linked where that can be, else copied; code and pickles are left out. The entry for the configuration is printed.

example:
  aiexport-edge models import /media/usb/Qwen2.5-0.5B-Instruct
  aiexport-edge models import qwen.tar.gz --to /srv/models/qwen
"""


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list",
        help="the models and where their files are",
        description="The models that are served and where their files are.",
        epilog="example:\n  aiexport-edge models list --json\n",
        parents=[common_options()],
    )
    json_option(listing)
    listing.set_defaults(run=_list)
    verify = actions.add_parser(
        "verify",
        help="read every file, check it is whole, print its SHA-256",
        description="Checks that each model's files are there and whole and prints their SHA-256; status 1 where not.",
        epilog="example:\n  aiexport-edge models verify apex-haiku-4-20250401\n",
        parents=[common_options()],
    )
    verify.add_argument("model_id", metavar="MODEL_ID", nargs="?", help="default: every model")
    json_option(verify)
    verify.set_defaults(run=_verify)
    importing = actions.add_parser(
        "import",
        help="take a model in from a directory or an archive, offline",
        description="Checks a Hugging Face directory or an archive of one and takes it into STATE/models, offline.",
        epilog=IMPORT_EPILOG,
        parents=[common_options()],
    )
    importing.add_argument("source", metavar="DIR_OR_ARCHIVE", type=Path, help="a directory, .tar, .tar.gz or .zip")
    importing.add_argument("--to", metavar="DIR", type=Path, help="a new directory (default: STATE/models/NAME)")
    json_option(importing)
    importing.set_defaults(run=models_import.run)


def _list(args: argparse.Namespace) -> int:
    rows = [_row(model) for model in load_config(args).models]
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        row["size"] = f"{row['weight_bytes'] / 2**20:,.0f} MiB"
        row["files"] = row["problem"] or "complete"
    print_table(rows, ("id", "family", "source", "size", "files"), "")
    return 0


def _row(model: ModelSpec) -> dict[str, Any]:
    found = inspect_weights(source_directory(model.source))
    return {
        "id": model.id,
        "ids": model.ids,
        "family": model.family,
        "display_name": model.display_name,
        "source": model.source,
        "weights": model.weights,
        "weight_bytes": found.num_bytes,
        "complete": found.problem is None,
        "problem": found.problem,
    }


def _verify(args: argparse.Namespace) -> int:
    config = load_config(args)
    results = [_verified(name, directory) for name, directory in _directories(config, args.model_id)]
    if args.json:
        print_json(results)
    else:
        for result in results:
            for file in result["files"]:
                print(f"{file['sha256']}  {file['path']}")
            print(f"{result['weights']}: {result['problem'] or 'complete'}")
    return 0 if all(result["complete"] for result in results) else 1


def _directories(config: Config, model_id: str | None) -> list[tuple[str, Path]]:
    models = [model for model in config.models if model_id is None or model_id in model.ids]
    if not models:
        known = ", ".join(model.id for model in config.models)
        raise CommandError(f"{model_id} is not served here; the models are {known}")
    return list({model.weights: (model.weights, source_directory(model.source)) for model in models}.values())


def _verified(name: str, directory: Path) -> dict[str, Any]:
    """Where the directory was imported, its files must still be what they were."""
    found = inspect_weights(directory)
    problem, expected = found.problem, dict[str, str]()
    try:
        expected = manifest.read(directory)
    except ValueError as error:
        problem = problem or str(error)
    files = sorted({*found.files, *(directory / file for file in expected if (directory / file).is_file())})
    hashes = {file.name: manifest.sha256(file) for file in files}
    problem = problem or manifest.first_difference(directory, expected, hashes)
    return {
        "weights": name,
        "directory": directory,
        "complete": problem is None,
        "problem": problem,
        "files": [{"path": file, "bytes": file.stat().st_size, "sha256": hashes[file.name]} for file in files],
    }
