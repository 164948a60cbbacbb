"""The job of a coroutine: an ASGI request."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.engine import Engine
from reparam.service.engine.job import Job
from reparam.service.errors import ClientLeft
from reparam.service.runtime.graphs import Work


class AwaitedJob(Job):
    """A job whose results the current task awaits.

    engine: engine of the job.
    timeout: seconds for the whole request.
    disconnect: returns when the client has disconnected. Not called while the body is read.
    """

    def __init__(self, engine: Engine, timeout: float, disconnect: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(timeout)
        self._engine = engine
        self._disconnect = disconnect
        self._task = asyncio.current_task(engine.loop)  # finding the loop again would cost a system call
        self._rows_read = 0  # number of rows returned by `pieces`
        self._waiter: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def is_exhausted(self) -> bool:
        """All rows are computed, and `pieces` has returned every result."""
        return self.rows_left == 0 and not self.results

    async def pieces(self) -> list[Arrays]:
        """Wait for at least one new result, and let as many further rows run. Not for a job that `is_exhausted`.

        Returns: the new results in order of rows, each by output name, (rows, ...).

        Raises: the job's error.
        """
        if not self.results and self.error is None:
            self._waiter = self._engine.loop.create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        pieces, self.results = self.results, []
        ticket = self.ticket
        if ticket.granted < ticket.rows:
            self._rows_read += sum(len(next(iter(piece.values()))) for piece in pieces)
            if not ticket.waiting:
                self.waiting_since = time.perf_counter()
            window = self._engine.window(self.work.graph)
            self._engine.grant(self, window - ticket.granted + self._rows_read)
        return pieces

    async def all(self) -> list[Arrays]:
        """Wait for all remaining results.

        Returns: the results in order of rows, each by output name, (rows, ...).

        Raises: the job's error.
        """
        pieces: list[Arrays] = []
        while not self.is_exhausted:
            pieces += await self.pieces()
        return pieces

    def watch(self) -> None:
        """Fail the job as soon as its client disconnects."""
        if self._watcher is None:
            self._watcher = self._engine.loop.create_task(self._await_disconnect())

    def unwatch(self) -> None:
        """Stop watching the client."""
        if self._watcher is not None:
            self._watcher.cancel()

    def on_change(self) -> None:
        """Wake the task in `pieces` after a new result or an error.

        A job that still reads its body can change only by an error, such as a passed deadline. Then the task waits for
        the client, so the task is cancelled.
        """
        if not self.has_started and self._task is not None:
            self._task.cancel()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def on_wait(self) -> None:
        """Watch the client. A task reading the body notices a disconnect itself."""
        if self.has_started:
            self.watch()

    def start(self, work: Work) -> None:
        """Record the work, as in Job. Watch the client if reading the body took until the second visit by Deadlines."""
        super().start(work)
        if self.ticks >= 2:
            self.watch()

    async def _await_disconnect(self) -> None:
        await self._disconnect()
        self._engine.fail(self, ClientLeft())
