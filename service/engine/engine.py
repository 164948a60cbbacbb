"""The engine: rows of requests wait in one queue, and threads run them in batches: one on a GPU, one a core on the CPU.
A few rows of a lone request are run on the event loop's thread.

Whatever waits when a thread becomes free runs together. There is no batching timer: a lone request never waits, and
batches grow by themselves while the threads are busy. onnxruntime releases the GIL: the event loop goes on meanwhile.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.deadlines import Patience
from reparam.service.engine.job import Job
from reparam.service.engine.runner import Runner
from reparam.service.engine.scheduler import Batch, Scheduler
from reparam.service.errors import DeadlineExceeded, Problem, QueueFull, Unavailable, cut_off
from reparam.service.runtime.repository import Model
from reparam.service.runtime.sampler import Rows
from reparam.service.telemetry.metrics import Metrics

BATCH_SECONDS = 0.0025  # a batch has as many rows as take about that long: what a row may have to wait for others
WINDOW = 4  # batches of one request that wait or lie computed at a time, so that no thread need wait for a reader
GATHERING = 3  # turns of the loop that a runner waits for more rows, while each brings some
PROMPT = 64  # a batch, which takes milliseconds, has as many times the rows that run while another thread wakes up
RECOVERY = 60.0  # seconds after which batches are as large again as before the device had no memory
FORGETTING = 0.1  # what the latest batch counts for in the measured rate


class Engine:
    """Runs rows in batches, while at most `max_queue_rows` rows wait, and the requests being answered hold at most
    `max_held_bytes`, their answers included.

    All methods are for the event loop's thread, but for the five that the runners call.
    """

    def __init__(self, runners: int, max_queue_rows: int, max_held_bytes: int, metrics: Metrics) -> None:
        self.max_queue_rows = max_queue_rows
        self.max_held_bytes = max_held_bytes
        self.held_bytes = 0
        self._incoming_bytes = 0  # of these, of bodies that are not read yet
        self.jobs: set[Job] = set()
        self.runners = [Runner(self, number) for number in range(runners)]
        self.loop: asyncio.AbstractEventLoop
        self._load: Callable[[], None]
        self._loaded = Future[None]()
        self.patience: Patience
        self._metrics = metrics
        self._scheduler = Scheduler[Job]()
        self._lock = threading.Lock()  # of what all threads use: the scheduler, and these two
        self._gate = threading.Lock()  # open while there may be something to run
        self._gate.acquire()
        self._free = 0  # runners that wait at the gate
        self._turns = 0  # of the loop, since rows wait that no runner was told of
        self._one_by_one = False  # is how requests come: the latest was alone in its turn
        self._closed = ""
        self._seconds_per_row = 0.0

    def start(self, loop: asyncio.AbstractEventLoop, load: Callable[[], None]) -> asyncio.Future[None]:
        """load: is called on the first runner's thread, the only one on a GPU, and may take long. What is returned ends
        when it has ended, and raises what it raised."""
        self.loop = loop
        self.patience = Patience(loop, self.jobs)
        self._load = load
        for runner in self.runners:
            runner.start()
        return asyncio.wrap_future(self._loaded, loop=loop)

    def serve(self, model: Model) -> None:
        """From now on rows of the model may be submitted."""
        with self._lock:
            self._scheduler.set_limit(model, model.batch_rows)

    @property
    def busy(self) -> bool:
        """A batch is running, or models are being loaded."""
        return not self._loaded.done() or any(runner.busy_since is not None for runner in self.runners)

    @property
    def queued_rows(self) -> int:
        return self._scheduler.waiting

    def join(self, job: Job) -> None:
        """A request begins. Whoever has the job closes it. Raises Unavailable."""
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        job.deadline = self.loop.time() + job.timeout
        self.jobs.add(job)
        self.patience.begin(job)

    def submit(self, job: Job, rows: Rows, size: int, first: int) -> None:
        """Let these rows be computed, the first of them now. size: bytes that the answer holds at a time, besides those
        that the job holds already.

        Raises Unavailable, and QueueFull with the seconds after which the rows ahead should be done.
        """
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        body = job.size
        self._admit(job, first, size)
        self._incoming_bytes -= body
        job.ask(rows)
        self.grant(job, first)

    def hold(self, job: Job, size: int) -> None:
        """So many more bytes of the job's body have come. Bodies that are not whole yet may be half of what is held, so
        that clients who never end leave room for others. Raises QueueFull."""
        limit = self.max_held_bytes // 2
        if self._incoming_bytes > job.size and self._incoming_bytes + size > limit:
            raise self._full(
                "incoming", f"the bodies that come hold {self._incoming_bytes} bytes and the limit is {limit}"
            )
        self._admit(job, 0, size)
        self._incoming_bytes += size

    def window(self, model: Model) -> int:
        """Rows of one request that are computed ahead of its reader."""
        return WINDOW * model.batch_rows

    def grant(self, job: Job, rows: int) -> None:
        """Let so many more rows of the job be computed."""
        if self._closed:
            job.fail(Unavailable(self._closed, retry_after=1))
            return
        with self._lock:
            self._scheduler.grant(job, rows)
        self._open_gate_soon()

    def withdraw(self, job: Job) -> None:
        """Compute no more rows of the job."""
        with self._lock:
            self._scheduler.drop(job)

    def forget(self, job: Job) -> None:
        if job.taken < job.rows:
            self.withdraw(job)
        self.jobs.discard(job)
        self.held_bytes -= job.size
        if job.reading:
            self._incoming_bytes -= job.size

    def expired(self, stage: str, timeout: float) -> DeadlineExceeded:
        """Count a deadline of so many seconds that passed in this stage, and return the error for it."""
        self._metrics.expired.labels(stage).inc()
        faster = "send the body at once" if stage == "body" else "ask for fewer rows"
        return DeadlineExceeded(
            f"{timeout:g} s were not enough, they ended in the stage {stage!r}: {faster}, or ask for more time by the "
            "header `Request-Timeout`, as far as the service allows",
            stage=stage,
        )

    def failure(self, hang_timeout: float) -> str | None:
        """Why only a restart helps: a runner has died, or its batch has not ended for so many seconds."""
        for runner in self.runners:
            if runner.failure is not None:
                return f"a thread that runs the models has died: {runner.failure!r}"
            since = runner.busy_since
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

    def abandon(self) -> None:
        """Answer whoever still waits for what runs: it comes too late."""
        for job in list(self.jobs):
            job.fail(cut_off())

    def _admit(self, job: Job, rows: int, size: int) -> None:
        """One rule for a row and for many: what would never fit goes in when nothing else is there."""
        waiting, others = self._scheduler.waiting, self.held_bytes - job.size
        if waiting and waiting + rows > self.max_queue_rows:
            raise self._full("rows", f"{waiting} rows wait already and the limit is {self.max_queue_rows}")
        if others and self.held_bytes + size > self.max_held_bytes:
            raise self._full(
                "bytes",
                f"the requests being answered hold {self.held_bytes} bytes and the limit is {self.max_held_bytes}",
            )
        job.size += size
        self.held_bytes += size

    def _full(self, reason: str, why: str) -> QueueFull:
        seconds = max(1, math.ceil(self._scheduler.waiting * self._seconds_per_row))
        self._metrics.rejected.labels(reason).inc()
        return QueueFull(f"{why}: try again in {seconds} s", retry_after=seconds)

    def _open_gate_soon(self) -> None:
        """When the loop has read what had come, so that requests that came together run together; now, while they come
        one by one."""
        if self._turns or not self._gate.locked():
            return
        if self._one_by_one and self._run_here():
            self._one_by_one = False  # until this turn has ended and has brought no other
            self.loop.call_soon(self._end_turn)
        else:
            self._gather(0)

    def _end_turn(self) -> None:
        self._one_by_one = not self._turns

    def _gather(self, before: int) -> None:
        """Open the gate if the last turn of the loop brought no more rows than waited before, or after a few turns."""
        waiting = self._scheduler.waiting
        if self._turns < GATHERING and waiting > before:
            self._turns += 1
            self.loop.call_soon(self._gather, waiting)
            return
        self._one_by_one = self._run_here()
        if not self._one_by_one:
            self._open_gate()

    def _run_here(self) -> bool:
        """A few rows of the one request there is, whose deadline is not near: they are computed before a runner would
        have woken up."""
        if len(self.jobs) != 1:
            return False
        (job,) = self.jobs
        with self._lock:
            prompt = 0 < job.waiting <= self._prompt_rows(job.model) and self._free == len(self.runners)
            batch = self._scheduler.take() if prompt and job.timer is None else None
        if batch is None:
            return False
        self._turns = 0
        self._delivered(batch, *self.runners[0].compute(batch))
        return True

    def _prompt_rows(self, model: Model) -> int:
        """Rows that take less time to run than a runner to wake up."""
        return self._scheduler.limit(model) // PROMPT if model.steady else 0

    def _open_gate(self) -> None:
        self._turns = 0
        with self._lock:
            if self._gate.locked():
                self._gate.release()

    # What the runners call, each on its thread.

    def prepare(self, number: int) -> None:
        if number == 0 and self._loaded.set_running_or_notify_cancel():
            try:
                self._load()
            except Exception as error:  # for whoever waits for it; the runner goes on
                self._loaded.set_exception(error)
            else:
                self._loaded.set_result(None)

    def next_batch(self) -> Batch[Job] | None:
        """Whoever passes the gate leaves it open for the next, if anything is left to do."""
        while True:
            with self._lock:
                self._free += 1
            self._gate.acquire()
            with self._lock:
                batch = self._scheduler.take(self._free)
                self._free -= 1
                if (self._scheduler.waiting or self._closed) and self._gate.locked():
                    self._gate.release()
            if batch is not None or self._closed:
                return batch

    def deliver(self, batch: Batch[Job], results: list[Arrays | Problem], started: float, ended: float) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self.loop.call_soon_threadsafe(self._delivered, batch, results, started, ended)

    def out_of_memory(self, model: Model, rows: int) -> None:
        with self._lock:
            before = self._scheduler.limit(model)
            self._scheduler.set_limit(model, max(1, min(before, rows // 2)))
        self._metrics.out_of_memory.inc()
        if before == model.batch_rows > 1:  # else it recovers soon anyway
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self.loop.call_later, RECOVERY, self.serve, model)

    def died(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.close, "a thread that runs the models has died")

    # And what comes of it, on the loop again.

    def _delivered(self, batch: Batch[Job], results: list[Arrays | Problem], started: float, ended: float) -> None:
        seconds = ended - started
        self._seconds_per_row += FORGETTING * (seconds / batch.rows / len(self.runners) - self._seconds_per_row)
        waited = [started - piece.ticket.since for piece in batch.pieces]
        for piece, result in zip(batch.pieces, results, strict=True):
            piece.ticket.take(result, piece.lo, piece.hi, started, ended)
        self._metrics.batch(batch, seconds, waited)
