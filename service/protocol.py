"""HTTP as uvicorn speaks it, but answers leave in one piece.

uvicorn writes the head of an answer and then its body: two system calls, two packets, and a client that is woken twice,
which together take longer than all else that a sample needs.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

ENOUGH = 2**16  # bytes that are written at once


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(Cork(transport, self.loop))  # type: ignore[arg-type]  # all that uvicorn uses of one


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
