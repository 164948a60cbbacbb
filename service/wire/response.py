"""The `send` of uvicorn's request cycle, which writes head and body in one piece where it can."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from reparam.service.http.headers import Headers, to_lines

BODILESS = (204, 304)
CHUNKED = (b"transfer-encoding", b"chunked")
CLOSE = b"connection: close\r\n"


def whole_head(status: int, headers: bytes, keep_alive: bool) -> bytes:
    """Write a status line, headers as lines, and the empty line after them."""
    return b"%b%b%b\r\n" % (STATUS_LINE[status], headers, b"" if keep_alive else CLOSE)


class ResponseWriter:
    """The `send` of one request. It keeps the state of uvicorn's cycle as uvicorn's own `send` would."""

    __slots__ = ("_cycle", "_head", "_left")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._head = b""
        self._left: int | None = None  # bytes of the body to come; None for a chunked body

    async def send(self, message: Any) -> None:
        """Send an ASGI message.

        Raises: ValueError for a header that holds a line break, or a body of another length than its head says
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
            del cycle.send  # a reference back to the cycle
            cycle.on_response()
