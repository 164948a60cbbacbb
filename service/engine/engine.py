"""The engine: rows of requests wait in one queue, and runner threads run the rows in batches.

A GPU has one runner, a CPU about one runner per core. When a runner becomes free, all waiting rows of one graph run
together, up to a full batch. There is no batching timer: a lone request never waits, and batches grow while the runners
are busy. onnxruntime releases the GIL, so the event loop continues during a batch. A few rows of a lone request run on
the event loop's thread.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread

from reparam.service.engine.admission import Admission
from reparam.service.engine.deadlines import SHORT, Deadlines
from reparam.service.engine.job import Job
from reparam.service.engine.queue import Queue
from reparam.service.engine.runner import Result, Runner
from reparam.service.engine.scheduler import Batch, Closed, Piece
from reparam.service.errors import DeadlineExceeded, Problem, Unavailable, cut_off
from reparam.service.runtime.graphs import Graph, Work
from reparam.service.telemetry.metrics import Metrics
from reparam.service.telemetry.recorder import Recorder

BATCH_SECONDS = 0.0025  # approximate time of a full batch, and so of a row's wait for rows of other requests
WINDOW = 4  # batches of one request that may be queued or unread, so that no runner waits for the reader
GATHER_TURNS = 3  # keep collecting for at most 3 loop iterations, as long as each adds rows
LONE_PART = 64  # up to batch_rows / 64 rows run faster than a runner thread wakes up, so the event loop runs such rows
RECOVERY = 60.0  # seconds from an out-of-memory error until the batch size is restored
FORGETTING = 0.1  # weight of the latest batch in the moving average of a row's time


class Engine:
    """Runs rows in batches, within the limits of admission.

    The event loop's thread calls all methods except `_thread...`, which runner threads call.

    runners: number of runner threads.
    max_queue_rows: limit on queued rows.
    max_reserved_bytes: limit on the bytes of bodies and responses.
    metrics: counts refused requests, passed deadlines and runs without memory.
    recorder: notes batches.
    admission: the limits, and the bytes reserved now.
    jobs: jobs that have joined and not left.
    loop, deadlines: set by `start`.
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
        self._turns = 0  # loop iterations spent collecting rows for the next batch; 0 while not collecting
        self._arrives_singly = False  # the latest request was the only one of its loop iteration
        self._closed = ""  # reason for refusing all rows; "" while rows are accepted

    def start(self, loop: asyncio.AbstractEventLoop, load: Callable[[], None]) -> asyncio.Future[None]:
        """Start the runner threads.

        loop: event loop of the requests.
        load: loads the models. Called on the first runner's thread, the only runner thread on a GPU. May take long.

        Returns: a future that completes with `load`, with the error if `load` raises.
        """
        self.loop = loop
        self.deadlines = Deadlines(loop, self.jobs, self._expire)
        finish, die = partial(self._thread_call, self._finish), partial(self._thread_call, self._end_service)
        for runner in self._runners:
            prepare = partial(self._thread_load, load) if runner.number == 0 else None
            arguments = self._queue, prepare, finish, die
            # A daemon thread, so that the process can end while a run hangs.
            Thread(target=runner.work, args=arguments, name=f"runner {runner.number}", daemon=True).start()
        return asyncio.wrap_future(self._loaded, loop=loop)

    def serve(self, graph: Graph) -> None:
        """Accept rows of this graph from now on, in batches of up to `graph.batch_rows` rows."""
        self._queue.set_limit(graph, graph.batch_rows)

    @property
    def busy(self) -> bool:
        """A batch is running on a runner thread, or models are being loaded."""
        return not self._loaded.done() or any(runner.busy_since is not None for runner in self._runners)

    @property
    def queued_rows(self) -> int:
        """Number of rows in the queue."""
        return self._queue.waiting

    def join(self, job: Job) -> None:
        """Begin a request, and watch its deadline. The caller must call `leave` at the end of the request.

        Raises: Unavailable after `close`.
        """
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        job.deadline = self.loop.time() + job.timeout
        self.jobs.add(job)
        if not self.deadlines.is_running or job.timeout < SHORT:
            self.deadlines.watch(job)

    def reserve_body(self, job: Job, size: int) -> None:
        """Reserve `size` bytes for a further part of the job's body.

        Raises: QueueFull.
        """
        self.admission.admit_body(job, self._queue.waiting, size)

    def submit(self, job: Job, work: Work, size: int, first: int) -> None:
        """Queue the first rows of a job that has joined. A few rows of the only job in the engine run at once instead.

        size: bytes to reserve: the largest part of the response in memory at a time, and the body unless
            `reserve_body` has reserved the body.
        first: number of rows that may run now; `grant` lets more rows run.

        Raises: Unavailable after `close`; QueueFull with the seconds until the queued rows should be done.
        """
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        self.admission.admit(job, self._queue.waiting, first, size)
        job.start(work)
        if self._arrives_singly and first == work.n and self._is_lone(job, first):
            self._arrives_singly = False  # until `_end_turn`, if this loop iteration brings no other request
            self.loop.call_soon(self._end_turn)
            job.ticket.granted = job.ticket.taken = first
            self._run_lone(job, 0, first, "drained")
        else:
            self.grant(job, first)

    def window(self, graph: Graph) -> int:
        """Return the number of rows of one request that may be queued or unread."""
        return WINDOW * graph.batch_rows

    def grant(self, job: Job, rows: int) -> None:
        """Let `rows` more rows of the job run. If the engine is closed, the job fails instead."""
        if self._closed:
            self.fail(job, Unavailable(self._closed, retry_after=1))
            return
        self._queue.grant(job.ticket, rows)
        if not self._turns and self._queue.is_shut():
            self._gather(0)

    def fail(self, job: Job, error: Exception) -> None:
        """Compute no more rows of the job, and set `job.error`. Does nothing if the job has failed or left."""
        if job.error is None and job.is_open:
            job.error = error
            self._queue.drop(job.ticket)
            job.on_change()

    def leave(self, job: Job) -> None:
        """End a request, after its response or without a response. Release the job's rows and bytes."""
        job.is_open = False
        job.results.clear()
        if job.timer is not None:
            job.timer.cancel()
        if job.ticket.taken < job.ticket.rows:
            self._queue.drop(job.ticket)
        job.ticket = Job.ticket  # a job and its ticket refer to each other; garbage collection would stop all requests
        self.jobs.discard(job)
        self.admission.release(job)

    def deadline_exceeded(self, stage: str, timeout: float) -> DeadlineExceeded:
        """Count a passed deadline, and return its problem.

        stage: stage of the job at the deadline.
        timeout: seconds allowed for the request.
        """
        self._metrics.expired.labels(stage).inc()
        faster = "send the body at once" if stage == "body" else "ask for fewer rows"
        return DeadlineExceeded(
            f"{timeout:g} s were not enough, they ended in the stage {stage!r}: {faster}, or ask for more time by the "
            "header `Request-Timeout`, as far as the service allows",
            stage=stage,
        )

    def failure(self, hang_timeout: float) -> str | None:
        """Return the reason for a restart, in words: a dead runner, or a hanging batch; None if all is well.

        hang_timeout: seconds from the start of a batch until the batch counts as hanging.
        """
        for runner in self._runners:
            if runner.failure is not None:
                return f"a thread that runs the models has died: {runner.failure!r}"
            since = runner.busy_since
            if since is not None and time.perf_counter() - since > hang_timeout:
                return f"a batch has been running for {time.perf_counter() - since:.0f} s"
        return None

    def oldest_wait(self) -> float:
        """Return the waiting time of the oldest row in the queue, in seconds; 0 for an empty queue."""
        since = min((job.waiting_since for job in self.jobs if job.ticket.waiting), default=None)
        return 0.0 if since is None else time.perf_counter() - since

    def close(self, reason: str) -> None:
        """Refuse queued rows and new rows. Rows already running are still answered.

        reason: detail of the problem for refused requests.
        """
        self._closed = reason
        for job in list(self.jobs):
            if job.ticket.waiting:
                self.fail(job, Unavailable(reason, retry_after=1))
        self._queue.close()

    def abandon(self) -> None:
        """Fail all jobs, because the process ends before the rows are computed."""
        for job in list(self.jobs):
            self.fail(job, cut_off())

    def _expire(self, job: Job) -> None:
        """Fail a job at its deadline, unless all rows are computed and only the client is slow."""
        if job.stage != "send":
            self.fail(job, self.deadline_exceeded(job.stage, job.timeout))

    # Starting a batch. Simultaneous requests share a batch, so the batch starts after the loop has read all ready
    # sockets.

    def _gather(self, before: int) -> None:
        """Wake a runner when a loop iteration has added no rows, or after GATHER_TURNS iterations.

        before: number of queued rows at the loop iteration before.
        """
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
        """Check that the job is alone, and that its rows run faster than a runner thread wakes up."""
        graph = job.work.graph
        return (
            len(self.jobs) == 1
            and graph.steady
            and rows <= self._queue.limits[graph] // LONE_PART
            and job.timer is None  # a timer means two visits by Deadlines, or a timeout below SHORT
            and self._queue.free == len(self._runners)  # read without the lock: no other job has rows to take
        )

    def _take_lone(self) -> bool:
        """Run the queued rows on this thread if the rows belong to a lone job.

        Returns: True if rows ran.
        """
        if len(self.jobs) != 1:
            return False
        (job,) = self.jobs
        rows = job.ticket.waiting
        batch = self._queue.take() if rows and self._is_lone(job, rows) else None
        if batch is None:
            return False
        ((_, lo, hi),) = batch.pieces
        self._run_lone(job, lo, hi, batch.closed)
        return True

    def _run_lone(self, job: Job, lo: int, hi: int, closed: Closed) -> None:
        """Run rows lo .. hi - 1 of a job on this thread. All runners wait, so the first runner's replica is free."""
        shares = [(job.work, lo, hi)]
        started = time.perf_counter()
        try:
            results = job.work.graph.replicas[0].compute(shares)
        except Exception as error:  # onnxruntime's errors have no narrower common base
            results = self._runners[0].isolate(shares, error)
        batch = Batch(job.work.graph, [Piece(job, lo, hi)], hi - lo, closed)
        self._finish(batch, results, started, time.perf_counter())

    def _finish(self, batch: Batch[Job], results: list[Result], started: float, ended: float) -> None:
        """Hand the results of a batch to the jobs.

        results: result or problem of each piece.
        started, ended: start and end of the batch, on time.perf_counter.
        """
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

    def _end_service(self, batch: Batch[Job] | None) -> None:
        """Refuse all rows after a runner has died: rows of the runner's batch, queued rows and new rows.

        batch: batch of the dead runner; None if the runner died between batches.
        """
        reason = "a thread that runs the models has died"
        self.close(reason)
        for job, _, _ in batch.pieces if batch is not None else ():
            self.fail(job, Unavailable(reason, retry_after=1))

    # Methods for the runner threads.

    def _thread_load(self, load: Callable[[], None]) -> None:
        if self._loaded.set_running_or_notify_cancel():
            try:
                load()
            except Exception as error:  # raised where the future is awaited; the runner continues
                self._loaded.set_exception(error)
            else:
                self._loaded.set_result(None)

    def _thread_out_of_memory(self, graph: Graph, rows: int) -> None:
        """Limit batches of the graph to half of `rows` for RECOVERY seconds, and count the failure."""
        before = self._queue.shrink(graph, rows)
        self._metrics.out_of_memory.inc()
        if before == graph.batch_rows > 1:  # a smaller limit means that a recovery is already scheduled
            self._thread_call(self.loop.call_later, RECOVERY, self.serve, graph)

    def _thread_call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call the function on the event loop's thread. Does nothing after the loop has ended."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(function, *arguments)
