"""HTTP as uvicorn speaks it, but answers leave in one piece.

uvicorn writes the head of an answer and then its body: two system calls, two packets, and a client that is woken twice,
which together take longer than all else that a sample needs. And of all Python that a sample runs a third looks at
headers, one by one; here they are joined at once.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

ENOUGH = 2**16  # bytes that are written at once
BODILESS = (204, 304)
LINE = b"%b: %b\r\n".__mod__
CHUNKED, CLOSE = (b"transfer-encoding", b"chunked"), (b"connection", b"close")


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(Cork(transport, self.loop))  # type: ignore[arg-type]  # all that uvicorn uses of one

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.send = Answer(cycle).send  # type: ignore[method-assign]  # of this one cycle
        super()._start_asgi_task(cycle, app)


class Answer:
    """The `send` of one request, which keeps the state of uvicorn's cycle as uvicorn would."""

    __slots__ = ("_cycle", "_head", "_left")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._head = b""
        self._left: int | None = None  # bytes of the body to come; None if it is sent in chunks

    async def send(self, message: Any) -> None:
        """As ASGI has it. Raises ValueError for a header that would begin another line, or a body of another length."""
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], list(message.get("headers", ())))
        else:
            self._continue(message.get("body", b""), message.get("more_body", False))

    def _start(self, status: int, given: list[tuple[bytes, bytes]]) -> None:
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
        if not cycle.keep_alive:
            headers.append(CLOSE)
        lines = b"".join(map(LINE, headers))
        if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers):
            raise ValueError(f"a header holds a line break: {given}")
        self._head = b"%b%b\r\n" % (STATUS_LINE[status], lines)

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
            cycle.on_response()


class Cork:
    """A transport that writes together what it was given in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[Any] = []
        self._size = 0
        self.is_closing = transport.is_closing

    def write(self, data: Any) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= ENOUGH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._waiting:
            self._transport.writelines(self._waiting)
            self._waiting, self._size = [], 0
