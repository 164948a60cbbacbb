"""The queue: the scheduler, shared by the event loop and the threads of the runners."""

import threading

from reparam.service.engine.scheduler import Batch, Owner, Scheduler, Ticket


class Queue(Scheduler[Owner]):
    """A scheduler for several threads. Runners wait at a gate, which the event loop opens when a batch may start.

    free: runners that wait at the gate.
    is_shut: tells whether runners wait although rows may wait; `open` lets them go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.free = 0
        self._closed = False
        self._lock = threading.Lock()  # held to use the scheduler, the gate and `free`
        self._gate = threading.Lock()  # unlocked while there may be work for a runner; a runner locks it to pass
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
        """Make batches of the graph smaller than `rows`. Returns the limit before."""
        with self._lock:
            before = self.limits[graph]
            super().set_limit(graph, max(1, min(before, rows // 2)))
            return before

    def open(self) -> None:
        """Let a runner take a batch. If rows remain, the runner lets the next one."""
        with self._lock:
            if self._gate.locked():
                self._gate.release()

    def close(self) -> None:
        """End all runners once no rows wait."""
        self._closed = True
        self.open()

    def wait(self) -> Batch[Owner] | None:
        """Block until there is a batch; for the thread of a runner. Returns None if the runner must end.

        If work remains after taking a batch, the gate stays open for the next runner.
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
