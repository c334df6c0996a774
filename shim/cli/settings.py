"""`aiexport-edge config`: is the file right, and what holds with its defaults."""

from __future__ import annotations

import argparse
from pathlib import Path

from aiexport_edge.shim.cli.command import common_options, json_option, load_config, print_json

EPILOG = """\
example:
  aiexport-edge config check aiexport-edge.toml
  aiexport-edge config show --json
"""


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="read a configuration file and look for its models",
        description="Reads a configuration file and looks for the models it names; status 1 where something is wrong.",
        epilog="example:\n  aiexport-edge config check aiexport-edge.toml\n",
        parents=[common_options()],
    )
    check.add_argument("file", metavar="FILE", nargs="?", type=Path, help="default: that of --config")
    json_option(check)
    check.set_defaults(run=_check)
    show = actions.add_parser(
        "show",
        help="the settings that hold, defaults included",
        description="Prints the settings that hold, defaults included, as a configuration file.",
        epilog="example:\n  aiexport-edge config show --json\n",
        parents=[common_options()],
    )
    json_option(show)
    show.set_defaults(run=_show)


def _check(args: argparse.Namespace) -> int:
    from aiexport_edge.proto.config import check_sources

    if args.file is not None:
        args.config = args.file
    config = load_config(args)
    check_sources(config)
    if args.json:
        ids = [model_id for model in config.models for model_id in model.ids]
        print_json({"file": config.path, "ok": True, "models": ids})
    else:
        what = str(config.path) if config.path is not None else "no configuration file, the defaults"
        print(f"{what}: right; {len(config.models)} models from {len(config.weights)} sets of weights")
    return 0


def _show(args: argparse.Namespace) -> int:
    from aiexport_edge.proto import config_text

    config = load_config(args)
    if args.json:
        print_json(config_text.effective(config))
    else:
        print(config_text.to_toml(config), end="")
    return 0
