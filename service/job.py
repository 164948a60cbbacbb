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
    """One request, from its first byte to the last of its answer. Whoever has it closes it.

    deadline: on the loop's clock. request: what it asks for, once it is read. size: bytes the answer holds at a time.
    left: rows not computed yet. queue, infer: seconds that its pieces waited and ran, in sum. since: when the rows that
    wait began to, on time.perf_counter. error: why it failed.
    """

    __slots__ = ("_departure", "_done", "_host", "_old", "_read", "_task", "_timer", "_waiter", "_watcher", "deadline",
                 "error", "infer", "left", "open", "queue", "reading", "request", "since", "size")  # fmt: skip

    def __init__(self, host: Host, deadline: float, departure: Departure) -> None:
        super().__init__(None, 0)
        self.request: Rows
        self.reading = True
        self.deadline = deadline
        self.size = self.left = 0
        self.queue = self.infer = self.since = 0.0
        self.open = True
        self._host = host
        self._departure = departure
        self._task = asyncio.current_task(host.loop)  # without the loop, a system call
        self._done: list[Arrays] = []
        self._read = 0  # rows that `pieces` has returned
        self.error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._old = False
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    def ask(self, request: Rows, size: int) -> None:
        """Now it is known what it wants."""
        self.reading = False
        self.request, self.size = request, size
        self.model, self.rows = request.model, request.n
        self.left = request.n
        self.since = time.perf_counter()
        if self._old:
            self._watch()

    @property
    def exhausted(self) -> bool:
        """All rows are computed, and `pieces` has returned them."""
        return self.left == 0 and not self._done

    @property
    def stage(self) -> str:
        if self.reading:
            return "body"
        if not self.left:
            return "send"
        return "queue" if self.taken == self.request.n - self.left else "infer"

    async def pieces(self) -> list[Arrays]:
        """Of what was computed since the last call, at least one piece: the outputs asked for. Raises Problem."""
        if not self._done and self.error is None:
            self._waiter = self._host.loop.create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        pieces, self._done = self._done, []
        if self.granted < self.rows:
            self._read += sum(len(next(iter(piece.values()))) for piece in pieces)
            if self.granted == self.taken:
                self.since = time.perf_counter()
            self._host.grant(self, self._host.window(self.model) - self.granted + self._read)
        return pieces

    def lift_deadline(self) -> None:
        """From now on it may take its time: the client reads."""
        self.deadline = float("inf")
        if self._timer is not None:
            self._timer.cancel()

    def look_after(self) -> None:
        """Watch the clock and, once it has nothing more to say, the client."""
        self._old = True
        if self.deadline < float("inf"):
            self._timer = self._host.loop.call_at(self.deadline, self._expire)
        if not self.reading:
            self._watch()

    def fail(self, error: Exception) -> None:
        """Let `pieces` raise this."""
        if self.error is None and self.open:
            self.error = error
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
        error = self._host.expired(self.stage)
        if self.reading and self._task is not None:
            self.error = error
            self._task.cancel()
        else:
            self.fail(error)

    def _watch(self) -> None:
        self._watcher = self._host.loop.create_task(self._await_departure())

    async def _await_departure(self) -> None:
        await self._departure()
        self.fail(ClientLeft())
