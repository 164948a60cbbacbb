"""Admission: limits on queued rows and on reserved bytes."""

import math

from reparam.service.engine.job import Job
from reparam.service.errors import QueueFull
from reparam.service.telemetry.metrics import Metrics


class Admission:
    """Limits the queued rows, and the bytes reserved by bodies and responses.

    The limits are the same for every request. A request that exceeds a limit alone is admitted when nothing else is
    queued or reserved, or the request could never run.

    max_queue_rows: limit on queued rows.
    max_reserved_bytes: limit on the bytes of bodies and responses.
    metrics: counts refused requests.
    reserved_bytes: bytes reserved now.
    incoming_bytes: the part of `reserved_bytes` for bodies not yet read to their end.
    seconds_per_row: moving average of a row's time in seconds, divided by the number of runners.
    """

    def __init__(self, max_queue_rows: int, max_reserved_bytes: int, metrics: Metrics) -> None:
        self.max_queue_rows = max_queue_rows
        self.max_reserved_bytes = max_reserved_bytes
        self.reserved_bytes = 0
        self.incoming_bytes = 0
        self.seconds_per_row = 0.0
        self._metrics = metrics

    def admit(self, job: Job, waiting: int, rows: int, size: int) -> None:
        """Check both limits for a job whose body has been read, and reserve bytes. Rows are only checked.

        waiting: number of rows in the queue now.
        rows: number of the job's rows that the caller will queue now.
        size: bytes to reserve: the largest part of the response in memory at a time, and the body unless `admit_body`
            has reserved the body.

        Raises: QueueFull; then nothing is reserved.
        """
        body = job.reserved_bytes
        self._reserve(job, waiting, rows, size)
        self.incoming_bytes -= body

    def admit_body(self, job: Job, waiting: int, size: int) -> None:
        """Reserve bytes for a further part of a job's body.

        Incomplete bodies may reserve half of all bytes. So clients who never complete their bodies leave room for other
        requests.

        waiting: number of rows in the queue now, for the estimate of Retry-After.
        size: bytes of the part.

        Raises: QueueFull; then nothing is reserved.
        """
        limit = self.max_reserved_bytes // 2
        if self.incoming_bytes > job.reserved_bytes and self.incoming_bytes + size > limit:
            reason = f"the bodies that come hold {self.incoming_bytes} bytes and the limit is {limit}"
            raise self._full(waiting, "incoming", reason)
        self._reserve(job, waiting, 0, size)
        self.incoming_bytes += size

    def release(self, job: Job) -> None:
        """Release all bytes of a job that leaves the engine."""
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
