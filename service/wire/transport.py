"""Between a connection's protocol and its socket: writes together, reads no further while answers wait, and gives up a
client that takes nothing."""

import asyncio
from collections.abc import Sized
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

ENOUGH = 2**16  # bytes that are written at once
STALLED = 120.0  # seconds in which a client takes nothing of what waits for it, until it counts as gone


class Cork:
    """A transport that writes together what it was given in one turn of the event loop, and that while it is watched
    hangs up on a client that takes nothing of what waits for it for long."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[Any] = []
        self._size = 0
        self._left = 0  # bytes that waited for the client when it was last looked at
        self._look: asyncio.TimerHandle | None = None
        self.is_closing = transport.is_closing

    def write(self, data: Any) -> None:
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= ENOUGH:
            self.flush()

    def close(self) -> None:
        """When the client has what was written."""
        self.flush()
        self._transport.close()
        if self._look is None:
            self.watch()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def flush(self) -> None:
        if self._waiting:
            if not self._transport.is_closing():  # as it is after a reset by the client
                self._transport.writelines(self._waiting)
            self._waiting, self._size = [], 0

    def watch(self) -> None:
        """Until all is taken or `unwatch`."""
        self._left = self._transport.get_write_buffer_size()
        self._look = self._loop.call_later(STALLED, self._look_after) if self._left else None

    def unwatch(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _look_after(self) -> None:
        if self._transport.get_write_buffer_size() < self._left:
            self.watch()
        else:
            self._transport.abort()


class Flow(FlowControl):
    """Reads no further from a client while pipelined requests of its wait for their turn: uvicorn reads on with each
    answer, and a client that never listens would fill the memory. One whose answers wait is watched."""

    def __init__(self, cork: Cork, pipeline: Sized) -> None:
        super().__init__(cork)  # type: ignore[arg-type]  # all that uvicorn uses of a transport
        self._cork = cork
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            self.read_on()

    def read_on(self) -> None:
        super().resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cork.watch()

    def resume_writing(self) -> None:
        if not self._cork.is_closing():  # else it is watched to its end
            self._cork.unwatch()
        super().resume_writing()
