"""The short way of `POST /sample`: for a request that came in one piece, and whose answer will leave in one.

Most do. Here the event loop's callbacks answer them: when the body is there the rows are submitted, when the rows are
there the answer is written. There is no task, no coroutine and no ASGI message, which would take longer than all else.
What is checked, computed and sent is the same as on the long way, and by the same functions. Its time begins when the
body is whole, a tenth of a second after the head at the latest.
"""

import logging
import time
from collections.abc import Callable

from reparam.service.engine.job import Job
from reparam.service.errors import ClientLeft, Unauthorized
from reparam.service.http.endpoint import LARGE_BODY, Sampling, announced, encoded
from reparam.service.http.headers import HeaderMap, to_lines
from reparam.service.http.middleware import CLIENT_CLOSED, Edge, refusal

log = logging.getLogger(__name__)

Reply = Callable[["Brief", int, bytes, bytes], None]


class ShortWay:
    """Where uvicorn's protocol hands requests in."""

    def __init__(self, path: str, edge: Edge, sampling: Sampling) -> None:
        self.path = path
        self.edge = edge
        self.sampling = sampling
        # Bytes of a body from which on it takes the long way.
        self.most = min(LARGE_BODY, sampling.settings.max_body_bytes + 1)

    def is_open(self, given: HeaderMap) -> bool:
        """From the head of a request: its body is worth waiting for."""
        try:
            self.edge.authorize(self.path, given)
        except Unauthorized:
            return False
        return announced(given) < self.most

    def begin(self, given: HeaderMap, body: bytes, keep_alive: bool, reply: Reply) -> "Brief | None":
        """Take the request, or return None if the long way is the one for it.

        reply: called once with status, the lines of the head, and body, perhaps before this returns; not called if the
            client has left.
        """
        brief = Brief(self, self.edge.request_id(given), keep_alive, reply)
        try:
            self.edge.authorize(self.path, given)
            brief.timeout = self.sampling.check_head(given)
            rows = self.sampling.read(body)
            brief.media_type = self.sampling.negotiate(given, rows)
            size = self.sampling.size_if_small(rows, brief.media_type)
            if size is None:
                self.edge.metrics.in_flight -= 1
                return None
            self.sampling.engine.join(brief)
            self.sampling.engine.submit(brief, rows, len(body) + size, rows.n)
        except Exception as error:  # the last resort: whatever it is, the client gets a problem document
            brief.refuse(error)
        return brief


class Brief(Job):
    """A request on the short way. To uvicorn, it is the cycle that the connection is in."""

    media_type = ""
    disconnected = response_complete = more_body = False

    def __init__(self, way: ShortWay, request_id: bytes, keep_alive: bool, reply: Reply) -> None:
        super().__init__(way.sampling.engine, 0.0)
        self._started = time.perf_counter()
        self._way = way
        self._request_id = request_id
        self._reply = reply
        self.keep_alive = keep_alive
        way.edge.metrics.in_flight += 1

    @property
    def message_event(self) -> "Brief":
        """What uvicorn sets when the client has left."""
        return self

    def set(self) -> None:
        if self.disconnected:
            self.fail(ClientLeft())

    def news(self) -> None:
        if self.error is not None:
            self.refuse(self.error)
        elif not self.left:
            try:
                body, seconds = encoded(self.request, self.media_type, self.done)
                head = self._way.sampling.head(self, self.media_type, len(body), seconds)
            except Exception as error:  # here too
                self.refuse(error)
            else:
                self._finish(200, head, body)

    def refuse(self, error: Exception) -> None:
        if isinstance(error, ClientLeft):
            self._way.sampling.count_departure(self)
            self._finish(CLIENT_CLOSED, b"", b"")
        else:
            status, headers, body = refusal(error, self._request_id)
            self._finish(status, to_lines(headers), body)

    def _finish(self, status: int, head: bytes, body: bytes) -> None:
        self.close()
        self.response_complete = True
        try:
            self._reply(self, status, b"%bx-request-id: %b\r\n" % (head, self._request_id), body)
        except Exception:  # others in the same batch must not suffer
            log.exception("not written", extra={"request_id": self._request_id.decode()})
        self._way.edge.metrics.in_flight -= 1
        path = self._way.path
        self._way.edge.account("POST", path, path, status, self._started, self._request_id)
