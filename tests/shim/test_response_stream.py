"""What a turn of the event loop writes: at its end, in order, in one piece, before what is called for later."""

from __future__ import annotations

import asyncio

from aiexport_edge.shim.response_stream import TurnWriter


def test_what_a_turn_writes_comes_in_order_and_before_later_callbacks() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        writer, seen, others = TurnWriter.of(loop), list[bytes](), list[bytes]()
        assert TurnWriter.of(loop) is writer
        later = loop.create_future()
        for data in (b"a", b"b", b"c"):
            writer.write(seen.append, data)
            writer.write(others.append, data.upper())
        loop.call_soon(later.set_result, None)
        assert not seen
        await later
        assert (seen, others) == ([b"abc"], [b"ABC"])
        writer.write(seen.append, b"d")
        await asyncio.sleep(0)
        assert seen[-1] == b"d"

    asyncio.run(test())
