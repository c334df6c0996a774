"""Fetches pictures from URLs: from addresses that `[images] allow` names, once, within a time and a size.

Whatever goes wrong is an error of the request that names the block: who sent it chose the URL. No redirect is followed,
as it could lead where the list does not. What a host answers is never shown but for its status and its kind.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiexport_edge.proto.version import product_version
from aiexport_edge.shim.errors import NotFetched, quoted
from aiexport_edge.shim.images.sources import MEDIA_TYPES, ImageData, ImageLink, ImageRules, ImageSource
from aiexport_edge.shim.outgoing import NotReached, connected, tls_context

if TYPE_CHECKING:
    import h11

MAX_AT_ONCE = 16  # of this process; others wait, within their time
_MAX_HEAD_BYTES = 32 << 10
_READ_BYTES = 64 << 10
_SYNONYMS = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}


class ImageFetcher:
    """One process's. `seconds` are for one picture, all of it."""

    def __init__(self, rules: ImageRules, seconds: float) -> None:
        self._rules = rules
        self._seconds = seconds
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        self._tls: ssl.SSLContext | None = None

    async def fetch_all(self, sources: Sequence[ImageSource], grow: Callable[[int], None]) -> list[ImageData]:
        """Every picture with its bytes, in order. `grow` is told of each byte that is held, and may raise `ApiError`.

        Raises `NotFetched`, and `InvalidRequest` for what can never be taken.
        """
        tasks = {
            index: asyncio.create_task(self._fetch(source, grow), name="fetch of an image")
            for index, source in enumerate(sources)
            if isinstance(source, ImageLink)
        }
        try:
            await asyncio.gather(*tasks.values())
        finally:  # where one has failed, or the client is gone
            for task in tasks.values():
                task.cancel()
        return [
            tasks[index].result() if isinstance(source, ImageLink) else source for index, source in enumerate(sources)
        ]

    async def _fetch(self, link: ImageLink, grow: Callable[[int], None]) -> ImageData:
        import h11  # not before the first URL

        try:
            async with asyncio.timeout(self._seconds), self._places:
                return await self._exchange(link, grow)
        except TimeoutError:
            raise _failed(link, f"did not come within {self._seconds:.0f} s") from None
        except NotReached as error:
            raise _failed(link, f"was not fetched: {error}") from None
        except ssl.SSLError:
            raise _failed(link, "was not fetched: its host's certificate is not valid") from None
        except h11.ProtocolError:
            raise _failed(link, "was not fetched: its host does not speak HTTP") from None
        except (OSError, EOFError):
            raise _failed(link, "was not fetched: no connection to its host, or it broke off") from None

    async def _exchange(self, link: ImageLink, grow: Callable[[int], None]) -> ImageData:
        import h11

        target = link.target
        if target.scheme == "https" and self._tls is None:
            self._tls = await asyncio.to_thread(tls_context, None)
        client = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        request = h11.Request(
            method="GET",
            target=target.path,
            headers=[
                ("host", target.authority),
                ("accept", ", ".join(MEDIA_TYPES)),
                ("accept-encoding", "identity"),
                ("user-agent", f"aiexport-edge/{product_version()}"),
                ("connection", "close"),
            ],
        )
        async with connected(target, self._rules.policy, self._tls) as (reader, writer):
            for part in (request, h11.EndOfMessage()):
                writer.write(client.send(part) or b"")
            await writer.drain()
            media_type = ""
            pieces: list[bytes] = []
            size = 0
            while True:
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await reader.read(_READ_BYTES))
                elif isinstance(event, h11.Response):
                    media_type = self._check_head(link, event)
                elif isinstance(event, h11.Data):
                    size += len(event.data)
                    if size > self._rules.max_bytes:
                        raise self._rules.too_large(link.path, size)
                    grow(len(event.data))
                    pieces.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    return ImageData(link.path, media_type, b"".join(pieces))
                elif isinstance(event, h11.ConnectionClosed):
                    raise EOFError

    def _check_head(self, link: ImageLink, head: h11.Response) -> str:
        """The media type. Raises `InvalidRequest`."""
        headers = {name: value.decode("latin-1") for name, value in head.headers}
        if head.status_code != 200:
            hint = "; redirects are not followed" if 300 <= head.status_code < 400 else ""
            raise _failed(link, f"was not fetched: its host answered {head.status_code}{hint}")
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise _failed(link, "came compressed, which was not asked for")
        told = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        media_type = _SYNONYMS.get(told, told)
        if media_type not in MEDIA_TYPES:
            raise _failed(link, f"is {quoted(told)} by its content type; it must be {' or '.join(MEDIA_TYPES)}")
        length = headers.get(b"content-length", "")
        if length.isdigit() and int(length) > self._rules.max_bytes:
            raise self._rules.too_large(link.path, int(length))
        return media_type


def _failed(link: ImageLink, what: str) -> NotFetched:
    return NotFetched(f"{link.path}: the image {what}", param=link.path)
