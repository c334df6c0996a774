"""The overhead benchmark measures a stack that works: what its client counts is what the core has emitted."""

from __future__ import annotations

import itertools

from benchmarks.overhead import client, hops
from benchmarks.overhead.__main__ import Row, Window, aborts_ms, first_tokens_ms, streams, table
from benchmarks.overhead.processes import stack


def test_a_small_measurement() -> None:
    with stack() as running:
        window = streams(running, 4, 400.0, 0.5)
        assert isinstance(window, Window)
        assert window.tokens_per_s > 0
        assert min(window.shim_us, window.engine_us, window.client_us) > 0
        assert window.tokens_per_event >= 1
        assert len(first_tokens_ms(running, 3, 5)) == 3
        assert min(aborts_ms(running, 2)) > 0
        sent = client.request(running.key, max_tokens=3, stream=False)
        count, times = client.unary(running.address, sent, num_connections=2, seconds=0.5)
        assert count == len(times) > 0


def test_a_first_token_comes_by_every_hop() -> None:
    rows = hops.measure(3, 5)
    assert [row[:2] for row in rows] == list(itertools.pairwise(hops.HOPS))
    assert all(median >= 0 for _, _, median, _ in rows)


def test_events_and_tokens_are_told_apart() -> None:
    counts = client.Counts()
    event = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":" a bear"}}\n\n'
    counts.add(b"7c\r\n" + event + b"\r\n")
    counts.add(b"7c\r\n" + event + b"\r\n7c\r\n" + event + b"\r\n")
    assert (counts.events, counts.tokens) == (3, 6)


def test_the_table_says_what_is_met() -> None:
    rows = [
        Row("a", 9.0, "µs", 10.0, 4.5),
        Row("b", 11.0, "µs", 10.0),
        Row("c", 70_000.0, "1/s", 60_000, higher_is_better=True),
        Row("d", 1.0, "ms"),
    ]
    assert [row.met for row in rows] == [True, False, True, None]
    lines = table(rows).splitlines()[1:]
    assert ["met" in line for line in lines] == [True, False, True, False]
    assert "NOT" in lines[1]
    assert "2.00" in lines[0]
