"""Between a connection's protocol and its socket: writes are collected, and a client that reads nothing is given up."""

import asyncio
from collections.abc import Sized
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

ENOUGH = 2**16  # bytes that are written at once
STALLED = 120.0  # seconds in which a client reads nothing that waits for it, until the connection is aborted


class Cork:
    """A transport that collects the writes of one loop iteration into one system call.

    While `watch` is on, the connection is aborted if the client reads nothing for STALLED seconds.

    is_empty: no writes are collected now.
    socket: the transport below.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.socket = transport
        self.is_empty = True
        self.is_closing = transport.is_closing
        self._loop = loop
        self._collected: list[Any] = []
        self._size = 0
        self._unread = 0  # bytes that waited for the client at the last look
        self._watcher: asyncio.TimerHandle | None = None

    def write(self, data: Any) -> None:
        if self.is_empty:
            self.is_empty = False
            self._loop.call_soon(self.flush)
        self._collected.append(data)
        self._size += len(data)
        if self._size >= ENOUGH:
            self.flush()

    def close(self) -> None:
        """Close the connection when the client has read everything written."""
        self.flush()
        self.socket.close()
        if self._watcher is None:
            self.watch()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def flush(self) -> None:
        """Write what was collected."""
        if not self.is_empty:
            if not self.socket.is_closing():  # as after a reset by the client
                self.socket.writelines(self._collected)
            self._collected, self._size, self.is_empty = [], 0, True

    def watch(self) -> None:
        """Watch the client until it has read everything, or until `unwatch`."""
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
    """Stops reading from a client while its pipelined requests wait, and watches a client whose responses wait.

    uvicorn resumes reading after each response, so a client that never reads would fill the memory.
    """

    def __init__(self, cork: Cork, pipeline: Sized) -> None:
        super().__init__(cork)  # type: ignore[arg-type]  # Cork has all that uvicorn uses of a transport
        self._cork = cork
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            self.read_on()

    def read_on(self) -> None:
        """Resume reading although pipelined requests wait."""
        super().resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cork.watch()

    def resume_writing(self) -> None:
        if not self._cork.is_closing():  # a closing connection is watched to its end
            self._cork.unwatch()
        super().resume_writing()
