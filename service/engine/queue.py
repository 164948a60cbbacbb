"""The queue: a scheduler shared by the event loop and the runner threads."""

import threading

from reparam.service.engine.scheduler import Batch, Owner, Scheduler, Ticket


class Queue(Scheduler[Owner]):
    """A scheduler for several threads. Methods of Scheduler are the same here, under a lock.

    Runners wait at a gate. The event loop opens the gate when a batch may start.

    free: number of runners waiting at the gate.
    is_shut: function without arguments; True while the gate is shut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.free = 0
        self._closed = False
        self._lock = threading.Lock()  # held to use the scheduler, the gate and `free`
        self._gate = threading.Lock()  # unlocked means open; each runner that passes the gate locks it again
        self._gate.acquire()
        self.is_shut = self._gate.locked

    def grant(self, ticket: Ticket[Owner], rows: int) -> None:
        with self._lock:
            super().grant(ticket, rows)

    def drop(self, ticket: Ticket[Owner]) -> None:
        with self._lock:
            super().drop(ticket)

    def take(self, runners: int = 1) -> Batch[Owner] | None:
        with self._lock:
            return super().take(runners)

    def set_limit(self, graph: object, rows: int) -> None:
        with self._lock:
            super().set_limit(graph, rows)

    def shrink(self, graph: object, rows: int) -> int:
        """Lower the batch limit of a graph after a batch ran out of memory.

        rows: rows in the failed batch. The new limit is half of them, at least 1, and never above the present limit.

        Returns: the limit before the call.
        """
        with self._lock:
            before = self.limits[graph]
            super().set_limit(graph, max(1, min(before, rows // 2)))
            return before

    def open(self) -> None:
        """Open the gate for one runner. While rows remain, each runner opens the gate for the next runner."""
        with self._lock:
            if self._gate.locked():
                self._gate.release()

    def close(self) -> None:
        """End all runners once the queue is empty."""
        self._closed = True
        self.open()

    def wait(self) -> Batch[Owner] | None:
        """Block a runner's thread until there is a batch.

        If work remains after taking a batch, the gate stays open for the next runner.

        Returns: the batch; None if the queue is closed and empty, so the runner must end.
        """
        while True:
            with self._lock:
                self.free += 1
            self._gate.acquire()
            with self._lock:
                batch = super().take(self.free)
                self.free -= 1
                if (self.waiting or self._closed) and self._gate.locked():
                    self._gate.release()
            if batch is not None or self._closed:
                return batch
