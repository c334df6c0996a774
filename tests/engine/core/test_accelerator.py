"""What the accelerator does where the card has no room for a graph: `torch.cuda` is a stand-in that keeps streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from aiexport_edge.engine.core.accelerator import CudaAccelerator

CARD = torch.device("cuda", 0)


class Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Card:
    """Streams and captures. `at_end` is raised where a capture ends, which leaves its stream the current one."""

    def __init__(self) -> None:
        self.main = self.current = Stream()
        self.at_end: Exception | None = None
        self.replays = 0

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, *, pool: object, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        if self.at_end is not None:
            raise self.at_end
        self.current = before


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()

    class Graph:
        def replay(self) -> None:
            card.replays += 1

    stand_ins: dict[str, object] = {
        "set_device": lambda device: None,
        "Stream": Stream,
        "stream": card.stream,
        "graph": card.graph,
        "current_stream": lambda device=None: card.current,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": Graph,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return card


def test_a_graph_that_the_driver_has_no_room_for_is_out_of_memory(card: Card) -> None:
    """The runner then takes a larger graph that is there; what it launches next is in the first stream again."""
    accelerator = CudaAccelerator(CARD)
    card.at_end = RuntimeError("CUDA error: out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        accelerator.capture(lambda: None)
    assert card.current is card.main
    card.at_end = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal") as raised:
        accelerator.capture(lambda: None)
    assert not isinstance(raised.value, torch.OutOfMemoryError), "the core must end of it"
    card.at_end = None
    accelerator.capture(lambda: None)()
    assert card.replays == 1


def test_a_capture_while_serving_keeps_host_memory_again(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives back what the host keeps before each capture."""
    asked: list[int] = []
    empty: Callable[..., torch.Tensor] = torch.empty

    def note(size: int, **options: Any) -> torch.Tensor:
        if options.pop("pin_memory", False):
            asked.append(size)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", note)
    accelerator = CudaAccelerator(CARD)
    accelerator.staging(100)
    accelerator.capture(lambda: None)
    assert asked == [100], "before there is anything to keep"
    accelerator.reserve_staging()
    reserved = asked[1:]
    assert max(reserved) >= 100
    accelerator.capture(lambda: None)
    assert asked[1:] == reserved * 2


def test_float32_is_float32(card: Card) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    CudaAccelerator(CARD)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
