"""The fast path of operations: for a request that came in one piece, and whose response will leave in one.

Most requests do. Callbacks of the event loop answer them: rows are submitted when the body is there, and the response
is written when the rows are there. A task, a coroutine and ASGI messages would take longer than everything else. All
steps are those of Endpoint, so responses are the same on both paths. The time of a request begins when its body is
whole, at most GRACE after its head.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from reparam.service.engine.job import Job
from reparam.service.errors import ClientLeft, Problem
from reparam.service.http.encoders import encode
from reparam.service.http.endpoint import LARGE_BODY, Endpoint, Head
from reparam.service.http.headers import HeaderMap, to_lines
from reparam.service.http.middleware import CLIENT_CLOSED, check_key, client_request_id, problem_response
from reparam.service.telemetry.recorder import Recorder

log = logging.getLogger(__name__)

Reply = Callable[["FastRequest", int, bytes, bytes], None]


class FastHead(NamedTuple):
    """The checked head of a request that may take the fast path.

    request_id: the client's; None for a fresh one.
    """

    head: Head
    request_id: bytes | None


class FastPath:
    """The fast path of one operation, where uvicorn's protocol hands requests in.

    max_body: bytes; requests with larger bodies take the ASGI path.
    """

    def __init__(self, endpoint: Endpoint, recorder: Recorder, api_key: str | None) -> None:
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.lifespan = endpoint.lifespan
        self.recorder = recorder
        self.path = endpoint.operation.path
        self.max_body = min(LARGE_BODY - 1, endpoint.settings.max_body_bytes)
        self._api_key = api_key

    def read_head(self, headers: HeaderMap) -> FastHead | None:
        """Check the headers. Returns None if the request must take the ASGI path, which also refuses.

        The result depends on the headers alone, so that a connection can keep the result for equal heads.
        """
        try:
            check_key(self._api_key, self.path, headers)
            head = self.endpoint.read_head(headers)
        except Problem:
            return None
        if head.content_length > self.max_body:
            return None
        return FastHead(head, client_request_id(headers))

    def begin(self, fast_head: FastHead, body: bytes, keep_alive: bool, reply: Reply) -> "FastRequest | None":
        """Take the request, or return None if it must take the ASGI path.

        reply: called once with status, headers as lines, and body, perhaps before this returns; not called if the
            client has disconnected
        """
        head, request_id = fast_head
        request = FastRequest(self, head.timeout, request_id or next(self.recorder.request_ids), keep_alive, reply)
        try:
            if not self.lifespan.is_loaded:
                self.lifespan.check_ready()
            plan = self.endpoint.plan(head, self.endpoint.read(body))
            if not plan.is_small:
                self.recorder.in_flight -= 1
                return None
            request.media_type = plan.media_type
            self.engine.join(request)
            self.engine.submit(request, plan.work, len(body) + plan.size, plan.first)
        except Exception as error:  # every error is answered with a problem document
            request.refuse(error)
        return request


class FastRequest(Job):
    """A request on the fast path.

    The request stands in for uvicorn's RequestResponseCycle, hence disconnected, response_complete, more_body,
    keep_alive and message_event.
    """

    media_type = ""
    disconnected = response_complete = more_body = False

    def __init__(self, path: FastPath, timeout: float, request_id: bytes, keep_alive: bool, reply: Reply) -> None:
        super().__init__(timeout)
        self.keep_alive = keep_alive
        self._started = time.perf_counter()
        self._path = path
        self._request_id = request_id
        self._reply = reply
        path.recorder.in_flight += 1

    @property
    def message_event(self) -> "FastRequest":
        """The event that uvicorn sets when the client has disconnected."""
        return self

    def set(self) -> None:
        if self.disconnected:
            self._path.engine.fail(self, ClientLeft())

    def on_wait(self) -> None:
        """Do nothing: the protocol notices a disconnect."""

    def on_change(self) -> None:
        if self.error is not None:
            self.refuse(self.error)
        elif not self.rows_left:
            endpoint = self._path.endpoint
            try:
                body, seconds = encode(self.work, self.media_type, self.done)
                head = endpoint.header_block(self, self.media_type, len(body), seconds)
            except Exception as error:  # every error is answered with a problem document
                self.refuse(error)
            else:
                self._finish(200, head, body)

    def refuse(self, error: Exception) -> None:
        """Answer with the problem of the error."""
        if isinstance(error, ClientLeft):
            self._path.endpoint.count_disconnect(self)
            self._finish(CLIENT_CLOSED, b"", b"")
        else:
            status, headers, body = problem_response(error, self._request_id)
            self._finish(status, to_lines(headers), body)

    def _finish(self, status: int, head: bytes, body: bytes) -> None:
        path, request_id = self._path, self._request_id
        path.engine.leave(self)
        self.response_complete = True
        try:
            self._reply(self, status, b"%bx-request-id: %b\r\n" % (head, request_id), body)
        except Exception:  # other requests of the same batch must not suffer
            log.exception("not written", extra={"request_id": request_id.decode()})
        path.recorder.request("POST", path.path, path.path, status, request_id, self._started)
