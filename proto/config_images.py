"""`[images]`: what a picture in a request may be, from where one is fetched, and what decoding may take.

An entry of `allow` is written as those of `[webhooks] allow`. Without entries no URL is fetched: pictures come in the
request itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.config_webhooks import address_rules
from aiexport_edge.proto.units import parse_duration, parse_size

LEAST_PIXELS = 4096
MOST_PIXELS = 256_000_000


@dataclass(frozen=True, slots=True)
class ImagesConfig:
    """`max_bytes` and `max_pixels` are of one picture, as a file and as it is decoded; `max_count` is of a request.

    `max_tokens` 0: as many of a picture as its model takes by itself; else larger ones are made smaller. `held_bytes`:
    files and pixels that the engine holds at one time, over all requests. `workers` 0: one for every four processor
    cores, at least one. `fetch_timeout` is for one URL, `decode_timeout` for one picture.
    """

    allow: tuple[str, ...] = ()
    max_bytes: int = 10 << 20
    max_pixels: int = 64_000_000
    max_count: int = 20
    max_tokens: int = 0
    held_bytes: int = 512 << 20
    workers: int = 0
    fetch_timeout: timedelta = timedelta(seconds=10)
    decode_timeout: timedelta = timedelta(seconds=60)


def read_images(table: Table) -> ImagesConfig:
    default = ImagesConfig()
    images = ImagesConfig(
        allow=table.take("allow", address_rules, default.allow),
        max_bytes=table.take("max_bytes", parse_size, default.max_bytes),
        max_pixels=table.take("max_pixels", values.integer(LEAST_PIXELS, MOST_PIXELS), default.max_pixels),
        max_count=table.take("max_count", values.integer(0, 1000), default.max_count),
        max_tokens=table.take("max_tokens", values.integer(0, 1 << 20), default.max_tokens),
        held_bytes=table.take("held_bytes", parse_size, default.held_bytes),
        workers=table.take("workers", values.integer(0, 64), default.workers),
        fetch_timeout=table.take("fetch_timeout", parse_duration, default.fetch_timeout),
        decode_timeout=table.take("decode_timeout", parse_duration, default.decode_timeout),
    )
    table.end()
    if images.held_bytes < 4 * images.max_bytes:
        raise table.error("held_bytes", "must be at least four times max_bytes, or a few pictures fill it")
    for name, value in (("fetch_timeout", images.fetch_timeout), ("decode_timeout", images.decode_timeout)):
        if not timedelta(seconds=1) <= value <= timedelta(minutes=5):
            raise table.error(name, "must be from 1s to 5m")
    return images
