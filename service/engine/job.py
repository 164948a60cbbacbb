"""A request in the engine, as the event loop sees it."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.scheduler import Ticket
from reparam.service.errors import ClientLeft, DeadlineExceeded, Problem
from reparam.service.runtime.repository import Model
from reparam.service.runtime.sampler import Rows

Departure = Callable[[], Awaitable[Any]]


class Host(Protocol):
    """What a job asks of the engine."""

    loop: asyncio.AbstractEventLoop

    def grant(self, job: "Job", rows: int) -> None: ...
    def window(self, model: Model) -> int: ...
    def withdraw(self, job: "Job") -> None: ...
    def forget(self, job: "Job") -> None: ...
    def expired(self, stage: str, timeout: float) -> DeadlineExceeded: ...


class Job(Ticket, ABC):
    """One request, until the last byte of its answer. Whoever has it closes it.

    timeout: seconds that it may take, from when it joins the engine. deadline: their end, on the loop's clock.
    request: what it asks for, once it is read. size: bytes that it holds, of body and answer. done: what is computed,
    in order, each piece with the outputs asked for. left: rows not computed yet. queue_seconds, infer_seconds: that its
    pieces waited and ran, in sum. since: when the rows that wait began to, on time.perf_counter. error: why it failed.
    """

    request: Rows
    deadline = float("inf")
    seen = 0  # times that Patience has found it waiting
    reading = True
    open = True
    error: Exception | None = None
    size = left = 0
    queue_seconds = infer_seconds = since = 0.0
    timer: asyncio.TimerHandle | None = None
    _end = 0  # rows of what was done

    def __init__(self, host: Host, timeout: float) -> None:
        super().__init__(None, 0)
        self.host = host
        self.timeout = timeout
        self.done: list[Arrays] = []
        self._early: dict[int, tuple[int, Arrays]] = {}  # what ended before the rows in front of it: lo, hi

    def ask(self, request: Rows) -> None:
        """Now it is known what it wants."""
        self.reading = False
        self.request = request
        self.model = request.model
        self.rows = self.left = request.n
        self.since = time.perf_counter()

    @property
    def stage(self) -> str:
        if self.reading:
            return "body"
        if not self.left:
            return "send"
        return "queue" if self.taken == self.request.n - self.left else "infer"

    @abstractmethod
    def news(self) -> None:
        """Something was done, or it failed."""

    def look_after(self) -> None:
        """It has waited for a while: watch the clock."""
        if self.deadline < float("inf"):
            self.timer = self.host.loop.call_at(self.deadline, self.expire)

    def expire(self) -> None:
        """The deadline has passed; unless there is nothing more to wait for but the client."""
        if self.stage != "send":
            self.fail(self.host.expired(self.stage, self.timeout))

    def fail(self, error: Exception) -> None:
        if self.error is None and self.open:
            self.error = error
            self.host.withdraw(self)
            self.news()

    def close(self) -> None:
        """Nobody waits for the rows any more."""
        self.open = False
        self.done.clear()
        if self.timer is not None:
            self.timer.cancel()
        self.host.forget(self)

    def take(self, result: Arrays | Problem, lo: int, hi: int, started: float, ended: float) -> None:
        """The result of the rows lo .. hi - 1."""
        self.queue_seconds += max(0.0, started - self.since)
        self.infer_seconds += ended - started
        self.since = max(started, self.since)
        if not self.open or self.error is not None:
            return
        if isinstance(result, Problem):
            self.fail(result)
            return
        if lo != self._end:
            self._early[lo] = hi, result
            return
        self.done.append(result)
        while hi in self._early:
            hi, result = self._early.pop(hi)
            self.done.append(result)
        self._end = hi
        self.left = self.request.n - hi
        self.news()


class Awaited(Job):
    """A job that a coroutine waits for.

    departure: returns when the client has gone; not called while the body is read.
    """

    def __init__(self, host: Host, timeout: float, departure: Departure) -> None:
        super().__init__(host, timeout)
        self._departure = departure
        self._task = asyncio.current_task(host.loop)  # without the loop, a system call
        self._read = 0  # rows that `pieces` has returned
        self._waiter: asyncio.Future[None] | None = None
        self._old = False
        self._watcher: asyncio.Task[None] | None = None

    def ask(self, request: Rows) -> None:
        super().ask(request)
        if self._old:
            self.watch()

    @property
    def exhausted(self) -> bool:
        """All rows are computed, and `pieces` has returned them."""
        return self.left == 0 and not self.done

    async def pieces(self) -> list[Arrays]:
        """Of what was computed since the last call, at least one piece. Raises Problem."""
        if not self.done and self.error is None:
            self._waiter = self.host.loop.create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        pieces, self.done = self.done, []
        if self.granted < self.rows:
            self._read += sum(len(next(iter(piece.values()))) for piece in pieces)
            if self.granted == self.taken:
                self.since = time.perf_counter()
            self.host.grant(self, self.host.window(self.model) - self.granted + self._read)
        return pieces

    async def all(self) -> list[Arrays]:
        """Of what `pieces` has not returned yet, everything. Raises Problem."""
        pieces: list[Arrays] = []
        while not self.exhausted:
            pieces += await self.pieces()
        return pieces

    def news(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def lift_deadline(self) -> None:
        """From now on it may take its time: the client reads."""
        self.deadline = float("inf")
        if self.timer is not None:
            self.timer.cancel()

    def look_after(self) -> None:
        """And, once it has nothing more to say, watch the client."""
        super().look_after()
        self._old = True
        if not self.reading:
            self.watch()

    def watch(self) -> None:
        """Notice when the client leaves, which fails the job."""
        if self._watcher is None:
            self._watcher = self.host.loop.create_task(self._await_departure())

    def expire(self) -> None:
        if self.reading and self._task is not None:
            self.error = self.host.expired(self.stage, self.timeout)
            self._task.cancel()
        else:
            super().expire()

    def close(self) -> None:
        super().close()
        if self._watcher is not None:
            self._watcher.cancel()

    async def _await_departure(self) -> None:
        await self._departure()
        self.fail(ClientLeft())
