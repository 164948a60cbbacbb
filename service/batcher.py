"""Micro-batching: whatever is queued when the runner becomes free runs together.

The queue lives on the event loop, so it needs no lock; the models run on one thread, where onnxruntime releases the
GIL. There is no timer: a lone request never waits, and batches grow by themselves while the runner is busy.
"""

import asyncio
import logging
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from service.artifact import Arrays
from service.errors import DeadlineExceeded, ModelFailed, Problem, QueueFull, Unavailable
from service.metrics import Metrics
from service.rows import Rows, run

log = logging.getLogger(__name__)


@dataclass
class Timing:
    """Seconds that rows spent waiting and in the model; of a request in pieces, the sums."""

    queue: float = 0.0
    infer: float = 0.0


@dataclass(eq=False)
class _Job:
    rows: Rows
    answer: asyncio.Future[Arrays]
    queued_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    finished_at: float = 0.0


class Batcher:
    """Runs rows in batches of at most `max_batch_rows`, while at most `max_queue_rows` wait."""

    def __init__(self, max_batch_rows: int, max_queue_rows: int, metrics: Metrics) -> None:
        self.max_batch_rows = max_batch_rows
        self.max_queue_rows = max_queue_rows
        self._metrics = metrics
        self._queue: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "runner")
        self._seconds_per_row = 0.0
        self._closed = ""
        self.busy = False

    @property
    def queued_rows(self) -> int:
        return sum(job.rows.n for job in self._queue)

    def admit(self, rows: int) -> None:
        """Refuse a request for which there is no room; its first piece counts, the others follow one by one.

        Raises QueueFull with the seconds after which the rows ahead should be done.
        """
        waiting = self.queued_rows
        if waiting + min(rows, self.max_batch_rows) > self.max_queue_rows:
            seconds = max(1, math.ceil(waiting * self._seconds_per_row))
            self._metrics.rejected.labels("queue-full").inc()
            raise QueueFull(
                f"{waiting} rows wait already and the limit is {self.max_queue_rows}: try again in {seconds} s",
                retry_after=seconds,
            )

    async def run(self, rows: Rows, timing: Timing, deadline: float | None) -> Arrays:
        """The outputs of at most `max_batch_rows` rows.

        deadline: on the clock of the event loop. Raises Problem.
        """
        if self._closed:
            raise Unavailable(self._closed, retry_after=1)
        job = _Job(rows, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._arrived.set()
        try:
            async with asyncio.timeout_at(deadline):
                outputs = await job.answer
        except TimeoutError:
            stage = "queue" if job.started_at is None else "infer"
            raise self.expired(stage) from None
        assert job.started_at is not None  # noqa: S101  # answered, so it was started
        timing.queue += job.started_at - job.queued_at
        timing.infer += job.finished_at - job.started_at
        return outputs

    def expired(self, stage: str) -> DeadlineExceeded:
        """Count a deadline that passed in this stage, and tell it."""
        self._metrics.expired.labels(stage).inc()
        return DeadlineExceeded(f"the deadline passed in the stage {stage!r}", stage=stage)

    async def serve(self) -> None:
        """Run batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                self._arrived.clear()
                continue
            started_at = time.perf_counter()
            for job in batch:
                job.started_at = started_at
            self.busy = True
            results = await loop.run_in_executor(self._thread, _run_isolated, [job.rows for job in batch])
            self.busy = False
            self._finish(batch, results)

    def close(self, reason: str) -> None:
        """Refuse what waits and what will come."""
        self._closed = reason
        for job in self._queue:
            if not job.answer.done():
                job.answer.set_exception(Unavailable(reason, retry_after=1))
        self._queue.clear()
        self._thread.shutdown(wait=False)

    def _take(self) -> list[_Job]:
        """From the front of the queue: jobs for one model, as many as fit. Those whose client is gone are dropped."""
        batch: list[_Job] = []
        total = 0
        passed_over: list[_Job] = []
        while self._queue and total < self.max_batch_rows:
            job = self._queue.popleft()
            if job.answer.done():
                continue
            fits = total + job.rows.n <= self.max_batch_rows
            if batch and not (fits and job.rows.model is batch[0].rows.model):
                passed_over.append(job)
                if not fits:
                    break
                continue
            batch.append(job)
            total += job.rows.n
        self._queue.extendleft(reversed(passed_over))
        return batch

    def _finish(self, batch: list[_Job], results: list[Arrays | Problem]) -> None:
        finished_at = time.perf_counter()
        total = sum(job.rows.n for job in batch)
        seconds = finished_at - (batch[0].started_at or finished_at)
        # The rate forgets: each batch counts a tenth.
        self._seconds_per_row += 0.1 * (seconds / total - self._seconds_per_row)
        self._metrics.batch(
            batch[0].rows.model, total, seconds, [(job.started_at or 0) - job.queued_at for job in batch]
        )
        for job, result in zip(batch, results, strict=True):
            job.finished_at = finished_at
            if job.answer.done():
                continue
            if isinstance(result, Problem):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)


def _run_isolated(batch: list[Rows]) -> list[Arrays | Problem]:
    """Run the batch; if that fails run each member alone, so that what fails, fails alone. Never raises."""
    try:
        return run(batch)
    except Exception as error:  # onnxruntime's errors have no common base but this
        if len(batch) > 1:
            return [result for rows in batch for result in _run_isolated([rows])]
        model = batch[0].model
        log.exception("a run failed", extra={"model": model.name, "version": model.version}, exc_info=error)
        return [ModelFailed(f"model {model.name!r} version {model.version} failed on these rows")]
