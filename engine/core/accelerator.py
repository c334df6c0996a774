"""What the runner needs of a device that works beside the host: pinned memory, graphs, marks, how much is free.

Owns every call that differs between a card and a stand-in for it, so that all else about running on one can be tested
without. Knows no models.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Accelerator(Protocol):
    """One device with one stream of work, in order; and a second for what runs beside it."""

    @property
    def device(self) -> torch.device: ...

    def staging(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the host, not initialised, for copies in either direction that the host does not await.

        It can be dropped right after such a copy is launched: its memory is not used again before the copy is done.
        """
        ...

    def reserve_staging(self) -> None:
        """Ask the system now for what `staging` will give: as much again as it has given so far, several times over.

        Later it takes from that alone, and never waits for the device because of it.
        """
        ...

    def fork(self) -> None:
        """What is launched `beside` comes after all that has been launched so far."""
        ...

    def beside(self) -> AbstractContextManager[object]:
        """Within, work is launched in the second stream: it runs beside what is launched in the first."""
        ...

    def join(self) -> None:
        """What is launched from now on comes after all that was launched `beside`."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that launches again, at one blow, what `run` launched on tensors of fixed addresses.

        `run` is called more than once, must do the same each time, and must not wait for the device.
        """
        ...

    def mark(self) -> Callable[[], None]:
        """A function that blocks until everything launched before now is done."""
        ...

    def reclaim(self) -> None:
        """Give memory that is kept for reuse back to the device, so that other sizes can be had."""
        ...

    def free_bytes(self) -> int:
        """Device memory that can still be taken."""
        ...

    def peak_bytes(self, run: Callable[[], None]) -> int:
        """The most device memory that `run` held at once, beyond what was held before. It keeps none of it."""
        ...


def exact_float32() -> None:
    """Have libraries multiply float32 as float32 on a card, whatever the environment says of TF32."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


class CudaAccelerator:
    """An NVIDIA card, through torch. All graphs share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)  # Triton launches on the current device
        exact_float32()
        # Where it may choose, torch takes cuDNN's attention on Hopper, which is set up anew for every size of picture.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._pool: Any = None
        # Graphs are captured in a stream of their own: libraries keep a workspace for each stream, and what runs beside
        # a graph must not share the graph's. Of higher priority, for a decode is short and somebody waits for it.
        self._capture_stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._second_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._largest_staging = 0
        self._keeps_staging = False

    def staging(self, num_bytes: int) -> Tensor:
        self._largest_staging = max(self._largest_staging, num_bytes)
        # torch's host allocator gives a block again only when the copies that were launched from it are done.
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def reserve_staging(self) -> None:
        self._keeps_staging = True
        powers = range(3, (2 * self._largest_staging).bit_length())  # the allocator rounds up to a power of two
        held = [torch.empty(1 << power, dtype=torch.uint8, pin_memory=True) for power in powers for _ in range(4)]
        del held

    def fork(self) -> None:
        self._second_stream.wait_stream(torch.cuda.current_stream(self.device))

    def beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._second_stream)

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._second_stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        # Kernels are compiled and libraries set up before the capture, where neither is allowed.
        stream = self._capture_stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one is entered for its end: a capture that fails at its own leaves its stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self._pool, stream=stream),
            ):
                run()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error  # the driver's, where it has no room for the graph
        finally:
            if self._keeps_staging:
                self.reserve_staging()  # a capture begins by giving back what is kept
        return graph.replay

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def reclaim(self) -> None:
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        self._pool = None  # it went with the graphs that `run` captured
        return torch.cuda.max_memory_allocated(self.device) - before
