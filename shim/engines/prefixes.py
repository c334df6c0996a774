"""The beginnings of a conversation as a chain of hashes, by which requests that share a beginning find each other.

The shim knows no tokens: what it can compare is the text before the template. A boundary stands at the end of a message
and now and then inside a long one, the further in the sparser, so that a conversation of any size has few:

    system ─────────┤ user ──┤ assistant ───┤ user ─────────────────────────────────
    0         512   │        │              │        +1/8           +1/8            64 Ki characters, then no more
              ▲     ▲        ▲              ▲         ▲              ▲
              h1 ─▶ h2 ────▶ h3 ──────────▶ h4 ─────▶ h5 ──────────▶ h6        h[i] = H(h[i-1], text between)

Where boundaries stand depends on nothing but the text before them, so two conversations have the same hashes exactly as
far as they are the same. The chain begins with the tenant's cache salt, the model and its adapter: nothing is found
across any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

from aiexport_edge.proto import engine_pb2 as pb

MAX_CHARS = 64 << 10  # of a conversation that are looked at …
MAX_MESSAGES = 128  # … and messages
BLOCK_CHARS = 512  # between two boundaries in one text; from 4 Ki characters on, an eighth of what lies before
TURN_CHARS = 64  # a message that ends sooner after a boundary makes none; from 1 Ki on, a sixteenth
SAMPLE_BYTES = 16 << 10  # of a picture's file, three times
PICTURE_CHARS = 1024  # that a picture counts for
_DIGEST_BYTES = 8
_ROLES = {role: b"%d" % role for role in pb.Role.values()}


@dataclass(frozen=True, slots=True)
class Trail:
    """The boundaries of one conversation, in order. `chars[i]` is how much text lies before `digests[i]`; `head` is
    the digest at the end of the first user message (or of what is looked at): the same for all later turns.
    """

    digests: tuple[int, ...]
    chars: tuple[int, ...]
    num_chars: int  # that were looked at
    head: int


def trail(request: pb.GenerateRequest, images: Sequence[bytes] = ()) -> Trail:
    """The boundaries of a request whose image blocks have the files `images`, in order.

    Reads a bounded part of the prompt: 10 µs for a short one, at most some 300 µs.
    """
    digest = blake2b(
        request.tenant.cache_salt + f"{request.model} {request.adapter}".encode(), digest_size=_DIGEST_BYTES
    ).digest()
    digests: list[int] = []
    chars: list[int] = []
    position = last = 0  # of the reader, of the last boundary
    head = 0
    pending = b""  # since the last boundary

    def boundary() -> int:
        nonlocal digest, pending, last
        digest = blake2b(digest + pending, digest_size=_DIGEST_BYTES).digest()
        pending, last = b"", position
        found = int.from_bytes(digest, "little")
        digests.append(found)
        chars.append(position)
        return found

    files = iter(images)
    for message in islice(request.chat.messages, MAX_MESSAGES):
        pending += b"\0" + _ROLES.get(message.role, b"")
        for block in message.content:
            text = block.text if block.WhichOneof("block") == "text" else _picture(next(files, b""))
            start = 0
            while start < len(text) and position < MAX_CHARS:
                room = max(BLOCK_CHARS, last // 8) - (position - last)
                piece = text[start : start + min(room, MAX_CHARS - position)]
                pending += piece.encode()
                start += len(piece)
                position += len(piece)
                if len(piece) == room:
                    boundary()
        if position - last >= max(TURN_CHARS, last // 16):
            boundary()
        if not head and message.role == pb.ROLE_USER:
            end = blake2b(digest + pending, digest_size=_DIGEST_BYTES).digest()
            head = int.from_bytes(end, "little")
        if position >= MAX_CHARS:
            break
    return Trail(tuple(digests), tuple(chars), position, head or int.from_bytes(digest, "little"))


def _picture(data: bytes) -> str:
    """What stands for a picture: about as many characters as it has tokens, the same for the same file. Of a large
    file, its size and three places are looked at: two that are taken for one cost a wrong guess and no more.
    """
    middle = len(data) // 2
    places = data[:SAMPLE_BYTES], data[middle : middle + SAMPLE_BYTES], data[-SAMPLE_BYTES:]
    digest = blake2b(b"%d" % len(data), digest_size=16)
    for place in places:
        digest.update(place)
    return digest.hexdigest() * (PICTURE_CHARS // 32)
