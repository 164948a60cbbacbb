"""HTTP as uvicorn speaks it, but answers leave in one piece.

uvicorn writes the head of an answer and then its body: two system calls, two packets, and a client that is woken twice,
which together take longer than all else that a sample needs. And of all Python that a sample runs a third looks at
headers, one by one; here they are joined at once.
"""

import asyncio
import time
from math import inf
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from reparam.service.engine.deadlines import PATIENCE
from reparam.service.errors import MalformedRequest, clipped
from reparam.service.http.headers import by_name, to_lines
from reparam.service.http.middleware import refusal
from reparam.service.wire.fast_path import Brief, ShortWay
from reparam.service.wire.response import Answer, whole_head
from reparam.service.wire.transport import Cork, Flow

# Bytes of heads, chunk sizes and trailers that are read in a row; one read takes up to half of them.
MOST_FRAMING = 2**19


class Protocol(HttpToolsProtocol):
    """Takes requests for the application's `short` way as soon as they are whole; all others go the way that uvicorn
    sends them, and so do those that are too large or too slow to wait for."""

    flow: Flow

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._short: ShortWay = self.app.short  # it is our Application
        self._answering: Any = None  # the cycle whose answer is made; uvicorn's `cycle` is the last that was read
        self._refusal: Exception | None = None  # why no further request is taken
        self._path = self._short.path.encode()
        self._waiting = False  # for the rest of a request that may go the short way
        self._body = b""
        self._patience: asyncio.TimerHandle | None = None
        self._idle_since = inf  # on the loop's clock; inf while it is not
        self._keep_alive: asyncio.TimerHandle | None = None
        self._in_head = False  # of a request that has begun
        self._framing_bytes = 0  # read since a request began, its head ended, or its body went on
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        self._cork = Cork(transport, self.loop)
        super().connection_made(self._cork)  # type: ignore[arg-type]  # all that uvicorn uses of one
        self.flow = Flow(self._cork, self.pipeline)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        self.cycle = self._answering  # the one that uvicorn tells; those behind it have not begun
        super().connection_lost(exc)
        self._cork.unwatch()
        for timer in (self._keep_alive, self._late):
            if timer is not None:
                timer.cancel()

    def eof_received(self) -> None:
        self.transport.close()  # the cork, which watches what is not taken yet

    def shutdown(self) -> None:
        self._go_on()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        try:
            self._feed(data)
        except Exception as error:  # the last resort: whatever it is, the client gets a problem document
            self._refuse(error)
            return
        self._framing_bytes += len(data)
        if self._framing_bytes > MOST_FRAMING:
            self._refuse(
                MalformedRequest(
                    f"a head, a trailer or the size of a chunk has at most {MOST_FRAMING} bytes: send less"
                )
            )
        elif self._in_head:
            if self._late is None:
                self._await_head()
        elif self._waiting and self._patience is None:
            if self._short.is_open(by_name(self.headers)):
                self._patience = self.loop.call_later(PATIENCE, self._go_on)
            else:
                self._go_on()

    def _feed(self, data: bytes) -> None:
        """An upgrade that is asked for is ignored (RFC 9110, 7.8). The parser would take what follows for another
        protocol, so a fresh one goes on from a head that asks for none.

        Raises MalformedRequest, and whatever else a callback raised."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stopped:
                data = self._head_without_upgrade() + data[stopped.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
            except httptools.HttpParserError as error:
                cause = error.__context__ or error  # what a callback raised, as for a URL that is none
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
        self._late = self.loop.call_later(self._short.sampling.settings.request_timeout, self._give_up)

    def _give_up(self) -> None:
        if self._is_answering():  # perhaps it is we who do not read on
            self._await_head()
        elif self._in_head:
            self._refuse(MalformedRequest("the head of the request did not end in time: send it at once"))
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    def _refuse(self, error: Exception) -> None:
        """Take no further request. Tell why, once those before are answered, and hang up."""
        self._refusal = error
        self._end_waiting()
        if self._late is not None:
            self._late.cancel()
        if self.pipeline and self.pipeline[0][0].more_body:  # the last of them is the one that is refused
            self.pipeline.popleft()
        self.flow.read_on()  # for nothing: what is not read when the connection ends, ends it before its answers arrive
        cycle = self._answering
        if not self._is_answering() or (cycle.more_body and not cycle.response_started):
            self._hang_up(error)
        elif cycle.more_body:  # it is this one that is refused
            self.transport.close()

    def _hang_up(self, error: Exception) -> None:
        request_id = self._short.edge.request_id({})
        status, headers, body = refusal(error, request_id)
        head = to_lines([*self.server_state.default_headers, *headers, (b"x-request-id", request_id)])
        self.transport.write(whole_head(status, head, keep_alive=False) + body)
        self._short.edge.account("-", "-", "other", status, time.perf_counter(), request_id)
        self.transport.close()

    def on_message_begin(self) -> None:
        self._idle_since = inf
        self._in_head, self._framing_bytes = True, 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # not of a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        parser = self.parser
        self._in_head, self._framing_bytes = False, 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if parser.should_upgrade():
            return
        self._body = b""
        self._waiting = (
            self.url == self._path
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and not self.expect_100_continue
            and not self._is_answering()
            and not self.flow.write_paused
        )
        if not self._waiting:
            self._take_the_long_way()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        if not self._waiting:
            super().on_body(body)
            return
        self._body += body
        if len(self._body) >= self._short.most:
            self._go_on()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self._waiting:
            brief = self._short.begin(by_name(self.headers), self._body, self.parser.should_keep_alive(), self._reply)
            if brief is not None:
                self._end_waiting()
                if not brief.response_complete:
                    self.cycle = self._answering = brief  # type: ignore[assignment]  # all that uvicorn uses of one
                return
            self._go_on()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn has it, but with one timer a connection instead of one an answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        if self._refusal is not None:
            self._hang_up(self._refusal)
            return
        self.flow.resume_reading()
        if not self._in_head:
            self._idle_since = self.loop.time()
        if self._keep_alive is None:
            self._keep_alive = self.loop.call_later(self.timeout_keep_alive, self._end_if_idle)

    def _end_if_idle(self) -> None:
        left = self.timeout_keep_alive - (self.loop.time() - self._idle_since)
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._keep_alive = self.loop.call_later(min(left, self.timeout_keep_alive), self._end_if_idle)

    def _end_waiting(self) -> None:
        self._waiting = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _go_on(self) -> None:
        """The long way, if the short one was still open."""
        if self._waiting:
            self._end_waiting()
            self._take_the_long_way()
            if self._body:
                super().on_body(self._body)

    def _take_the_long_way(self) -> None:
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        if not url.startswith(b"/") and httptools.parse_url(url).path is None:
            raise MalformedRequest(f"no path in {clipped(url.decode('latin-1'))!r}: add one, as in http://host/sample")
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers += headers  # the list that is in the scope
        super().on_headers_complete()

    def _reply(self, brief: Brief, status: int, head: bytes, body: bytes) -> None:
        if self.transport.is_closing():
            return
        head = to_lines(self.server_state.default_headers) + head
        self.transport.write(whole_head(status, head, brief.keep_alive) + body)
        if not self._short.sampling.engine.jobs:  # no other answer of this turn is still to be made
            self._cork.flush()
        if not brief.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cycle.send = Answer(cycle).send  # type: ignore[method-assign]  # of this one cycle
        super()._start_asgi_task(cycle, app)
