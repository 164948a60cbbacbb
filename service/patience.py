"""Deadlines and departures of requests, at no cost to those that are answered at once.

A timer for each request, and a task that watches its client, would take longer than most samples. So all requests share
one timer, and only who is still there after `PATIENCE` is looked after by himself.
"""

import asyncio
from collections import deque
from typing import Protocol

PATIENCE = 0.1  # seconds


class Waiting(Protocol):
    open: bool
    deadline: float  # on the loop's clock

    def look_after(self) -> None:
        """It has waited for PATIENCE, or its deadline is nearer than that."""


class Patience:
    """For one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._young: deque[tuple[float, Waiting]] = deque()  # with the time when their patience ends
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, waiting: Waiting) -> None:
        ends = self._loop.time() + PATIENCE
        if waiting.deadline < ends:
            waiting.look_after()
            return
        self._young.append((ends, waiting))
        if self._timer is None:
            self._timer = self._loop.call_at(ends, self._end)

    def _end(self) -> None:
        now = self._loop.time()
        while self._young and self._young[0][0] <= now:
            _, waiting = self._young.popleft()
            if waiting.open:
                waiting.look_after()
        self._timer = self._loop.call_later(PATIENCE / 2, self._end) if self._young else None
