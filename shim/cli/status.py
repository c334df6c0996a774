"""`aiexport-edge status`: whether the service answers, and how each of its engines is, as the engines say."""

from __future__ import annotations

import argparse
import json
from typing import Any

from aiexport_edge.proto.config import Config
from aiexport_edge.shim.cli.command import json_option, load_config, print_json
from aiexport_edge.shim.cli.listeners import find_engine_socket
from aiexport_edge.shim.cli.rest_client import NoReply, Unreachable, exchange, own_server
from aiexport_edge.shim.cli.serve_lock import serving

EPILOG = """\
example:
  aiexport-edge status
  aiexport-edge status --json
"""


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Status 1 where no model can be served or an engine is away."""
    from aiexport_edge.shim.engines.access import EngineAccess
    from aiexport_edge.shim.engines.probe import look_at

    config = load_config(args)
    shim = config.shim
    access = EngineAccess(shim.engine_ca, shim.engine_cert, shim.engine_key, shim.engine_token_file)
    service = _service(config)
    engines = look_at(engine_targets(config), access)
    if args.json:
        print_json({"service": service, "engines": engines})
    else:
        print(f"service   {service['status']}" + (f": {service['reason']}" if "reason" in service else ""))
        for model in service.get("models", ()):
            print(f"model     {model['id']}: {model['state']}")
        for seen in engines:
            print(f"engine    {seen.address}: {seen.state}" + (f" ({seen.reason})" if seen.reason else ""))
            if seen.state != "away":
                pages = f"{seen.pages_used} of {seen.pages_total} pages"
                print(f"          {seen.running} running, {seen.waiting} waiting, {pages}, up {seen.uptime_s} s")
            for of_engine in seen.models:
                why = f" ({of_engine.message})" if of_engine.message else ""
                print(f"          {of_engine.name} {of_engine.state}, revision {of_engine.revision[:12]}{why}")
    well = service["status"] in ("operational", "degraded") and all(seen.state != "away" for seen in engines)
    return 0 if well else 1


def engine_targets(config: Config) -> tuple[str, ...]:
    """The engines of the shim here: that of `serve` where it runs, and those of the configuration."""
    if serving(config.state) is None:
        return config.engine_addresses
    own = find_engine_socket(config.state)
    return (*([f"unix:{own}"] if own is not None else []), *config.shim.engines)


def _service(config: Config) -> dict[str, Any]:
    try:
        with exchange(own_server(config), "/status", timeout=5, headers={"Accept": "application/json"}) as reply:
            document = json.loads(reply.body())
    except (Unreachable, NoReply) as error:
        return {"status": "unreachable", "reason": str(error)}
    except ValueError:
        return {"status": "unreachable", "reason": "what answers there is another server"}
    return document if isinstance(document, dict) and "status" in document else {"status": "unreachable"}
