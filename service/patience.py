"""Deadlines and departures of requests, at no cost to those that are answered at once.

A timer for each request, and a task that watches its client, would take longer than most samples. So one timer looks
at all requests from time to time, and only who is seen twice is looked after by himself.
"""

import asyncio
from collections.abc import Collection
from typing import Protocol

PATIENCE = 0.1  # seconds


class Waiting(Protocol):
    deadline: float  # on the loop's clock
    seen: int  # times that the timer has found it waiting

    def look_after(self) -> None:
        """It has waited for longer than PATIENCE, or its deadline is near."""


class Patience:
    """With all that wait on one event loop; whoever is in the collection waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, all_waiting: Collection[Waiting]) -> None:
        self._loop = loop
        self._all = all_waiting
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, waiting: Waiting) -> None:
        if waiting.deadline < self._loop.time() + 2 * PATIENCE:
            waiting.seen = 2
            waiting.look_after()
        elif self._timer is None:
            self._timer = self._loop.call_later(PATIENCE, self._look)

    def _look(self) -> None:
        for waiting in list(self._all):
            waiting.seen += 1
            if waiting.seen == 2:
                waiting.look_after()
        self._timer = self._loop.call_later(PATIENCE, self._look) if self._all else None
