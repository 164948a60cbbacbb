"""A replacement for the `send` of uvicorn's request cycle.

The head is written together with the first part of the body. So Cork, the transport of the connection, joins both into
one system call.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from reparam.service.http.headers import Headers, to_lines

BODILESS = (204, 304)
CHUNKED = (b"transfer-encoding", b"chunked")
CLOSE = b"connection: close\r\n"


def whole_head(status: int, headers: bytes, keep_alive: bool) -> bytes:
    """Make the head of a response: a status line, the headers, and the empty line at the end of the head.

    status: HTTP status.
    headers: headers as lines.
    keep_alive: the connection stays open; otherwise `Connection: close` is added.
    """
    return b"%b%b%b\r\n" % (STATUS_LINE[status], headers, b"" if keep_alive else CLOSE)


class ResponseWriter:
    """The `send` of one request. Updates the state of uvicorn's cycle like uvicorn's own `send`.

    cycle: the request in uvicorn.
    """

    __slots__ = ("_cycle", "_head", "_left")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._head = b""
        self._left: int | None = None  # remaining bytes of the body; None for a chunked body

    async def send(self, message: Any) -> None:
        """Send an ASGI message.

        message: `http.response.start` or `http.response.body`.

        Raises: ValueError for a header with a line break, or a body whose length differs from Content-Length.
        """
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], list(message.get("headers", ())))
        else:
            self._continue(message.get("body", b""), message.get("more_body", False))

    def _start(self, status: int, given: Headers) -> None:
        cycle = self._cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        headers = cycle.default_headers + given
        length = dict(given).get(b"content-length")
        if length is not None:
            self._left = int(length)
        elif status in BODILESS or cycle.scope["method"] == "HEAD":
            self._left = 0
        else:
            headers.append(CHUNKED)
        self._head = whole_head(status, to_lines(headers), cycle.keep_alive)

    def _continue(self, body: Any, more: bool) -> None:
        cycle, head = self._cycle, self._head
        if head:
            self._head = b""
            cycle.transport.write(head)
        if self._left is None:
            if body:
                cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
            if not more:
                cycle.transport.write(b"0\r\n\r\n")
        elif cycle.scope["method"] != "HEAD":
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise ValueError(f"{abs(self._left)} bytes too {'few' if self._left > 0 else 'many'} in a body")
            if body:
                cycle.transport.write(body)
        if not more:
            cycle.response_complete = True
            cycle.message_event.set()
            if not cycle.keep_alive:
                cycle.transport.close()
            del cycle.send  # breaks a reference cycle
            cycle.on_response()
