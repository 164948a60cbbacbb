"""uvicorn's HTTP protocol, made faster and stricter.

Faster: uvicorn writes the head and the body of a response in two system calls and two packets, and wakes the client
twice. Here a response is written in one piece, and requests for operations take the fast path.

Stricter: heads are limited in size and time. Pipelined input, malformed or not, is handled after the response to the
request before.

A head is a request line and headers. The ASGI path is uvicorn's own way of serving a request. An operation's request
takes the ASGI path if the request is not complete in time, or too large for the fast path.
"""

import asyncio
import time
from math import inf
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from reparam.service.engine.deadlines import GRACE
from reparam.service.errors import MalformedRequest, clipped
from reparam.service.http.headers import Headers, by_name, to_lines
from reparam.service.http.middleware import problem_response
from reparam.service.lifespan import Lifespan
from reparam.service.wire.fast_path import FastHead, FastPath, FastRequest
from reparam.service.wire.response import CLOSE, ResponseWriter, whole_head
from reparam.service.wire.seen_head import SeenHead, seen_head
from reparam.service.wire.transport import Cork, Flow

# Limit on consecutive bytes of heads, chunk sizes and trailers. A single read brings up to half of the limit.
MAX_FRAMING = 2**19


class Protocol(HttpToolsProtocol):
    """One connection. Complete requests for operations take the fast path, all other requests the ASGI path.

    Methods without an underscore are callbacks of asyncio, httptools and uvicorn.
    """

    flow: Flow
    _default_lines: ClassVar[tuple[Headers, bytes]] = [], b""  # uvicorn's default headers, as a list and as lines

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lifespan: Lifespan = self.app.reparam  # the server only runs app.Application
        self._fast_paths = {path.encode(): fast for path, fast in self.app.fast_paths.items()}
        self._answering: Any = None  # the cycle being answered; uvicorn's `cycle` is the last cycle read
        self._refusal: Exception | None = None  # error that ends the connection; no further request is read
        self._fast: tuple[FastPath, FastHead] | None = None  # of the request being read, while the fast path is open
        self._body = b""  # body so far of the request in `_fast`
        self._grace: asyncio.TimerHandle | None = None  # sends a slow request to the ASGI path
        self._seen: SeenHead | None = None
        self._just_seen: tuple[FastPath, FastHead] | None = None  # of a fast request completed by the current read
        self._idle_since = inf  # on the loop's clock; inf while the connection is not idle
        self._keep_alive: asyncio.TimerHandle | None = None  # closes an idle connection
        self._in_message = self._in_head = False  # a request, or a request's head, has begun and not ended
        self._framing_bytes = 0  # bytes read since the last begin of a request, end of a head, or part of a body
        self._late_head: asyncio.TimerHandle | None = None  # ends the wait for a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own signature
        self._cork = Cork(transport, self.loop)
        super().connection_made(self._cork)  # type: ignore[arg-type]  # Cork has all that uvicorn uses of a transport
        self.flow = Flow(self._cork, self.pipeline)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._take_asgi_path()
        self.cycle = self._answering  # uvicorn notifies `cycle` of the disconnect; later cycles have not begun
        super().connection_lost(exc)
        self._cork.unwatch()
        for timer in (self._keep_alive, self._late_head):
            if timer is not None:
                timer.cancel()

    def eof_received(self) -> None:
        self.transport.close()  # Cork.close, which also limits the time for the rest of the response

    def shutdown(self) -> None:
        self._take_asgi_path()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        between_requests = not (self._in_message or self._is_answering())
        if between_requests:
            seen = self._seen
            if seen is not None and len(data) == seen.size and data.startswith(seen.data) and self._repeat(seen, data):
                return
            self._just_seen = None
        try:
            self._feed(data)
        except Exception as error:  # every error is answered with a problem document
            self._refuse(error)
            return
        if between_requests and self._just_seen is not None and not self._in_message:
            self._seen = seen_head(data, self._body, *self._just_seen) or self._seen
        self._framing_bytes += len(data)
        if self._framing_bytes > MAX_FRAMING:
            self._refuse(
                MalformedRequest(f"a head, a trailer or the size of a chunk has at most {MAX_FRAMING} bytes: send less")
            )
        elif self._in_head:
            if self._late_head is None:
                self._await_head()
        elif self._fast is not None and self._grace is None:
            self._grace = self.loop.call_later(GRACE, self._take_asgi_path)

    def _repeat(self, seen: SeenHead, data: bytes) -> bool:
        """Begin a fast request with the same head as the request before.

        seen: the head of the request before.
        data: bytes of the whole request.

        Returns: True if the fast path took the request.
        """
        if self.flow.write_paused:
            return False
        self._idle_since = inf
        if self._late_head is not None:
            self._late_head.cancel()
            self._late_head = None
        return self._begin_fast(seen.path, seen.head, data[len(seen.data) :], True)

    def _feed(self, data: bytes) -> None:
        """Parse the data.

        The server ignores the header Upgrade (RFC 9110, section 7.8). But the parser stops after a head with Upgrade,
        because another protocol could follow. So a new parser reads the same head without Upgrade, and then the
        remaining data.

        Raises: MalformedRequest, and any error of a callback.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stopped:
                data = self._head_without_upgrade() + data[stopped.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            except httptools.HttpParserError as error:
                cause = error.__context__ or error  # the context is the error of a callback, such as a bad URL
                if not isinstance(cause, (httptools.HttpParserError, UnicodeDecodeError)):
                    raise cause from None
                raise MalformedRequest(f"no HTTP request: {clipped(str(cause))}") from error
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise MalformedRequest("CONNECT is for proxies, and this is none")
        kept = [header for header in self.headers if header[0] != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, self.parser.get_http_version().encode(), to_lines(kept))

    def _await_head(self) -> None:
        self._late_head = self.loop.call_later(self._lifespan.settings.request_timeout, self._give_up)

    def _give_up(self) -> None:
        if self._is_answering():  # the head may be late because the service has paused reading
            self._await_head()
        elif self._in_head:
            self._refuse(MalformedRequest("the head of the request did not end in time: send it at once"))
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    def _refuse(self, error: Exception) -> None:
        """Read no further request. After earlier requests are answered, send the problem and close the connection."""
        self._refusal = error
        self._end_fast()
        if self._late_head is not None:
            self._late_head.cancel()
        if self.pipeline and self.pipeline[0][0].more_body:  # the refused request is the last in the pipeline
            self.pipeline.popleft()
        # Read and discard: closing a socket with unread input sends RST, which would destroy responses in flight.
        self.flow.read_on()
        cycle = self._answering
        if not self._is_answering() or (cycle.more_body and not cycle.response_started):
            self._send_refusal(error)
        elif cycle.more_body:  # the refused request has begun to be answered, so only a closed connection can tell
            self.transport.close()

    def _send_refusal(self, error: Exception) -> None:
        recorder = self._lifespan.recorder
        recorder.begin()
        request_id = next(recorder.request_ids)
        status, headers, body = problem_response(error, request_id)
        head = to_lines([*self.server_state.default_headers, *headers, (b"x-request-id", request_id)])
        self.transport.write(whole_head(status, head, keep_alive=False) + body)
        recorder.request("-", "-", "other", status, request_id, time.perf_counter())
        self.transport.close()

    def on_message_begin(self) -> None:
        self._idle_since = inf
        self._in_message = self._in_head = True
        self._framing_bytes = 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # otherwise the header is part of a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        parser = self.parser
        self._in_head, self._framing_bytes = False, 0
        if self._late_head is not None:
            self._late_head.cancel()
            self._late_head = None
        if parser.should_upgrade():
            return
        self._body = b""
        path = self._fast_paths.get(self.url)
        if (
            path is not None
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and not self.expect_100_continue
            and not self._is_answering()
            and not self.flow.write_paused
            and (head := path.read_head(by_name(self.headers))) is not None
        ):
            self._fast = path, head
        else:
            self._start_asgi_cycle()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        if self._fast is None:
            super().on_body(body)
            return
        self._body += body
        if len(self._body) > self._fast[0].max_body:
            self._take_asgi_path()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_message = False
        if self._fast is not None:
            path, head = self._fast
            if self._begin_fast(path, head, self._body, self.parser.should_keep_alive()):
                self._end_fast()
                if self.parser.should_keep_alive():
                    self._just_seen = path, head
                return
            self._take_asgi_path()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Continue with the next request, as uvicorn does, but with one timer per connection, not per response."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        if self._refusal is not None:
            self._send_refusal(self._refusal)
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if not self._in_head:
            self._idle_since = self.loop.time()
        if self._keep_alive is None:
            self._keep_alive = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _close_if_idle(self) -> None:
        left = self.timeout_keep_alive - (self.loop.time() - self._idle_since)
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._keep_alive = self.loop.call_later(min(left, self.timeout_keep_alive), self._close_if_idle)

    def _begin_fast(self, path: FastPath, head: FastHead, body: bytes, keep_alive: bool) -> bool:
        """Hand a complete request to the fast path.

        Returns: True if the fast path took the request.
        """
        request = path.begin(head, body, keep_alive, self._reply)
        if request is None:
            return False
        if not request.response_complete:
            self.cycle = self._answering = request  # type: ignore[assignment]  # has every attribute uvicorn uses
        return True

    def _end_fast(self) -> None:
        self._fast = None
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _take_asgi_path(self) -> None:
        """Send the request being read to the ASGI path, if the fast path was still open."""
        if self._fast is not None:
            self._end_fast()
            self._start_asgi_cycle()
            if self._body:
                super().on_body(self._body)

    def _start_asgi_cycle(self) -> None:
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        if not url.startswith(b"/") and httptools.parse_url(url).path is None:
            raise MalformedRequest(f"no path in {clipped(url.decode('latin-1'))!r}: add one, as in http://host/sample")
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers += headers  # in place, because the scope holds this list
        super().on_headers_complete()

    def _reply(self, request: FastRequest, status: int, head: bytes, body: bytes) -> None:
        cork = self._cork
        if cork.is_closing():
            return
        connection = b"" if request.keep_alive else CLOSE
        headers, defaults = Protocol._default_lines
        if headers is not self.server_state.default_headers:  # uvicorn replaces the list every second
            headers = self.server_state.default_headers
            defaults = to_lines(headers)
            Protocol._default_lines = headers, defaults
        response = b"%b%b%b%b\r\n%b" % (STATUS_LINE[status], defaults, head, connection, body)
        if cork.is_empty:  # uvloop itself collects the writes of one loop iteration
            cork.socket.write(response)
        else:
            cork.write(response)
        if not request.keep_alive:
            cork.close()
        self.on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cycle.send = ResponseWriter(cycle).send  # type: ignore[method-assign]  # for this cycle alone
        super()._start_asgi_task(cycle, app)
