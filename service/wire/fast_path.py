"""The fast path of operations, for small requests whose response is sent in one piece.

Most requests take the fast path. Event loop callbacks submit the rows when the body is complete, and later write the
response. A task, a coroutine and ASGI messages would take longer than all other steps of a request. The steps are
methods of Endpoint, so both paths give the same responses. The timeout counts from the complete body. A request whose
body is still incomplete after GRACE seconds (engine/deadlines.py) takes the ASGI path.
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

Reply = Callable[["FastRequest", int, bytes, bytes], None]  # request, status, headers as lines, body


class FastHead(NamedTuple):
    """The checked head of a request for the fast path.

    head: the checked headers.
    request_id: request id of the client; None if the client sent no valid id.
    """

    head: Head
    request_id: bytes | None


class FastPath:
    """The fast path of one operation, called by the connection's Protocol.

    path: path of the operation.
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
        """Check the headers. The result depends on the headers alone, so a connection can reuse it for equal headers.

        Returns: the checked head; None if the request must take the ASGI path. The ASGI path also answers bad headers.
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
        """Begin a complete request.

        body: the whole body.
        keep_alive: the connection stays open after the response.
        reply: called once with request, status, headers as lines, and body, perhaps before `begin` returns. After a
            disconnect, the status is CLIENT_CLOSED and headers and body are not for sending.

        Returns: the request; None if the request must take the ASGI path.
        """
        head, request_id = fast_head
        request = FastRequest(self, head.timeout, request_id or next(self.recorder.request_ids), keep_alive, reply)
        try:
            if not self.lifespan.is_loaded:
                self.lifespan.check_ready()
            plan = self.endpoint.plan(head, self.endpoint.read(body))
            if not plan.is_small:
                self.recorder.hand_over()
                return None
            request.media_type = plan.media_type
            self.engine.join(request)
            self.engine.submit(request, plan.work, len(body) + plan.size, plan.first)
        except Exception as error:  # every error is answered with a problem document
            request.refuse(error)
        return request


class FastRequest(Job):
    """A request on the fast path.

    The request stands in for uvicorn's RequestResponseCycle, hence the attributes disconnected, response_complete,
    more_body, keep_alive and message_event.
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
        path.recorder.begin()

    @property
    def message_event(self) -> "FastRequest":
        """The event that uvicorn sets after a disconnect: this object, with the method `set`."""
        return self

    def set(self) -> None:
        """Fail the job after a disconnect."""
        if self.disconnected:
            self._path.engine.fail(self, ClientLeft())

    def on_wait(self) -> None:
        """Do nothing. Other jobs begin to watch for a disconnect here. The protocol calls `set` after a disconnect."""

    def on_change(self) -> None:
        """Send the response once all rows are computed, or the problem document of the error."""
        if self.error is not None:
            self.refuse(self.error)
        elif not self.rows_left:
            endpoint = self._path.endpoint
            try:
                body, seconds = encode(self.work, self.media_type, self.results)
                head = endpoint.header_block(self, self.media_type, len(body), seconds)
            except Exception as error:  # every error is answered with a problem document
                self.refuse(error)
            else:
                self._finish(200, head, body)

    def refuse(self, error: Exception) -> None:
        """Answer with the problem document of the error. After a disconnect, only count the disconnect."""
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
        except Exception:  # must not break other requests of the same batch
            log.exception("not written", extra={"request_id": request_id.decode()})
        path.recorder.request("POST", path.path, path.path, status, request_id, self._started)
