"""Frames over a real socket pair: whole, in order, and never waiting for the reader."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiexport_edge.engine.core import channel as channel_module
from aiexport_edge.engine.core.channel import Channel, ChannelClosed
from aiexport_edge.engine.core.protocol import HEADER


def frame(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    yield ours, Channel(theirs)
    ours.close()
    theirs.close()


def read_frames(sock: socket.socket, count: int) -> list[bytes]:
    stream = sock.makefile("rb")
    return [stream.read(HEADER.unpack(stream.read(HEADER.size))[0]) for _ in range(count)]


@settings(max_examples=100, deadline=None, suppress_health_check=[*HealthCheck])
@given(bodies=st.lists(st.binary(max_size=50), min_size=1, max_size=8), cuts=st.lists(st.integers(1, 40), min_size=1))
def test_frames_survive_any_cutting(pair: tuple[socket.socket, Channel], bodies: list[bytes], cuts: list[int]) -> None:
    ours, channel = pair
    data = b"".join(map(frame, bodies))
    received: list[bytes] = []
    for index in range(len(data)):
        piece = data[: cuts[index % len(cuts)]]
        data = data[len(piece) :]
        if piece:
            ours.sendall(piece)
            received += channel.receive(wait=False)
    assert received == bodies


def test_nothing_there(pair: tuple[socket.socket, Channel]) -> None:
    assert pair[1].receive(wait=False) == []


def test_at_most_leaves_the_rest(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    ours.sendall(frame(b"one") + frame(b"two") + frame(b"three"))
    assert channel.receive(wait=True, at_most=1) == [b"one"]
    assert channel.receive(wait=True) == [b"two", b"three"]


def test_waiting_ends_when_a_frame_is_whole(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    body = os.urandom(3_000_000)
    writer = threading.Thread(target=ours.sendall, args=(frame(body),))
    writer.start()
    assert channel.receive(wait=True) == [body]
    writer.join()


def test_a_reader_that_does_not_read_stops_nobody(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    bodies = [bytes([number % 251]) * 10_000 for number in range(2_000)]  # 20 MB, far more than a socket takes
    for body in bodies:
        channel.send(frame(body))
    assert len(channel._backlog) > 1_000_000
    flusher = threading.Thread(target=channel.flush)
    flusher.start()
    assert read_frames(ours, len(bodies)) == bodies
    flusher.join()


def test_what_was_held_back_goes_out_while_waiting(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    body = os.urandom(8_000_000)
    channel.send(frame(body))
    got: list[list[bytes]] = []
    waiter = threading.Thread(target=lambda: got.append(channel.receive(wait=True)))
    waiter.start()
    assert read_frames(ours, 1) == [body]
    ours.sendall(frame(b"thanks"))
    waiter.join()
    assert got == [[b"thanks"]]


def test_a_hung_reader_is_given_up(pair: tuple[socket.socket, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_MAX_BACKLOG_BYTES", 1_000_000)

    def send_much() -> None:
        for _ in range(1_000):
            pair[1].send(frame(bytes(100_000)))

    with pytest.raises(ChannelClosed, match="stopped reading"):
        send_much()


@pytest.mark.parametrize("wait", [True, False])
def test_a_closed_end_is_noticed(pair: tuple[socket.socket, Channel], wait: bool) -> None:
    ours, channel = pair
    ours.close()
    with pytest.raises(ChannelClosed):
        channel.receive(wait=wait)
    with pytest.raises(ChannelClosed):
        channel.send(frame(b"into the void"))


def test_a_descriptor_above_what_select_knows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = 2_000
    if hard < high + 1:
        pytest.skip(f"descriptors are limited to {hard} here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, high + 1), hard))
    ours, theirs = socket.socketpair()
    os.dup2(theirs.fileno(), high)
    theirs.close()
    with ours, socket.socket(fileno=high) as sock:
        channel = Channel(sock)
        threading.Timer(0.05, ours.sendall, args=(frame(b"hello"),)).start()
        assert channel.receive(wait=True) == [b"hello"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
