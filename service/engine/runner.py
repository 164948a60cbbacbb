"""Runners: each computes one batch after the other. After a failure, only the rows at fault fail."""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.job import Job
from reparam.service.engine.queue import Queue
from reparam.service.engine.scheduler import Batch
from reparam.service.errors import ModelFailed, Problem, Unavailable
from reparam.service.runtime.graphs import Graph, Share, is_out_of_memory

log = logging.getLogger(__name__)

Result = Arrays | Problem


class Runner:
    """Computes batches on one replica of each graph, a batch at a time. A replica is a copy of the graph's buffers.

    number: index of this runner's replica of each graph.
    on_out_of_memory: called with the graph and the number of rows when the device has no memory for a run.
    busy_since: start of the running batch, on time.perf_counter; None while no batch runs.
    failure: the error that ended the runner's thread; None while the thread runs.
    """

    def __init__(self, number: int, on_out_of_memory: Callable[[Graph, int], None]) -> None:
        self.number = number
        self.busy_since: float | None = None
        self.failure: BaseException | None = None
        self._on_out_of_memory = on_out_of_memory

    def work(
        self,
        queue: Queue[Job],
        prepare: Callable[[], None] | None,
        finish: Callable[[Batch[Job], list[Result], float, float], None],
        die: Callable[[Batch[Job] | None], None],
    ) -> None:
        """Run the batches of the queue until the queue ends. The body of the runner's thread.

        prepare: called before the first batch.
        finish: called after each batch with the batch, the result of each piece, and start and end on
            time.perf_counter.
        die: called after an error that ends the thread, once `failure` is set. The argument is the batch at fault, or
            None between batches.
        """
        batch = None
        try:
            if prepare is not None:
                prepare()
            while (batch := queue.wait()) is not None:
                finish(batch, *self.run([(job.work, lo, hi) for job, lo, hi in batch.pieces]))
                batch = None  # the batch is finished, so an error of `wait` is not about it
        except BaseException as error:  # /livez reports every error that ends the thread
            log.exception("the runner died")
            self.failure = error
            die(batch)

    def run(self, shares: Sequence[Share]) -> tuple[list[Result], float, float]:
        """Compute a batch of rows of one graph.

        shares: rows of works, each as (work, lo, hi).

        Returns: the result or problem of each share; start and end of the batch, on time.perf_counter.

        Raises: an error of onnxruntime if the GPU has become unusable for this process.
        """
        self.busy_since = started = time.perf_counter()
        results = self._attempt(shares)
        self.busy_since = None
        return results, started, time.perf_counter()

    def isolate(self, shares: Sequence[Share], error: Exception) -> list[Result]:
        """Compute a failed batch again in halves, so that only the rows at fault fail.

        shares: rows of the failed batch, each as (work, lo, hi).
        error: error of the failed batch.

        Returns: the result or problem of each share.

        Raises: an error of onnxruntime if the GPU has become unusable for this process.
        """
        graph = shares[0][0].graph
        no_memory = is_out_of_memory(error)
        rows = sum(hi - lo for _, lo, hi in shares)
        if no_memory:
            self._on_out_of_memory(graph, rows)
        if len(shares) > 1:
            middle = len(shares) // 2
            return self._attempt(shares[:middle]) + self._attempt(shares[middle:])
        ((work, lo, hi),) = shares
        if no_memory and rows > 1:
            middle = lo + rows // 2
            return [_joined(self._attempt([(work, lo, middle)]), self._attempt([(work, middle, hi)]))]
        log.error("a run failed", exc_info=error, extra=work.log_fields(lo, hi))
        if no_memory:
            return [Unavailable(f"the device has no memory for a row of model {graph.model!r}", retry_after=1)]
        graph.replicas[self.number].check_device()
        return [ModelFailed(f"{work.describe(lo, hi)} failed: the service's log has the cause under these numbers")]

    def _attempt(self, shares: Sequence[Share]) -> list[Result]:
        try:
            return shares[0][0].graph.replicas[self.number].compute(shares)
        except Exception as error:  # onnxruntime's errors have no narrower common base
            return self.isolate(shares, error)


def _joined(first: list[Result], second: list[Result]) -> Result:
    """Join the results of the two halves of one share."""
    (left,), (right,) = first, second
    if isinstance(left, Problem):
        return left
    if isinstance(right, Problem):
        return right
    return {name: np.concatenate([left[name], right[name]]) for name in left}
