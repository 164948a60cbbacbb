"""The engine: rows of requests wait in one queue, and runner threads run them in batches.

There is one runner on a GPU, and one a core on the CPU. All rows that wait when a runner becomes free run together.
There is no batching timer: a lone request never waits, and batches grow while the runners are busy. onnxruntime
releases the GIL, so the event loop goes on meanwhile. A few rows of a lone request run on the event loop's thread.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from reparam.service.engine.admission import Admission
from reparam.service.engine.deadlines import SHORT, Deadlines
from reparam.service.engine.job import Job
from reparam.service.engine.queue import Queue
from reparam.service.engine.runner import Result, Runner
from reparam.service.engine.scheduler import Batch, Closed, Piece, Ticket
from reparam.service.errors import DeadlineExceeded, Problem, Unavailable, cut_off
from reparam.service.runtime.graphs import Graph, Work
from reparam.service.telemetry.metrics import Metrics
from reparam.service.telemetry.recorder import Recorder

BATCH_SECONDS = 0.0025  # time of a full batch, about: what a row may have to wait for others
WINDOW = 4  # batches of one request that wait or are computed ahead of its reader, so that no runner waits for it
GATHER_TURNS = 3  # keep collecting for at most so many loop iterations, as long as each adds rows
LONE_PART = 64  # up to batch_rows / 64 rows run faster than a runner thread wakes up, so the event loop runs them
RECOVERY = 60.0  # seconds after which batches are as large again as before the device had no memory
FORGETTING = 0.1  # weight of the latest batch in the measured time of a row

log = logging.getLogger(__name__)


class Engine:
    """Runs rows in batches, within the limits of admission.

    The event loop's thread calls all methods, except for those that begin with `_thread`.

    jobs: requests that have begun and not left.
    """

    def __init__(
        self, runners: int, max_queue_rows: int, max_reserved_bytes: int, metrics: Metrics, recorder: Recorder
    ) -> None:
        self.jobs: set[Job] = set()
        self.admission = Admission(max_queue_rows, max_reserved_bytes, metrics)
        self.loop: asyncio.AbstractEventLoop
        self.deadlines: Deadlines
        self._runners = [Runner(number, self._thread_out_of_memory) for number in range(runners)]
        self._loaded = Future[None]()
        self._metrics = metrics
        self._recorder = recorder
        self._queue = Queue[Job]()
        self._turns = 0  # loop iterations since rows wait that no runner was woken for
        self._arrives_singly = False  # the latest request was the only one of its loop iteration
        self._closed = ""  # why no rows are taken any more

    def start(self, loop: asyncio.AbstractEventLoop, load: Callable[[], None]) -> asyncio.Future[None]:
        """Start the runners' threads.

        load: called on the first runner's thread, which is the only one on a GPU; may take long

        Returns: a future that ends when `load` has ended, with its error if it raised
        """
        self.loop = loop
        self.deadlines = Deadlines(loop, self.jobs, self._expire)
        for runner in self._runners:
            # A daemon, because a run that hangs must not keep the process from ending.
            name = f"runner {runner.number}"
            threading.Thread(target=self._thread, args=(runner, load), name=name, daemon=True).start()
        return asyncio.wrap_future(self._loaded, loop=loop)

    def serve(self, graph: Graph) -> None:
        """Take rows of this graph from now on."""
        self._queue.set_limit(graph, graph.batch_rows)

    @property
    def busy(self) -> bool:
        """A batch is running, or models are being loaded."""
        return not self._loaded.done() or any(runner.busy_since is not None for runner in self._runners)

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._queue.waiting

    def join(self, job: Job) -> None:
        """Begin a request. The caller calls `leave` in the end. Raises Unavailable."""
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        job.deadline = self.loop.time() + job.timeout
        self.jobs.add(job)
        if not self.deadlines.is_running or job.timeout < SHORT:
            self.deadlines.watch(job)

    def reserve_body(self, job: Job, size: int) -> None:
        """Reserve room for so many more bytes of the job's body. Raises QueueFull."""
        self.admission.admit_body(job, self._queue.waiting, size)

    def submit(self, job: Job, work: Work, size: int, first: int) -> None:
        """Compute the work of a job that has joined.

        size: bytes that the response reserves at a time
        first: rows that may run now; `grant` lets more rows run

        Raises: Unavailable; QueueFull with the seconds after which the rows ahead should be done
        """
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        self.admission.admit(job, self._queue.waiting, first, size)
        job.start(work)
        if self._arrives_singly and first == work.n and self._is_lone(job, first):
            self._arrives_singly = False  # until this loop iteration has ended without another request
            self.loop.call_soon(self._end_turn)
            self._run_lone(job, 0, first, "drained")
        else:
            job.ticket = Ticket(job, work.graph, work.n)
            self.grant(job, first)

    def window(self, graph: Graph) -> int:
        """Return the rows of one request that may run ahead of its reader."""
        return WINDOW * graph.batch_rows

    def grant(self, job: Job, rows: int) -> None:
        """Let so many more rows of the job run."""
        if self._closed:
            self.fail(job, Unavailable(self._closed, retry_after=1))
        elif job.ticket is not None:
            self._queue.grant(job.ticket, rows)
            if not self._turns and self._queue.is_shut():
                self._gather(0)

    def fail(self, job: Job, error: Exception) -> None:
        """Compute no more rows of the job, and tell it why. Does nothing if the job has failed or left."""
        if job.error is None and job.is_open:
            job.error = error
            self._withdraw(job)
            job.on_change()

    def leave(self, job: Job) -> None:
        """End a request: its response has been sent, or will never be."""
        job.is_open = False
        job.done.clear()
        if job.timer is not None:
            job.timer.cancel()
        if job.ticket is not None and job.ticket.taken < job.ticket.rows:
            self._withdraw(job)
        self.jobs.discard(job)
        self.admission.release(job)

    def expired(self, stage: str, timeout: float) -> DeadlineExceeded:
        """Count a deadline that passed in this stage, and return the problem of it. timeout: seconds."""
        self._metrics.expired.labels(stage).inc()
        faster = "send the body at once" if stage == "body" else "ask for fewer rows"
        return DeadlineExceeded(
            f"{timeout:g} s were not enough, they ended in the stage {stage!r}: {faster}, or ask for more time by the "
            "header `Request-Timeout`, as far as the service allows",
            stage=stage,
        )

    def failure(self, hang_timeout: float) -> str | None:
        """Say why only a restart helps: a runner has died, or a batch runs longer than hang_timeout, in seconds."""
        for runner in self._runners:
            if runner.failure is not None:
                return f"a thread that runs the models has died: {runner.failure!r}"
            since = runner.busy_since
            if since is not None and time.perf_counter() - since > hang_timeout:
                return f"a batch has been running for {time.perf_counter() - since:.0f} s"
        return None

    def oldest(self) -> float:
        """Return the seconds that the oldest waiting row has waited."""
        waiting = (job for job in self.jobs if job.ticket is not None and job.ticket.waiting)
        since = min((job.waiting_since for job in waiting), default=None)
        return 0.0 if since is None else time.perf_counter() - since

    def close(self, reason: str) -> None:
        """Refuse rows that wait and rows that come. Rows that run are answered."""
        self._closed = reason
        for job in list(self.jobs):
            if job.ticket is not None and job.ticket.waiting:
                self.fail(job, Unavailable(reason, retry_after=1))
        self._queue.close()

    def abandon(self) -> None:
        """Fail all jobs: the process ends before their rows are computed."""
        for job in list(self.jobs):
            self.fail(job, cut_off())

    def _expire(self, job: Job) -> None:
        """Fail a job whose deadline has passed, unless it only waits for its client to read."""
        if job.stage != "send":
            self.fail(job, self.expired(job.stage, job.timeout))

    def _withdraw(self, job: Job) -> None:
        if job.ticket is not None:
            self._queue.drop(job.ticket)

    # How batches start. Simultaneous requests share a batch, so it starts after the loop has read all ready sockets.

    def _gather(self, before: int) -> None:
        """Wake a runner, once a loop iteration has added no rows to those that waited before, or after a few."""
        waiting = self._queue.waiting
        if self._turns < GATHER_TURNS and waiting > before:
            self._turns += 1
            self.loop.call_soon(self._gather, waiting)
            return
        self._turns = 0
        self._arrives_singly = self._take_lone()
        if not self._arrives_singly:
            self._queue.open()

    def _end_turn(self) -> None:
        self._arrives_singly = not self._turns

    def _is_lone(self, job: Job, rows: int) -> bool:
        """Tell whether the job is the only one, and its rows take less time to run than a runner to wake up."""
        graph = job.work.graph
        return (
            len(self.jobs) == 1
            and graph.steady
            and 0 < rows <= self._queue.limits[graph] // LONE_PART
            and job.timer is None  # so the deadline is not near
            and self._queue.free == len(self._runners)
        )

    def _take_lone(self) -> bool:
        """Run the rows that wait here, if they belong to a lone job. Returns whether they did."""
        if len(self.jobs) != 1:
            return False
        (job,) = self.jobs
        if job.ticket is None:
            return False
        batch = self._queue.take() if self._is_lone(job, job.ticket.waiting) else None
        if batch is None:
            return False
        ((_, lo, hi),) = batch.pieces
        self._run_lone(job, lo, hi, batch.closed)
        return True

    def _run_lone(self, job: Job, lo: int, hi: int, closed: Closed) -> None:
        """Run rows lo .. hi - 1 of a job on this thread. All runners wait, so the first one's replica is free."""
        shares = [(job.work, lo, hi)]
        started = time.perf_counter()
        try:
            results = job.work.graph.replicas[0].compute(shares)
        except Exception as error:  # onnxruntime's errors have no narrower common base
            results = self._runners[0].isolate(shares, error)
        self._finish(
            Batch(job.work.graph, [Piece(job, lo, hi)], hi - lo, closed), results, started, time.perf_counter()
        )

    def _finish(self, batch: Batch[Job], results: list[Result], started: float, ended: float) -> None:
        """Hand out the results of a batch."""
        seconds, admission = ended - started, self.admission
        latest = seconds / batch.rows / len(self._runners)
        admission.seconds_per_row += FORGETTING * (latest - admission.seconds_per_row)
        waits = [started - job.waiting_since for job, _, _ in batch.pieces]
        for (job, lo, hi), result in zip(batch.pieces, results, strict=True):
            job.add_times(started, ended)
            if job.error is not None or not job.is_open:
                continue
            if isinstance(result, Problem):
                self.fail(job, result)
            elif job.add_result(result, lo, hi):
                job.on_change()
        self._recorder.batch(batch.graph.labels, batch.rows, batch.closed, seconds, waits)

    # What runs on the runners' threads.

    def _thread(self, runner: Runner, load: Callable[[], None]) -> None:
        try:
            if runner.number == 0 and self._loaded.set_running_or_notify_cancel():
                self._thread_load(load)
            while (batch := self._queue.wait()) is not None:
                shares = [(job.work, lo, hi) for job, lo, hi in batch.pieces]
                self._thread_call(self._finish, batch, *runner.run(shares))
        except BaseException as error:  # /livez reports every reason for which the thread can end
            log.exception("the runner died")
            runner.failure = error
            self._thread_call(self.close, "a thread that runs the models has died")

    def _thread_load(self, load: Callable[[], None]) -> None:
        try:
            load()
        except Exception as error:  # raised where the future is awaited; the runner goes on
            self._loaded.set_exception(error)
        else:
            self._loaded.set_result(None)

    def _thread_out_of_memory(self, graph: Graph, rows: int) -> None:
        """Make batches of the graph smaller than `rows` for a while, and count the failure."""
        before = self._queue.shrink(graph, rows)
        self._metrics.out_of_memory.inc()
        if before == graph.batch_rows > 1:  # otherwise a recovery is due already
            self._thread_call(self.loop.call_later, RECOVERY, self.serve, graph)

    def _thread_call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call the function on the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(function, *arguments)
