"""The recorder: notes what happened as it happens, and counts and logs it a little later.

So the request path appends to lists, and the code of Prometheus and of log lines stays out of its CPU caches.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

from reparam.service.telemetry.logs import AccessLog
from reparam.service.telemetry.metrics import Metrics

DELAY = 0.1  # seconds from the first note until all are counted and logged
MAX_NOTES = 256  # requests that are counted and logged at a time


class RequestNote(NamedTuple):
    """A request that has ended. ended: seconds since the epoch. seconds: from its start to the end of its response."""

    ended: float
    method: str
    path: str
    route: str
    status: int
    request_id: bytes
    seconds: float


class BatchNote(NamedTuple):
    """A batch that has run. labels: model and version. seconds: of the run. waits: seconds that its pieces waited."""

    labels: tuple[str, str]
    rows: int
    closed: str
    seconds: float
    waits: Sequence[float]


class Recorder:
    """Notes requests, batches and encodings, for the metrics and the access log.

    in_flight: requests that have begun and not ended; who begins one adds it here.
    request_ids: fresh ids, unlike those of any other process.
    encodings: media type and seconds of each response that was encoded; append here.
    """

    def __init__(self, metrics: Metrics, access_log: AccessLog) -> None:
        self.in_flight = 0
        self.request_ids = map((secrets.token_hex(10).encode() + b"%012x").__mod__, itertools.count())
        self.encodings: list[tuple[str, float]] = []
        self._metrics = metrics
        self._access_log = access_log
        self._requests: list[tuple[float, str, str, str, int, bytes, float]] = []  # fields of RequestNote
        self._batches: list[BatchNote] = []
        self._timer: asyncio.TimerHandle | None = None
        metrics.in_flight.set_function(lambda: self.in_flight)

    def request(self, method: str, path: str, route: str, status: int, request_id: bytes, started: float) -> None:
        """Note a request that has ended.

        route: the path as the application declares it
        started: on time.perf_counter
        """
        self.in_flight -= 1
        seconds = time.perf_counter() - started
        self._requests.append((time.time(), method, path, route, status, request_id, seconds))
        if self._timer is None or len(self._requests) >= MAX_NOTES:
            self._flush_soon()

    def batch(self, labels: tuple[str, str], rows: int, closed: str, seconds: float, waits: Sequence[float]) -> None:
        """Note a batch that has run. The arguments are those of BatchNote."""
        self._batches.append(BatchNote(labels, rows, closed, seconds, waits))
        if self._timer is None:
            self._flush_soon()

    def flush(self) -> None:
        """Count and log all notes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        requests = [RequestNote._make(fields) for fields in self._requests]
        self._requests.clear()
        batches, self._batches = self._batches, []
        self._metrics.count_requests([(note.route, note.status, note.seconds) for note in requests])
        self._metrics.count_batches(batches)
        for media_type, seconds in self.encodings:
            self._metrics.encode.labels(media_type).observe(seconds)
        self.encodings.clear()
        self._access_log.write(requests)

    def _flush_soon(self) -> None:
        """Flush at once where there are many notes, otherwise after DELAY."""
        if len(self._requests) >= MAX_NOTES:
            self.flush()
        else:
            self._timer = asyncio.get_running_loop().call_later(DELAY, self.flush)
