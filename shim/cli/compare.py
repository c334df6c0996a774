"""`aiexport-edge compare`: the same requests at two servers, and where their replies differ in shape.

Owns the file of requests, who is asked with which key, and what is printed; what a shape is, `shapes` knows. Prints no
key, also where a server sends one back.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aiexport_edge.proto.units import parse_duration
from aiexport_edge.shim.cli.command import (
    CommandError,
    argument_type,
    json_option,
    load_config,
    plain,
    print_json,
)
from aiexport_edge.shim.cli.rest_client import (
    KEY_VARIABLE,
    NoReply,
    Server,
    Unreachable,
    checked_key,
    events,
    exchange,
    key_from_environment,
    own_server,
    parse_server,
)
from aiexport_edge.shim.cli.shapes import (
    Difference,
    Shape,
    differences,
    header_names,
    media_type,
    merged,
    sequence,
    shape_of,
)
from aiexport_edge.shim.cli.threads import in_thread

EPILOG = f"""\
Each line of the file is a body for POST /v2/messages, or {{"path": "/v2/…", "body": {{…}}}}; without a body it is a
GET. Both servers do the requests, and count and bill them. Values are not compared, only status, headers that clients
act on, JSON structure, error types and the order of a stream's events. Status 0: no difference; 1: some, or it could
not be done.
This installation's key is better in the environment ({KEY_VARIABLE}) than in --own-key, which others can see.

example:
  aiexport-edge compare --against https://api.example.com --key axp_live_… requests.jsonl
"""

PATH = re.compile(r"/[!-~]*")
MAX_BAD_LINES = 5  # that are named


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the file. `body` None: a GET."""

    line: int
    path: str
    body: Any


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two servers."""

    server: Server
    key: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What of a reply is compared. `failure` is None where it came whole."""

    failure: str | None
    status: str = ""
    content_type: str = ""
    headers: frozenset[str] = frozenset()
    order: tuple[str, ...] | None = None  # of a stream's events
    shape: Shape | None = None


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    url = argument_type(parse_server, "URL")
    parser.add_argument("file", metavar="FILE.jsonl", type=Path)
    parser.add_argument("--against", metavar="BASE_URL", type=url, required=True, help="the other server")
    parser.add_argument("--key", metavar="KEY", required=True, help="for the other server")
    parser.add_argument("--url", metavar="BASE_URL", type=url, help="this server (default: as configured)")
    parser.add_argument("--own-key", metavar="KEY", help=f"for this server (default: {KEY_VARIABLE})")
    duration = argument_type(parse_duration, "duration")
    parser.add_argument(
        "--timeout", metavar="60s", type=duration, default="60s", help="for one whole reply (default: 60s)"
    )
    json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    own_key = args.own_key or key_from_environment()
    if not own_key:
        raise CommandError(f"there is no key for this server; set {KEY_VARIABLE} or pass --own-key")
    server = args.url or own_server(load_config(args))
    here = Side(server, checked_key(own_key, "--own-key"))
    there = Side(args.against, checked_key(args.key, "--key"))
    requests = read_requests(args.file)
    found: list[dict[str, Any]] = []
    timeout = args.timeout.total_seconds()
    for number, request in enumerate(requests, 1):
        asked = [in_thread(partial(ask, side, request, timeout)) for side in (here, there)]
        try:
            mine, theirs = (future.result() for future in asked)
        except Unreachable as error:
            raise CommandError(str(error)) from None
        for difference in compared(mine, theirs):
            entry = {"line": request.line, **plain(difference)}
            found.append({name: _without_keys(value, here, there) for name, value in entry.items()})
            if not args.json:
                print("line {line}: {path}: here {here}; there {there}".format(**found[-1]), flush=True)
        _progress(number, len(requests))
    if args.json:
        document = {"here": here.server.url, "there": there.server.url, "requests": len(requests)}
        print_json({**document, "differences": found})
    else:
        count = f"{len(found)} differences" if len(found) != 1 else "1 difference"
        print(f"{len(requests)} requests, {count if found else 'no difference'}")
    return 1 if found else 0


def _progress(done: int, total: int) -> None:
    """On stderr, a line for every tenth of the work; nothing where it is short."""
    if total >= 20 and (done * 10 // total) > ((done - 1) * 10 // total):
        print(f"aiexport-edge: {done} of {total} requests", file=sys.stderr, flush=True)


def _without_keys(value: Any, *sides: Side) -> Any:
    if isinstance(value, str):
        for side in sides:
            value = value.replace(side.key, "[key]")
    return value


# ---------------------------------------------------------------------------------------------------- the file


def read_requests(file: Path) -> list[Request]:
    """Every request of the file, before any is sent. Raises `CommandError` naming the lines that are none."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise CommandError(f"{file} cannot be read ({error.strerror}); name a file of JSON lines") from None
    requests: list[Request] = []
    bad: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            requests.append(_request(number, line))
        except ValueError as problem:
            bad.append(f"line {number} {problem}")
    if bad:
        more = f", and {len(bad) - MAX_BAD_LINES} more" if len(bad) > MAX_BAD_LINES else ""
        raise CommandError(f"{file}: {', '.join(bad[:MAX_BAD_LINES])}{more}; nothing was sent, correct the file")
    if not requests:
        raise CommandError(f"{file} holds no request; write one a line")
    return requests


def _request(number: int, line: bytes) -> Request:
    """Raises `ValueError` with a phrase that reads on after the line's number."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    if "path" not in value:
        return Request(number, "/v2/messages", value)
    path, body = value["path"], value.get("body")
    if not isinstance(path, str) or not PATH.fullmatch(path):
        raise ValueError('has a "path" that is none, such as "/v2/messages"')
    if unknown := sorted(value.keys() - {"path", "body"}):
        raise ValueError(f'has "{unknown[0][:40]}" beside "path" and "body"')
    return Request(number, path, body)


# ---------------------------------------------------------------------------------------------------- asking


def ask(side: Side, request: Request, timeout: float) -> Reply:
    """One request at one server. Raises `Unreachable`; what else goes wrong is in the reply."""
    try:
        with exchange(side.server, request.path, body=request.body, key=side.key, timeout=timeout) as reply:
            content_type = media_type(reply.header("content-type"))
            order = None
            if content_type == "text/event-stream":
                received = list(events(reply.chunks()))
                order = sequence(name for name, _ in received)
                shape = merged(_shape(data, f"event.{name}") for name, data in received if name != "ping")
            else:
                shape = _shape(reply.body(), "body")
            names = frozenset(header_names(reply.headers))
            return Reply(None, str(reply.status), content_type, names, order, shape)
    except NoReply as error:
        return Reply(str(error))


def _shape(data: bytes | str, path: str) -> Shape:
    """Of a body or an event's data; what is no JSON is a text."""
    if not data:
        return {path: {"nothing"}}
    try:
        return shape_of(json.loads(data), path)
    except (ValueError, RecursionError):
        return {path: {"text that is no JSON"}}


def compared(here: Reply, there: Reply) -> Iterator[Difference]:
    """Where two replies differ; also where neither came, which nobody can compare."""
    if here.failure is not None or there.failure is not None:
        yield Difference("reply", here.failure or "came whole", there.failure or "came whole")
        return
    if here.status != there.status:
        yield Difference("status", here.status, there.status)
    if here.content_type != there.content_type:
        yield Difference("header content-type", here.content_type, there.content_type)
    for name in sorted(here.headers ^ there.headers):
        mine, theirs = ("present" if name in side.headers else "absent" for side in (here, there))
        yield Difference(f"header {name}", mine, theirs)
    if (here.order is None) != (there.order is None):
        return  # a stream and a document: said already, and their insides have nothing in common
    if here.order != there.order:
        yield Difference("order of events", " → ".join(here.order or ()), " → ".join(there.order or ()))
    yield from differences(here.shape or {}, there.shape or {})
