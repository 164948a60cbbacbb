"""The recorder: buffers observations on the request path, and counts and logs the observations a little later.

On the request path the recorder only appends to lists. So the code for Prometheus and log lines does not evict the
request path from the CPU caches.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Sequence

from reparam.service.telemetry.logs import AccessLog, RequestNote
from reparam.service.telemetry.metrics import BatchNote, Metrics

DELAY = 0.1  # seconds from the first note until all notes are counted and logged
MAX_NOTES = 256  # number of noted requests after which all notes are counted and logged without delay


class Recorder:
    """Notes requests, batches and encodings, for the metrics and the access log.

    in_flight: number of unfinished requests.
    request_ids: iterator of fresh ids, bytes, unique among all processes.
    encodings: media type and seconds of each encoded response. Callers append here.
    """

    def __init__(self, metrics: Metrics, access_log: AccessLog) -> None:
        self.in_flight = 0
        self.request_ids = map((secrets.token_hex(10).encode() + b"%012x").__mod__, itertools.count())
        self.encodings: list[tuple[str, float]] = []
        self._metrics = metrics
        self._access_log = access_log
        self._requests: list[RequestNote] = []
        self._batches: list[BatchNote] = []
        self._timer: asyncio.TimerHandle | None = None
        metrics.in_flight.set_function(lambda: self.in_flight)

    def begin(self) -> None:
        """Count a request as in flight, until `request` or `hand_over`."""
        self.in_flight += 1

    def hand_over(self) -> None:
        """Take back `begin`, because another part of the service begins the same request."""
        self.in_flight -= 1

    def request(self, method: str, path: str, route: str, status: int, request_id: bytes, started: float) -> None:
        """Note a finished request.

        path: path in the request.
        route: the path as declared by the application, or "other".
        started: start of the request, on time.perf_counter.
        """
        self.in_flight -= 1
        seconds = time.perf_counter() - started
        self._requests.append((time.time(), method, path, route, status, request_id, seconds))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELAY, self.flush)
        elif len(self._requests) == MAX_NOTES:
            asyncio.get_running_loop().call_soon(self.flush)  # not here, on the path of a request

    def batch(self, labels: tuple[str, str], rows: int, closed: str, seconds: float, waits: Sequence[float]) -> None:
        """Note a finished batch; arguments as in metrics.BatchNote."""
        self._batches.append(BatchNote(labels, rows, closed, seconds, waits))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELAY, self.flush)

    def flush(self) -> None:
        """Count and log all notes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        requests, self._requests = self._requests, []
        batches, self._batches = self._batches, []
        self._metrics.count_requests((route, status, seconds) for _, _, _, route, status, _, seconds in requests)
        self._metrics.count_batches(batches)
        for media_type, seconds in self.encodings:
            self._metrics.encode.labels(media_type).observe(seconds)
        self.encodings.clear()
        self._access_log.write(requests)
