"""How fast a server answers, as a client sees it: single streams first, then many at once.

Owns what is measured and how long it takes; prints nothing. Lengths adapt to the server, so that a slow one is measured
in the same time as a fast one. The client's own work is part of the numbers where both share a machine.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiexport_edge.shim.cli.command import CommandError
from aiexport_edge.shim.cli.rest_client import NoReply, Server, Unreachable, events, exchange
from aiexport_edge.shim.cli.threads import in_thread

REPLY_TIMEOUT = 120.0  # seconds
SHORT, LONG = 16, 200  # tokens of a reply
REPLIES_ALONE = 10  # at most


@dataclass(frozen=True, slots=True)
class Timing:
    """One streamed reply. Seconds from the request; tokens as its usage says."""

    first_text_s: float
    total_s: float
    output_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of the whole reply: on a busy machine its tokens can come all at once at its end."""
        return self.output_tokens / self.total_s


def one(server: Server, key: str, model: str, prompt: str, max_tokens: int) -> Timing:
    """One streamed reply. Raises `CommandError` where it is refused or fails."""
    body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}
    started = time.perf_counter()
    first, tokens = 0.0, 0
    try:
        with exchange(server, "/v2/messages/stream", body=body, key=key, timeout=REPLY_TIMEOUT) as reply:
            if reply.status != 200:
                raise CommandError(_refusal(server, reply.status, reply.body()))
            for name, data in events(reply.chunks()):
                if name == "content_block_delta" and not first:
                    first = time.perf_counter() - started
                elif name == "message_delta":
                    tokens = int(json.loads(data)["usage"]["output_tokens"])
                elif name == "error":
                    raise CommandError(f"the stream failed: {_message(data)}; see the server's log")
    except Unreachable as error:
        raise CommandError(str(error)) from None
    except NoReply as error:
        raise CommandError(f"{server.url} {error}; see its log, or try again when it has less to do") from None
    except (ValueError, KeyError, TypeError):
        raise CommandError(f"{server.url} sent no stream of messages; is its address right?") from None
    total = time.perf_counter() - started
    if not tokens:
        raise CommandError(f"{server.url} ended the stream without a token; see its log")
    return Timing(first or total, total, tokens)


def _refusal(server: Server, status: int, body: bytes) -> str:
    remedies = {
        401: "pass a key of that server with --key",
        404: "name a model that it serves with --model",
        429: "use a key of a workspace with other limits, or try again later",
        503: "try again when it has less to do",
    }
    remedy = remedies.get(status, "see its log")
    return f"{server.url} refused with status {status} ({_message(body)}); {remedy}"


def _message(body: bytes | str) -> str:
    try:
        text = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason given"
    return "".join(character for character in text if character.isprintable())[:200].rstrip(".")


def measure(
    server: Server, key: str, model: str, *, streams: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """First token and tokens/s alone, for a third of `seconds`, and of `streams` at once, for the rest.

    Each at least once, however slow the server is. `say` hears what is done next. Raises `CommandError`.
    """
    say("warming up")
    one(server, key, model, "Hello!", SHORT)
    warm = one(server, key, model, "Tell me a story.", SHORT)
    say("one stream alone")
    length = _length(warm.tokens_per_second, seconds / 10)
    alone: list[Timing] = []
    deadline = time.monotonic() + seconds / 3
    while len(alone) < REPLIES_ALONE and (not alone or time.monotonic() < deadline):
        alone.append(one(server, key, model, f"Tell me a long story about {len(alone)} bears.", length))
    say(f"{streams} streams at once")
    together, took = _together(server, key, model, streams=streams, seconds=seconds * 2 / 3, length=length)
    return {
        "alone": {
            "replies": len(alone),
            "first_text_ms_p50": _milliseconds(alone),
            "tokens_per_second_p50": round(statistics.median(timing.tokens_per_second for timing in alone), 1),
        },
        "together": {
            "streams": streams,
            "replies": len(together),
            "first_text_ms_p50": _milliseconds(together),
            "tokens_per_second": round(sum(timing.output_tokens for timing in together) / took, 1),
        },
    }


def _length(tokens_per_second: float, seconds: float) -> int:
    return max(SHORT, min(LONG, int(tokens_per_second * seconds)))


def _together(
    server: Server, key: str, model: str, *, streams: int, seconds: float, length: int
) -> tuple[list[Timing], float]:
    started = time.monotonic()

    def keep_asking(number: int) -> list[Timing]:
        timings: list[Timing] = []
        while not timings or time.monotonic() - started < seconds:
            prompt = f"Tell me a long story about {number} foxes and {len(timings)} owls."
            timings.append(one(server, key, model, prompt, length))
        return timings

    asking = [in_thread(partial(keep_asking, number)) for number in range(streams)]
    timings = [timing for each in asking for timing in each.result()]
    return timings, time.monotonic() - started


def _milliseconds(timings: list[Timing]) -> float:
    return round(statistics.median(timing.first_text_s for timing in timings) * 1000, 1)
