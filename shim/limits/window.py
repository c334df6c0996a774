"""A sliding minute of calls: the one question that a limit on requests asks, wherever they are counted.

now - 60 s                                    now
    |--x----x--x----------x-x-x----------x------|     a call is let in while fewer than `limit` lie in between
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Taken:
    """The answer. Times in seconds from now."""

    mark: str | int | None  # what `give_back` wants; None: the call was refused and is not counted
    remaining: int
    reset_s: float  # until the whole limit is there again
    retry_after_s: float = 0.0  # until a call would be let in, where this one was not


class Window(Protocol):
    """Exact over every process that asks the same place."""

    async def take(self, workspace_id: str, limit: int) -> Taken:
        """Counts a call unless `limit` calls lie in the minute behind it. Raises what its store raises."""
        ...

    async def give_back(self, workspace_id: str, mark: str | int) -> None:
        """The call is not to count after all."""
        ...

    async def close(self) -> None: ...
