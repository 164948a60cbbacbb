"""Admission: which requests there is room for, in rows and in bytes."""

import math

from reparam.service.engine.job import Job
from reparam.service.errors import QueueFull
from reparam.service.telemetry.metrics import Metrics


class Admission:
    """Bounds the rows that wait, and the bytes that bodies and responses reserve.

    The limits are the same for every request. A request that exceeds a limit alone is admitted when nothing else is
    there, or it could never run.

    max_queue_rows: rows that may wait.
    max_reserved_bytes: bytes that bodies and responses may reserve.
    reserved_bytes: bytes reserved now.
    incoming_bytes: the part of them that belongs to bodies which are still being read.
    seconds_per_row: measured time of a row, over all runners.
    """

    def __init__(self, max_queue_rows: int, max_reserved_bytes: int, metrics: Metrics) -> None:
        self.max_queue_rows = max_queue_rows
        self.max_reserved_bytes = max_reserved_bytes
        self.reserved_bytes = 0
        self.incoming_bytes = 0
        self.seconds_per_row = 0.0
        self._metrics = metrics

    def admit(self, job: Job, waiting: int, rows: int, size: int) -> None:
        """Reserve room for more rows and bytes of a job. The body of the job has been read.

        waiting: rows that wait now

        Raises: QueueFull
        """
        body = job.reserved_bytes
        self._reserve(job, waiting, rows, size)
        self.incoming_bytes -= body

    def admit_body(self, job: Job, waiting: int, size: int) -> None:
        """Reserve room for so many more bytes of a job's body.

        Bodies that are not whole yet may have half of all bytes, so that clients who never end leave room for others.

        Raises: QueueFull
        """
        limit = self.max_reserved_bytes // 2
        if self.incoming_bytes > job.reserved_bytes and self.incoming_bytes + size > limit:
            reason = f"the bodies that come hold {self.incoming_bytes} bytes and the limit is {limit}"
            raise self._full(waiting, "incoming", reason)
        self._reserve(job, waiting, 0, size)
        self.incoming_bytes += size

    def release(self, job: Job) -> None:
        """Release the room of a job that leaves."""
        self.reserved_bytes -= job.reserved_bytes
        if not job.has_started:
            self.incoming_bytes -= job.reserved_bytes

    def _reserve(self, job: Job, waiting: int, rows: int, size: int) -> None:
        if waiting and waiting + rows > self.max_queue_rows:
            raise self._full(waiting, "rows", f"{waiting} rows wait already and the limit is {self.max_queue_rows}")
        if self.reserved_bytes + size > self.max_reserved_bytes and self.reserved_bytes > job.reserved_bytes:
            raise self._full(
                waiting,
                "bytes",
                f"the requests being answered hold {self.reserved_bytes} bytes and the limit is "
                f"{self.max_reserved_bytes}",
            )
        job.reserved_bytes += size
        self.reserved_bytes += size

    def _full(self, waiting: int, reason: str, why: str) -> QueueFull:
        seconds = max(1, math.ceil(waiting * self.seconds_per_row))
        self._metrics.rejected.labels(reason).inc()
        return QueueFull(f"{why}: try again in {seconds} s", retry_after=seconds)
