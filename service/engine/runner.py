"""The threads that run the models."""

import logging
import threading
import time
from typing import Protocol

import numpy as np

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.job import Job
from reparam.service.engine.scheduler import Batch, Piece
from reparam.service.errors import ModelFailed, Problem, Unavailable
from reparam.service.runtime.graphs import is_out_of_memory
from reparam.service.runtime.repository import Model
from reparam.service.runtime.sampler import about, compute, told

log = logging.getLogger(__name__)


class Work(Protocol):
    """Where batches come from and results go; every method is called on the thread."""

    def prepare(self, number: int) -> None:
        """Is called before the first batch, with the runner's number."""

    def next_batch(self) -> Batch[Job] | None:
        """Waits for the next batch; None ends the thread."""

    def deliver(self, batch: Batch[Job], results: list[Arrays | Problem], started: float, ended: float) -> None:
        """Takes the result of each piece; the times are of time.perf_counter."""

    def out_of_memory(self, model: Model, rows: int) -> None:
        """Is told that the device had no memory for so many rows."""

    def died(self) -> None:
        """Is told that the thread ends for a reason that nobody foresaw: `failure`."""


class Runner(threading.Thread):
    """Runs one batch after the other. busy_since: when the batch that runs was started, on time.perf_counter."""

    def __init__(self, work: Work, number: int) -> None:
        super().__init__(name=f"runner {number}", daemon=True)  # one that hangs must not keep the process from ending
        self._work = work
        self._number = number
        self.failure: BaseException | None = None
        self.busy_since: float | None = None

    def run(self) -> None:
        try:
            self._work.prepare(self._number)
            while (batch := self._work.next_batch()) is not None:
                self._work.deliver(batch, *self.compute(batch))
        except BaseException as error:  # whatever it was, /livez tells
            log.exception("the runner died")
            self.failure = error
            self._work.died()

    def compute(self, batch: Batch[Job]) -> tuple[list[Arrays | Problem], float, float]:
        """The result of each piece, when it was started and when it had ended; on any thread, but one at a time."""
        self.busy_since = started = time.perf_counter()
        results = self._attempt(batch.pieces)
        self.busy_since = None
        return results, started, time.perf_counter()

    def _attempt(self, pieces: list[Piece[Job]]) -> list[Arrays | Problem]:
        """The result of each piece. A batch that fails is tried again in halves, so that what fails, fails alone.
        Raises what onnxruntime raises if nothing works any more."""
        model = pieces[0].ticket.request.model
        shares = [(piece.ticket.request, piece.lo, piece.hi) for piece in pieces]
        try:
            return compute(shares, model.buckets[self._number])
        except Exception as error:  # onnxruntime's errors have no common base but this
            no_memory = is_out_of_memory(error)
            rows = sum(piece.hi - piece.lo for piece in pieces)
            if no_memory:
                self._work.out_of_memory(model, rows)
            if len(pieces) > 1:
                middle = len(pieces) // 2
                return self._attempt(pieces[:middle]) + self._attempt(pieces[middle:])
            (piece,) = pieces
            if no_memory and rows > 1:
                middle = piece.lo + rows // 2
                return [_joined(self._attempt([piece._replace(hi=middle)]), self._attempt([piece._replace(lo=middle)]))]
            log.exception("a run failed", extra=about(shares[0]))
            if no_memory:
                return [Unavailable(f"the device has no memory for a row of model {model.name!r}", retry_after=1)]
            model.buckets[self._number].check_device()
            return [ModelFailed(f"{told(shares[0])} failed: the service's log has the cause under these numbers")]


def _joined(first: list[Arrays | Problem], second: list[Arrays | Problem]) -> Arrays | Problem:
    """The result of one piece that ran in two halves."""
    (left,), (right,) = first, second
    if isinstance(left, Problem):
        return left
    if isinstance(right, Problem):
        return right
    return {name: np.concatenate([left[name], right[name]]) for name in left}
