"""The engine: rows of requests wait in one queue, and one thread runs them in batches.

Whatever waits when the thread becomes free runs together. There is no batching timer: a lone request never waits, and
batches grow by themselves while the thread is busy. onnxruntime releases the GIL, so the event loop goes on meanwhile.
"""

import asyncio
import contextlib
import math
import threading
import time

from service.artifact import Arrays
from service.errors import DeadlineExceeded, Problem, QueueFull, Unavailable
from service.job import Departure, Job
from service.metrics import Metrics
from service.patience import Patience
from service.repository import Model
from service.rows import Rows
from service.runner import Runner
from service.scheduler import Batch, Scheduler

FIRST_LIMIT = 64  # rows of a batch, until it is known how long they take
BATCH_SECONDS = 0.005  # and then as many as take about that long: what a row may have to wait for others
WINDOW = 4  # batches of one request that wait or lie computed at a time, so that the thread need not wait for a reader
FORGETTING = 0.1  # what the latest batch counts for in the measured rate


class Engine:
    """Runs rows in batches of about BATCH_SECONDS, while at most `max_queue_rows` rows wait and the answers being made
    hold at most `max_held_bytes`.

    All methods are for the event loop's thread, but for the four that the runner calls.
    """

    def __init__(self, max_queue_rows: int, max_held_bytes: int, metrics: Metrics) -> None:
        self.max_queue_rows = max_queue_rows
        self.max_held_bytes = max_held_bytes
        self.held_bytes = 0
        self.jobs: set[Job] = set()
        self.runner = Runner(self)
        self.loop: asyncio.AbstractEventLoop
        self.patience: Patience
        self._metrics = metrics
        self._scheduler = Scheduler[Job](FIRST_LIMIT)
        self._lock = threading.Lock()  # of the scheduler, which both threads use
        self._gate = threading.Lock()  # released when there may be something to run
        self._gate.acquire()
        self._opening = False
        self._closed = ""
        self._seconds_per_row = 0.0
        self._most: dict[Model, int] = {}  # rows that a batch of a model may have at all

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.patience = Patience(loop)
        self.runner.start()

    @property
    def busy(self) -> bool:
        """A batch is running."""
        return self.runner.busy_since is not None

    @property
    def queued_rows(self) -> int:
        return self._scheduler.waiting

    def open(self, deadline: float, departure: Departure) -> Job:
        """A request begins. Whoever has the job closes it.

        deadline: on the loop's clock. departure: returns when the client has gone; not called while the body is read.

        Raises Unavailable.
        """
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        job = Job(self, deadline, departure)
        self.jobs.add(job)
        self.patience.begin(job)
        return job

    def submit(self, job: Job, rows: Rows, size: int) -> None:
        """Let these rows be computed. size: bytes that the answer holds at a time.

        Raises Unavailable, and QueueFull with the seconds after which the rows ahead should be done.
        """
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        if rows.model not in self._most:
            self._most[rows.model] = rows.model.buckets.max_rows
            self._set_limit(rows.model, FIRST_LIMIT)
        first = min(rows.n, self.window(rows.model))
        self._admit(first, size)
        self.held_bytes += size
        job.ask(rows, size)
        self.grant(job, first)

    def window(self, model: Model) -> int:
        """Rows of one request that are computed ahead of its reader."""
        return WINDOW * self._scheduler.limit(model)

    def grant(self, job: Job, rows: int) -> None:
        """Let so many more rows of the job be computed."""
        with self._lock:
            self._scheduler.grant(job, rows)
        self._open_gate_soon()

    def withdraw(self, job: Job) -> None:
        """Compute no more rows of the job."""
        with self._lock:
            self._scheduler.drop(job)

    def forget(self, job: Job) -> None:
        self.withdraw(job)
        self.jobs.discard(job)
        self.held_bytes -= job.size

    def expired(self, stage: str) -> DeadlineExceeded:
        """Count a deadline that passed in this stage, and tell it."""
        self._metrics.expired.labels(stage).inc()
        return DeadlineExceeded(f"the deadline passed in the stage {stage!r}", stage=stage)

    def failure(self, hang_timeout: float) -> str | None:
        """Why only a restart helps: the runner has died, or its batch has not ended for so many seconds."""
        if self.runner.failure is not None:
            return f"the thread that runs the models has died: {self.runner.failure!r}"
        since = self.runner.busy_since
        if since is not None and time.perf_counter() - since > hang_timeout:
            return f"a batch has been running for {time.perf_counter() - since:.0f} s"
        return None

    def oldest(self) -> float:
        """Seconds that the oldest of the waiting rows have waited."""
        since = min((job.since for job in self.jobs if job.waiting), default=None)
        return 0.0 if since is None else time.perf_counter() - since

    def close(self, reason: str) -> None:
        """Refuse what waits and what will come; what runs is answered."""
        self._closed = reason
        for job in list(self.jobs):
            if job.waiting:
                job.fail(Unavailable(reason, retry_after=1))
        self._open_gate()

    def _admit(self, rows: int, size: int) -> None:
        """One rule for a row and for many: an answer that would never fit goes in when nothing else is there."""
        waiting = self._scheduler.waiting
        full = ""
        if waiting and waiting + rows > self.max_queue_rows:
            full = f"{waiting} rows wait already and the limit is {self.max_queue_rows}"
        elif self.held_bytes and self.held_bytes + size > self.max_held_bytes:
            full = f"the answers being made hold {self.held_bytes} bytes and the limit is {self.max_held_bytes}"
        if full:
            seconds = max(1, math.ceil(waiting * self._seconds_per_row))
            self._metrics.rejected.labels("queue-full").inc()
            raise QueueFull(f"{full}: try again in {seconds} s", retry_after=seconds)

    def _open_gate_soon(self) -> None:
        """At the end of this turn of the loop, so that requests that came together run together."""
        if not self._opening:
            self._opening = True
            self.loop.call_soon(self._open_gate)

    def _open_gate(self) -> None:
        self._opening = False
        if self._gate.locked():
            self._gate.release()

    # What the runner calls, on its thread.

    def next_batch(self) -> Batch[Job] | None:
        while True:
            with self._lock:
                batch = self._scheduler.take() if self._scheduler.full else None
            if batch is None:
                self._gate.acquire()
                with self._lock:
                    batch = self._scheduler.take()
            if batch is not None:
                return batch
            if self._closed:
                return None

    def deliver(self, batch: Batch[Job], results: list[Arrays | Problem], started: float, ended: float) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self.loop.call_soon_threadsafe(self._delivered, batch, results, started, ended)

    def out_of_memory(self, model: Model, rows: int) -> None:
        self._most[model] = max(1, rows // 2)
        self._set_limit(model, self._scheduler.limit(model))
        self._metrics.out_of_memory.inc()

    def died(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.close, "the thread that runs the models has died")

    # And what comes of it, on the loop again.

    def _delivered(self, batch: Batch[Job], results: list[Arrays | Problem], started: float, ended: float) -> None:
        seconds = ended - started
        self._seconds_per_row += FORGETTING * (seconds / batch.rows - self._seconds_per_row)
        if batch.closed == "full":
            self._adapt(batch.model, seconds)
        self._metrics.batch(batch, seconds, [started - piece.ticket.since for piece in batch.pieces])
        for piece, result in zip(batch.pieces, results, strict=True):
            piece.ticket.done(result, piece.hi - piece.lo, started, ended)
        if self._scheduler.waiting:
            self._open_gate_soon()

    def _adapt(self, model: Model, seconds: float) -> None:
        """Let the batches of this model take about BATCH_SECONDS. Powers of two, so that it comes to rest."""
        limit = self._scheduler.limit(model)
        if 2 * seconds < BATCH_SECONDS:
            self._set_limit(model, 2 * limit)
        elif seconds > 2 * BATCH_SECONDS:
            self._set_limit(model, limit // 2)

    def _set_limit(self, model: Model, rows: int) -> None:
        """Let the batches of this model have so many rows, if the device has memory for them."""
        with self._lock:
            self._scheduler.set_limit(model, max(1, min(rows, self._most[model])))
