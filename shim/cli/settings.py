"""`aiexport-edge config`: is the file right, does it fit a card, and what holds with its defaults."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiexport_edge.shim.cli.command import CommandError, common_options, json_option, load_config, print_json
from aiexport_edge.shim.cli.processes import check_models

if TYPE_CHECKING:
    from aiexport_edge.proto.config import Config

EPILOG = """\
example:
  aiexport-edge config check aiexport-edge.toml
  aiexport-edge config preset --card 24 > aiexport-edge.toml
  aiexport-edge config show --json
"""
GIB = 2**30
PATIENCE_S = 60


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="read a configuration file, look for its models, say what they take of memory",
        description="Reads a configuration file and looks for the models it names; status 1 where something is wrong. "
        "Says what weights, a token and the longest request take. With --card it also says whether all of that fits "
        "into a card of so many GB; then well-known models (Qwen3-VL) need not be there yet, and no card either.",
        epilog="example:\n  aiexport-edge config check aiexport-edge.toml --card 24\n",
        parents=[common_options()],
    )
    check.add_argument("file", metavar="FILE", nargs="?", type=Path, help="default: that of --config")
    check.add_argument("--card", metavar="GB", type=int, help="memory of the card that is to serve all models")
    json_option(check)
    check.set_defaults(run=_check)
    preset = actions.add_parser(
        "preset",
        help="a configuration of the three tiers for a card",
        description="Prints a configuration of the three tiers for a card of 8, 16, 24, 48, 80 or 141 GB; without "
        "--card a table of all.",
        epilog="example:\n  aiexport-edge config preset --card 24 > aiexport-edge.toml\n",
        parents=[common_options()],
    )
    preset.add_argument("--card", metavar="GB", type=int, help="memory of the card")
    json_option(preset)
    preset.set_defaults(run=_preset)
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
    if args.file is not None:
        args.config = args.file
    if args.card is not None and args.card < 1:
        raise CommandError(f"--card is the card's memory in GB, such as 24, not {args.card}")
    config = load_config(args)
    elsewhere = _not_here(config) if args.card is None else []
    options = ["--state", str(config.state)] + ([] if config.path is None else ["--config", str(config.path)])
    if args.card is not None:
        options += ["--card", str(args.card)]
    elif not elsewhere:
        check_models(config)
    memory = {"models": [], "card": None} if elsewhere else _ask_engine(*options)
    if args.json:
        ids = [model_id for model in config.models for model_id in model.ids]
        print_json(
            {"file": config.path, "ok": True, "models": ids, "weights": memory["models"], "card": memory["card"]}
        )
        return 0
    what = str(config.path) if config.path is not None else "no configuration file, the defaults"
    print(f"{what}: right; {len(config.models)} models from {len(config.weights)} sets of weights")
    for name in elsewhere:
        print(f"  {name}: not on this machine; the engines of [shim] engines have it")
    for model in memory["models"]:
        print(f"  {_sentence(model)}")
    card = memory["card"]
    if card is not None:
        parts = ", ".join(f"{part} {card[f'{part}_bytes'] / GIB:.1f}" for part in ("weight", "step", "picture", "pool"))
        print(f"  a card of {card['gb']} GB: {card['bytes'] / GIB:.1f} GiB, by parts: {parts}")
    return 0


def _not_here(config: Config) -> list[str]:
    """The models that only engines on other machines have: a front needs no weights."""
    from aiexport_edge.proto.config import source_directory

    if not config.shim.engines:
        return []
    return [weights.name for weights in config.weights if not source_directory(weights.source).is_dir()]


def _preset(args: argparse.Namespace) -> int:
    found = _ask_engine("--preset", *([] if args.card is None else ["--card", str(args.card)]))
    if args.json:
        print_json(found["preset"] if "preset" in found else {"cards": found["cards"]})
    else:
        print(found["toml"] if "toml" in found else found["table"], end="")
    return 0


def _show(args: argparse.Namespace) -> int:
    from aiexport_edge.proto import config_text

    config = load_config(args)
    if args.json:
        print_json(config_text.effective(config))
    else:
        print(config_text.to_toml(config), end="")
    return 0


def _ask_engine(*options: str) -> dict[str, Any]:
    """What the engine's own reader of models says, in a process of its own: the shim knows no models."""
    command = [sys.executable, "-m", "aiexport_edge.engine.check", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CommandError(
            f"the engine cannot be asked about its models ({error}); is all of aiexport-edge installed here?"
        ) from None
    if not found["ok"]:
        raise CommandError(found["problem"])
    return found


def _sentence(model: dict[str, Any]) -> str:
    whole = f"{model['request_bytes'] / GIB:.2f} GiB for a request of its whole context of {model['window']} tokens"
    held = f"; the pool holds {model['pool_tokens']}" if "pool_tokens" in model else ""
    return (
        f"{model['name']}: {model['num_parameters'] / 1e6:,.0f} million parameters, weights "
        f"{model['weight_bytes'] / GIB:.2f} GiB; {model['token_bytes'] / 1024:.0f} KiB a token, {whole}{held}"
    )
