"""A client that sends pictures, eight at a time: `python -m support.picture_client URL KEY MODEL FILE` as a process of
its own, so that what it does to encode them holds up nobody's clock. FILE holds the pictures; prints the statuses.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
from support.seeing import image_block

AT_ONCE = 8


async def answers(
    client: httpx.AsyncClient, model: str, pictures: Sequence[tuple[str, bytes]]
) -> list[tuple[int, str]]:
    """Status and body of what each picture (media type, file) is answered."""
    places = asyncio.Semaphore(AT_ONCE)

    async def ask(media_type: str, data: bytes) -> tuple[int, str]:
        async with places:
            content = [{"type": "text", "text": "?"}, image_block(data, media_type)]
            turns = [{"role": "user", "content": content}]
            body = {"model": model, "max_tokens": 1, "temperature": 0, "messages": turns}
            response = await client.post("/v2/messages", json=body)
            return response.status_code, response.text

    return await asyncio.gather(*(ask(*picture) for picture in pictures))


async def send(url: str, key: str, model: str, pictures: Sequence[tuple[str, bytes]]) -> None:
    """Prints the statuses."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=120, limits=limits) as client:
        print(json.dumps([status for status, _ in await answers(client, model, pictures)]), flush=True)


if __name__ == "__main__":
    address, key_, model_, file = sys.argv[1:]
    to_send = pickle.loads(Path(file).read_bytes())
    print("ready", flush=True)
    sys.stdin.readline()
    asyncio.run(send(address, key_, model_, to_send))
