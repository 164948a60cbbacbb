"""One serving process: uvicorn with an orderly shutdown."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
from multiprocessing import parent_process
from types import FrameType

import uvicorn

from reparam.service.app import Application, create_app
from reparam.service.settings import Settings
from reparam.service.telemetry.reports import WorkerReports
from reparam.service.wire.protocol import Protocol

log = logging.getLogger(__name__)


def serve(settings: Settings, listener: socket.socket, reports: WorkerReports | None = None) -> None:
    """Serve until a signal ends the process.

    listener: listening socket of the service.
    reports: exchange of reports between the workers of the service; None for a single process.

    Raises: DeviceError.
    """
    server = Server(create_app(settings, reports), settings)
    server.run([listener])
    server.reparam.recorder.flush()  # requests that ended after the lifespan
    if server.reparam.engine.busy:
        # A run cannot be interrupted, and the interpreter would wait for the run.
        logging.shutdown()
        os._exit(0)


class Server(uvicorn.Server):
    """uvicorn's server with a shutdown in three steps: /readyz fails, the port closes, queued requests are refused."""

    def __init__(self, app: Application, settings: Settings) -> None:
        self.reparam = app.reparam
        self._tuning: asyncio.Task[None] | None = None
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
        """Start to serve. A worker also watches the parent process, the supervisor of all workers."""
        await super().startup(sockets)
        self._tuning = asyncio.create_task(self._tune_garbage_collector())
        parent = parent_process()
        if parent is not None:
            asyncio.get_running_loop().add_reader(parent.sentinel, self._orphaned, parent.sentinel)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections, and run the application's lifespan to the end."""
        await super().shutdown(sockets)
        if self._tuning is not None:
            self._tuning.cancel()
        if self.force_exit:  # uvicorn would skip the lifespan's shutdown, and the lifespan's task would log a traceback
            await self.lifespan.shutdown()

    def _orphaned(self, sentinel: int) -> None:
        """Close the port at once after the parent was killed, because the parent's replacement needs the port."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(sentinel)
        self.reparam.drain()
        self._close()
        loop.call_later(self.reparam.settings.drain_timeout, self.reparam.stop)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the service on SIGTERM or SIGINT.

        The signal may interrupt code that holds a lock, so the event loop ends the service later. Unlike uvicorn, the
        server does not raise the signal again at the end, so the process exits with status 0.
        """
        asyncio.get_running_loop().call_soon_threadsafe(self._end, sig)

    def _end(self, sig: int) -> None:
        """Drain, and then end. A second signal ends the service at once."""
        if not self.started or self.reparam.state == "draining":
            self.reparam.stop()
            self.should_exit = self.force_exit = True
            return
        loop, settings = asyncio.get_running_loop(), self.reparam.settings
        log.info("draining", extra={"signal": sig})
        self.reparam.drain()
        loop.call_later(settings.drain_delay, self._close)
        loop.call_later(settings.drain_delay + settings.drain_timeout, self.reparam.stop)

    def _close(self) -> None:
        self.should_exit = True

    async def _tune_garbage_collector(self) -> None:
        """Once the models are loaded, exclude them from garbage collection, and collect less often than by default."""
        loading = self.reparam.loading
        if loading is not None:
            with contextlib.suppress(Exception):  # reported by /livez
                await asyncio.shield(loading)
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 50)
