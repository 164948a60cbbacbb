"""Between a connection's protocol and socket: collected writes, and a time limit for clients that do not read."""

import asyncio
from collections.abc import Sized
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

ENOUGH = 2**16  # bytes; collected writes of this size are passed on at once
STALLED = 120.0  # seconds without a read by the client until the connection is aborted


class Cork:
    """A transport that collects the writes of one loop iteration into one system call.

    While `watch` is on, the connection is aborted if the client reads nothing for STALLED seconds.

    is_empty: no collected write is pending.
    socket: transport of the connection. Attributes not defined here are those of this transport.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.socket = transport
        self.is_empty = True
        self.is_closing = transport.is_closing
        self._loop = loop
        self._collected: list[Any] = []
        self._size = 0
        self._unread = 0  # bytes not yet read by the client at the last check
        self._watcher: asyncio.TimerHandle | None = None

    def write(self, data: Any) -> None:
        """Collect bytes, to be written at the end of this loop iteration."""
        if self.is_empty:
            self.is_empty = False
            self._loop.call_soon(self.flush)
        self._collected.append(data)
        self._size += len(data)
        if self._size >= ENOUGH:
            self.flush()

    def close(self) -> None:
        """Close the connection after the client has read all bytes written."""
        self.flush()
        self.socket.close()
        if self._watcher is None:
            self.watch()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def flush(self) -> None:
        """Write the collected bytes."""
        if not self.is_empty:
            if not self.socket.is_closing():  # closing, for example, after a reset by the client
                self.socket.writelines(self._collected)
            self._collected, self._size, self.is_empty = [], 0, True

    def watch(self) -> None:
        """Abort the connection if the client reads nothing for STALLED seconds. Ends when all bytes are read."""
        self._unread = self.socket.get_write_buffer_size()
        self._watcher = self._loop.call_later(STALLED, self._look) if self._unread else None

    def unwatch(self) -> None:
        """Stop watching the client."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def _look(self) -> None:
        if self.socket.get_write_buffer_size() < self._unread:
            self.watch()
        else:
            self.socket.abort()


class Flow(FlowControl):
    """Stops reading while pipelined requests wait, and watches the client while a response is unread.

    uvicorn resumes reading after each response, so a client that sends requests and never reads would fill the memory.

    cork: transport of the connection.
    pipeline: requests received and not yet begun.
    """

    def __init__(self, cork: Cork, pipeline: Sized) -> None:
        super().__init__(cork)  # type: ignore[arg-type]  # Cork has all that uvicorn uses of a transport
        self._cork = cork
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        """Resume reading unless pipelined requests wait."""
        if not self._pipeline:
            self.read_on()

    def read_on(self) -> None:
        """Resume reading even while pipelined requests wait."""
        super().resume_reading()

    def pause_writing(self) -> None:
        """Pause writing, and watch the client."""
        super().pause_writing()
        self._cork.watch()

    def resume_writing(self) -> None:
        """Resume writing, and stop watching the client unless the connection is closing."""
        if not self._cork.is_closing():
            self._cork.unwatch()
        super().resume_writing()
