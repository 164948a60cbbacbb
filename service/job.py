"""A request in the engine, as the event loop sees it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from service.artifact import Arrays
from service.errors import ClientLeft, DeadlineExceeded, Problem
from service.repository import Model
from service.rows import Rows
from service.scheduler import Ticket

Departure = Callable[[], Awaitable[Any]]


class Host(Protocol):
    """What a job asks of the engine."""

    loop: asyncio.AbstractEventLoop

    def grant(self, job: "Job", rows: int) -> None: ...
    def window(self, model: Model) -> int: ...
    def withdraw(self, job: "Job") -> None: ...
    def forget(self, job: "Job") -> None: ...
    def expired(self, stage: str) -> DeadlineExceeded: ...


class Job(Ticket):
    """The rows of one request, on their way. Whoever has it closes it.

    queue, infer: seconds that its pieces waited and ran, in sum. since: when the rows that wait began to, on
    time.perf_counter. size: bytes the answer holds at a time. left: rows not computed yet.
    """

    __slots__ = ("_departure", "_done", "_error", "_host", "_read", "_timer", "_waiter", "_watcher", "deadline",
                 "infer", "left", "open", "queue", "request", "since", "size")  # fmt: skip

    def __init__(self, host: Host, request: Rows, size: int, deadline: float, departure: Departure) -> None:
        super().__init__(request.model, request.n)
        self.request = request
        self.size = size
        self.deadline = deadline
        self.queue = self.infer = 0.0
        self.since = time.perf_counter()
        self.open = True
        self.left = request.n
        self._host = host
        self._departure = departure
        self._done: list[Arrays] = []
        self._read = 0  # rows that `pieces` has returned
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def exhausted(self) -> bool:
        """All rows are computed, and `pieces` has returned them."""
        return self.left == 0 and not self._done

    @property
    def stage(self) -> str:
        if not self.left:
            return "send"
        return "queue" if self.taken == self.request.n - self.left else "infer"

    async def pieces(self) -> list[Arrays]:
        """Of what was computed since the last call, at least one piece: the outputs asked for. Raises Problem."""
        if not self._done and self._error is None:
            self._waiter = self._host.loop.create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        pieces, self._done = self._done, []
        self._read = self.request.n - self.left
        if self.granted < self.rows:
            if self.granted == self.taken:
                self.since = time.perf_counter()
            self._host.grant(self, self._host.window(self.request.model) - self.granted + self._read)
        return pieces

    def lift_deadline(self) -> None:
        """From now on it may take its time: the client reads."""
        self.deadline = float("inf")
        if self._timer is not None:
            self._timer.cancel()

    def look_after(self) -> None:
        """Watch the client and the clock."""
        loop = self._host.loop
        self._watcher = loop.create_task(self._watch())
        if self.deadline < float("inf"):
            self._timer = loop.call_at(self.deadline, self._expire)

    def fail(self, error: Exception) -> None:
        """Let `pieces` raise this."""
        if self._error is None and self.open:
            self._error = error
            self._host.withdraw(self)
            self._wake()

    def close(self) -> None:
        """Nobody waits for the rows any more."""
        self.open = False
        self._done.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        self._host.forget(self)

    def done(self, result: Arrays | Problem, rows: int, started: float, ended: float) -> None:
        """Take the result of a piece."""
        self.queue += started - self.since
        self.infer += ended - started
        self.since = started
        if not self.open:
            return
        if isinstance(result, Problem):
            self.fail(result)
        else:
            self.left -= rows
            self._done.append(result)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self) -> None:
        self.fail(self._host.expired(self.stage))

    async def _watch(self) -> None:
        await self._departure()
        self.fail(ClientLeft())
