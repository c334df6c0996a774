"""`aiexport-edge bench`: how fast this installation is, and what its machine can do at best, in ten to twenty seconds.

Owns which server is measured and with which key; how is `measuring` and `machine`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from aiexport_edge.proto.config import Config
from aiexport_edge.proto.units import parse_duration
from aiexport_edge.shim.cli import machine, measuring, own_server, processes
from aiexport_edge.shim.cli.command import (
    CommandError,
    argument_type,
    json_option,
    load_config,
    make_state,
    print_json,
)
from aiexport_edge.shim.cli.rest_client import Server, checked_key, key_from_environment, parse_server
from aiexport_edge.shim.cli.rest_client import own_server as configured_server
from aiexport_edge.shim.cli.serve_lock import serving

EPILOG = """\
The running server of this state directory is measured; where none runs, one is started for the time, with the same
configuration, on free ports (and an empty state, unless [store] or [admin] need the real one). Other work on the
machine makes the numbers worse.

example:
  aiexport-edge bench
  aiexport-edge bench --streams 32 --json
"""

MAX_STREAMS = 1024


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--streams", metavar="N", type=argument_type(_count, "count"), default=8, help="(default: 8)")
    duration = argument_type(parse_duration, "duration")
    parser.add_argument(
        "--time", metavar="12s", type=duration, default="12s", help="how long replies are measured (default: 12s)"
    )
    parser.add_argument("--model", metavar="MODEL_ID", help="(default: the first Haiku model, else the first)")
    parser.add_argument(
        "--url", metavar="BASE_URL", type=argument_type(parse_server, "URL"), help="a server that runs elsewhere"
    )
    parser.add_argument("--key", metavar="KEY", help="(default: AIEXPORT_KEY, else a key that lives as long as this)")
    json_option(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= MAX_STREAMS):
        raise ValueError(f"must be a number from 1 to {MAX_STREAMS}, not {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    make_state(config.state)
    model = args.model or next((each for each in config.models if each.family == "haiku"), config.models[0]).id
    document: dict[str, Any] = {"machine": machine.facts()}
    _say("the machine's limits")
    try:
        document["limits"] = machine.limits(config.state)
    except OSError as error:
        raise CommandError(f"{config.state} can't be written ({error.strerror}); make room there") from None
    with _measured(config, args) as (server, key, note):
        document |= {"server": server.url, "note": note, "model": model}
        document |= measuring.measure(
            server, key, model, streams=args.streams, seconds=args.time.total_seconds(), say=_say
        )
    if args.json:
        print_json(document)
    else:
        print("\n".join(_table(document)))
    return 0


@contextmanager
def _measured(config: Config, args: argparse.Namespace) -> Iterator[tuple[Server, str, str]]:
    """The server, a key for it, and which server that is."""
    given = args.key or key_from_environment()
    with ExitStack() as stack:
        running = serving(config.state)
        if args.url is not None:
            server, note = args.url, "named with --url"
        elif running is not None:
            server, note = configured_server(config), f"serve, pid {running.pid}"
            if not own_server.is_ready(server):
                raise CommandError(
                    f"serve runs (pid {running.pid}), but is not ready at {server.url}; wait, or name its address with "
                    "--url"
                )
        else:
            processes.require_engine_packages()
            processes.check_models(config)
            own = stack.enter_context(own_server.own_state(config))
            key = stack.enter_context(own_server.temporary_key(own))
            _say("starting a server: none runs here")
            yield stack.enter_context(own_server.running(own, kernels=config.kernel_cache)), key, "started for this"
            return
        key = checked_key(given, "--key") if given else stack.enter_context(own_server.temporary_key(config))
        yield server, key, note


def _table(document: dict[str, Any]) -> Iterator[str]:
    facts, limits, alone, together = (document[name] for name in ("machine", "limits", "alone", "together"))
    streams = f"{together['streams']} streams"
    rows = [
        ("processor", f"{facts['processor']}, {facts['cores']} cores, load {facts['load_average_before']} before"),
        *(("card", card) for card in facts["cards"]),
        ("memory copy", f"{limits['memory_copy_gb_per_second']} GB/s"),
        ("disk", f"{limits['disk_free_gib']} GiB free, fsync {limits['fsync_ms_p50']} ms"),
        ("server", f"{document['server']} ({document['note']})"),
        ("model", document["model"]),
        ("first token alone", f"{alone['first_text_ms_p50']} ms (median of {alone['replies']})"),
        ("alone", f"{alone['tokens_per_second_p50']} tokens/s"),
        (f"first token, {streams}", f"{together['first_text_ms_p50']} ms (median of {together['replies']})"),
        (streams, f"{together['tokens_per_second']} tokens/s together"),
    ]
    width = max(len(name) for name, _ in rows)
    yield from (f"{name:<{width}}  {value}" for name, value in rows)


def _say(line: str) -> None:
    print(f"aiexport-edge: {line}", file=sys.stderr, flush=True)
