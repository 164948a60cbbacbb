"""A job: one request in the engine. Used on the event loop's thread only."""

import asyncio
import time
from abc import ABC, abstractmethod
from math import inf
from typing import Any, Literal

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.scheduler import Ticket
from reparam.service.runtime.graphs import Work

Stage = Literal["body", "queue", "infer", "send"]


class Job(ABC):
    """One request, from its headers to the last byte of its response.

    timeout: seconds for the whole request.
    deadline: end of the timeout, on the loop's clock; inf without a deadline.
    timer: fires at the deadline; None until Deadlines starts the timer.
    ticks: number of visits by Deadlines; the second visit starts the timer.
    work: the rows to compute; set by `start`.
    ticket: the job's rows in the queue; empty until `start`.
    is_open: the job has not left the engine.
    has_started: the request has been read, and `work` is set.
    reserved_bytes: bytes reserved for body and response.
    results: results not yet taken by the client, in order of rows, each by output name.
    rows_left: number of rows not yet computed in order.
    queue_seconds, infer_seconds: waiting time and running time, summed over the parts of the job in batches.
    waiting_since: start of the current wait, on time.perf_counter.
    error: the error that failed the job.
    """

    work: Work
    ticket: Ticket[Any] = Ticket(None, None, 0)
    timer: asyncio.TimerHandle | None = None
    deadline = inf
    ticks = 0
    is_open = True
    has_started = False
    error: Exception | None = None
    reserved_bytes = rows_left = 0
    queue_seconds = infer_seconds = waiting_since = 0.0
    _end = 0  # number of rows computed without a gap

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.results: list[Arrays] = []
        self._early: dict[int, tuple[int, Arrays]] = {}  # results behind a gap: first row -> end, arrays

    @abstractmethod
    def on_change(self) -> None:
        """React to new results, or to `error`."""

    @abstractmethod
    def on_wait(self) -> None:
        """Watch the client for a disconnect. Called once, at the second visit by Deadlines."""

    def start(self, work: Work) -> None:
        """Record the work of a request that has been read. The rows wait from now on; the engine queues the rows."""
        self.has_started = True
        self.work = work
        self.ticket = Ticket(self, work.graph, work.n)
        self.rows_left = work.n
        self.waiting_since = time.perf_counter()

    @property
    def stage(self) -> Stage:
        """The stage of the job: reading the body, waiting in the queue, running, or sending the response."""
        if not self.has_started:
            return "body"
        if not self.rows_left:
            return "send"
        return "queue" if self.ticket.taken == self.work.n - self.rows_left else "infer"

    def add_times(self, started: float, ended: float) -> None:
        """Add the waiting time and the running time of the job's rows in one batch.

        started, ended: start and end of the batch, on time.perf_counter.
        """
        self.queue_seconds += max(0.0, started - self.waiting_since)
        self.infer_seconds += ended - started
        self.waiting_since = max(started, self.waiting_since)

    def add_result(self, result: Arrays, lo: int, hi: int) -> bool:
        """Add the result of rows lo .. hi - 1. Results may come in any order.

        result: outputs by name, (hi - lo, ...).

        Returns: True if `results` has grown. A result stays out of `results` while earlier rows are missing.
        """
        if lo != self._end:
            self._early[lo] = hi, result
            return False
        self.results.append(result)
        while hi in self._early:
            hi, result = self._early.pop(hi)
            self.results.append(result)
        self._end = hi
        self.rows_left = self.work.n - hi
        return True
