"""What tests of backends need whatever the backend: a listener that notes, requests, and waiting for states."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from aiexport_edge.engine.backends.base import Backend, BackendConstraint, BackendRequest, ModelState
from aiexport_edge.engine.core.protocol import AdapterRef, FinishReason, Priority, Sampling, pack_ids

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)


class Listener:
    """Notes what it is told; `count(n)` waits for that many tokens, `end` for the end."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.ids: list[int] = []
        self.cached = 0
        self.outcome: FinishReason | str | None = None
        self._event = asyncio.Event()

    def started(self, cached_tokens: int) -> None:
        self.told.append("started")
        self.cached = cached_tokens
        self._event.set()

    def tokens(self, ids: Sequence[int]) -> None:
        if self.told[-1] != "tokens":
            self.told.append("tokens")
        self.ids.extend(ids)
        self._event.set()

    def finished(self, reason: FinishReason) -> None:
        self.told.append("finished")
        self.outcome = reason
        self._event.set()

    def failed(self, message: str) -> None:
        self.told.append("failed")
        self.outcome = message
        self._event.set()

    async def count(self, num_ids: int) -> None:
        while len(self.ids) < num_ids and self.outcome is None:
            self._event.clear()
            await self._event.wait()

    async def end(self) -> FinishReason | str:
        while self.outcome is None:
            self._event.clear()
            await self._event.wait()
        return self.outcome


def request(
    prompt: list[int],
    num_tokens: int,
    *,
    model: int = 0,
    output: Sequence[int] = (),
    stop_ids: tuple[int, ...] = (),
    sampling: Sampling = GREEDY,
    salt: bytes = b"",
    priority: Priority = Priority.INTERACTIVE,
    constraint: BackendConstraint | None = None,
    adapter: AdapterRef | None = None,
) -> BackendRequest:
    return BackendRequest(
        model=model,
        prompt_ids=pack_ids(prompt),
        output_ids=pack_ids(list(output)),
        max_tokens=num_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        tenant="t",
        weight=1.0,
        salt=salt,
        priority=priority,
        constraint=constraint,
        adapter=adapter,
    )


async def state(backend: Backend, wanted: ModelState) -> None:
    """Waits until every model is in a state."""
    changed = asyncio.Event()
    backend.on_status(changed.set)
    while any(status.state is not wanted for status in backend.statuses()):
        changed.clear()
        await changed.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what nobody announces."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def idle(backend: Backend) -> None:
    """Waits until the backend says that nothing runs and no page is in use."""

    def free() -> bool:
        core = backend.stats().core
        return core is not None and core.pages_used == core.running == core.waiting == 0

    await until(free)


async def new_core(backend: Backend, old: int) -> int:
    """Waits until another process than `old` is the core."""
    await until(lambda: backend.stats().core_pid not in (0, old))
    return backend.stats().core_pid


def run(test: Coroutine[Any, Any, None], seconds: float = 120.0) -> None:
    asyncio.run(asyncio.wait_for(test, seconds))
