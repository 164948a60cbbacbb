"""One process that serves: uvicorn, and the way out."""

import asyncio
import logging
import os
import socket
from multiprocessing import parent_process
from types import FrameType

import uvicorn
from fastapi import FastAPI

from reparam.service.app import create_app
from reparam.service.lifespan import Service
from reparam.service.settings import Settings
from reparam.service.telemetry.reports import Siblings
from reparam.service.wire.protocol import Protocol

log = logging.getLogger(__name__)


def serve(settings: Settings, listener: socket.socket, siblings: Siblings | None = None) -> None:
    """Serve at the listener until a signal ends it. Raises DeviceError."""
    server = Server(create_app(settings, siblings), settings)
    server.run([listener])
    server.service.access_log.flush()
    if server.service.engine.busy:
        # A run cannot be interrupted, nor the interpreter taken down around it.
        logging.shutdown()
        os._exit(0)


class Server(uvicorn.Server):
    """uvicorn, with a way out in three steps: not ready, port closed, queue refused."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                interface="asgi3",
                log_config=None,
                proxy_headers=False,
                access_log=False,  # the application logs each request itself
                server_header=False,
                timeout_graceful_shutdown=settings.drain_timeout + 1,  # the last resort
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        parent = parent_process()
        if parent is not None:
            asyncio.get_running_loop().add_reader(parent.sentinel, self._orphaned, parent.sentinel)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # then uvicorn leaves the application's end out, whose task dies with a traceback
            await self.lifespan.shutdown()

    def _orphaned(self, sentinel: int) -> None:
        """The parent was killed, and what replaces it will want the port."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(sentinel)
        self.service.drain()
        self._close()
        loop.call_later(self.service.settings.drain_timeout, self.service.stop)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM or SIGINT, amid whatever this thread does, perhaps while it holds a lock: so the loop ends the
        service. Does not record the signal, and the process ends with 0."""
        asyncio.get_running_loop().call_soon_threadsafe(self._end, sig)

    def _end(self, sig: int) -> None:
        """Let what is in flight end first. A second signal hurries."""
        if not self.started or self.service.state == "draining":
            self.service.stop()
            self.should_exit = self.force_exit = True
            return
        loop, settings = asyncio.get_running_loop(), self.service.settings
        log.info("draining", extra={"signal": sig})
        self.service.drain()
        loop.call_later(settings.drain_delay, self._close)
        loop.call_later(settings.drain_delay + settings.drain_timeout, self.service.stop)

    def _close(self) -> None:
        self.should_exit = True
