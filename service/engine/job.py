"""A job: one request in the engine, on the event loop's thread."""

import asyncio
import time
from abc import ABC, abstractmethod
from math import inf
from typing import Literal

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.scheduler import Ticket
from reparam.service.runtime.graphs import Work

Stage = Literal["body", "queue", "infer", "send"]


class Job(ABC):
    """One request, from its head to the last byte of its response. Whoever made the job lets it leave the engine.

    timeout: seconds that the request may take.
    deadline: end of the timeout, on the loop's clock; inf for none.
    timer: calls at the deadline; None until the job has waited for a while.
    work: what the request asks for; set by `start`.
    ticket: the job's rows in the scheduler; None until they are granted.
    reserved_bytes: bytes of body and response that count as held.
    done: results that the client has not taken yet, in order of rows.
    rows_left: rows that are not computed yet.
    queue_seconds, infer_seconds: time that the job's pieces waited and ran, added up.
    waiting_since: when the rows that wait began to, on time.perf_counter.
    error: why the job failed.
    """

    work: Work
    ticket: Ticket["Job"] | None = None
    timer: asyncio.TimerHandle | None = None
    deadline = inf
    ticks = 0  # times that Deadlines has found the job waiting
    is_open = True
    has_started = False
    error: Exception | None = None
    reserved_bytes = rows_left = 0
    queue_seconds = infer_seconds = waiting_since = 0.0
    _end = 0  # rows that are computed without a gap

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.done: list[Arrays] = []
        self._early: dict[int, tuple[int, Arrays]] = {}  # results with a gap before them: by first row, end and arrays

    @abstractmethod
    def on_change(self) -> None:
        """React to new results, or to `error`."""

    @abstractmethod
    def on_wait(self) -> None:
        """React, once, to having waited for a while: watch the client for a disconnect."""

    def start(self, work: Work) -> None:
        """Begin to compute the work: the request has been read."""
        self.has_started = True
        self.work = work
        self.rows_left = work.n
        self.waiting_since = time.perf_counter()

    @property
    def stage(self) -> Stage:
        """What the job waits for."""
        if not self.has_started:
            return "body"
        if not self.rows_left:
            return "send"
        in_batches = self.ticket.taken if self.ticket is not None else 0
        return "queue" if in_batches == self.work.n - self.rows_left else "infer"

    def add_times(self, started: float, ended: float) -> None:
        """Add the times of a piece, on time.perf_counter."""
        self.queue_seconds += max(0.0, started - self.waiting_since)
        self.infer_seconds += ended - started
        self.waiting_since = max(started, self.waiting_since)

    def add_result(self, result: Arrays, lo: int, hi: int) -> bool:
        """Add the result of rows lo .. hi - 1. Returns whether `done` has grown: earlier rows may still run."""
        if lo != self._end:
            self._early[lo] = hi, result
            return False
        self.done.append(result)
        while hi in self._early:
            hi, result = self._early.pop(hi)
            self.done.append(result)
        self._end = hi
        self.rows_left = self.work.n - hi
        return True
