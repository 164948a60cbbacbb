"""The life of the service: what the routes share, from the loading of the models to the last answer."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Awaitable
from functools import partial

from fastapi import FastAPI

from reparam.service.artifact.noise import NOISE_VERSION
from reparam.service.engine.engine import BATCH_SECONDS, Engine
from reparam.service.errors import Unavailable
from reparam.service.runtime.devices import device_of
from reparam.service.runtime.repository import Model, Repository
from reparam.service.settings import Settings
from reparam.service.telemetry.logs import AccessLog
from reparam.service.telemetry.metrics import Metrics
from reparam.service.telemetry.reports import Report, Siblings

log = logging.getLogger(__name__)

# Of a process, the worst first; a service is in the worst that any of its processes is in.
STATES = ("failed", "draining", "no model", "no default model", "starting", "ready")


class Service:
    """What the routes share: the models, the engine, and whether requests are taken."""

    def __init__(self, settings: Settings, siblings: Siblings | None) -> None:
        self.settings = settings
        self.siblings = siblings
        self.device = device_of(settings)
        self.metrics = Metrics()
        self.repository = Repository(settings.default_model)
        self.engine = Engine(self.device.runners, settings.max_queue_rows, settings.max_held_bytes, self.metrics)
        self.access_log = AccessLog(settings.log_format)
        self.state = "starting"
        self._loaded = False
        self._loading: asyncio.Task[None] | None = None  # and what follows from it
        self.metrics.noise_version.labels(str(NOISE_VERSION)).set(1)
        self.metrics.queue_rows.set_function(lambda: self.engine.queued_rows)
        self.metrics.queue_oldest.set_function(self.engine.oldest)
        self.metrics.held_bytes.set_function(lambda: self.engine.held_bytes)

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Load the models beside the event loop, so that /livez answers meanwhile; serve until the end."""
        settings = self.settings
        load = partial(self.repository.load, settings.artifacts, self.device, settings.max_batch_rows, BATCH_SECONDS)
        self._loading = asyncio.create_task(self._serve(self.engine.start(asyncio.get_running_loop(), load)))
        if self.siblings is not None:
            await self.siblings.listen(self.report)
        yield
        self.drain()
        self.stop()
        self.engine.abandon()
        self._loading.cancel()
        if self.siblings is not None:
            self.siblings.close()

    async def _serve(self, loaded: Awaitable[None]) -> None:
        try:
            await loaded
        except Exception:
            log.exception("the models could not be loaded")
            raise
        for model in self.served():
            self.metrics.model_served.labels(model.name, str(model.version), model.artifact.provider).set(1)
        for versions in self.repository.models.values():
            for model in versions.values():
                self.engine.serve(model)
        self.metrics.model_refused.set(len(self.repository.refused))
        # What is loaded now stays: the garbage collector need not look at it again, nor after every 700 objects.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        self._loaded = True
        if self.state == "starting":
            self.state = self.repository.state

    def report(self) -> Report:
        """How this process is."""
        failure = self._failure()
        return Report("failed" if failure else self.state, failure, self.metrics.families())

    async def reports(self) -> list[Report]:
        """How all processes of the service are, this one first."""
        return [self.report(), *(await self.siblings.ask() if self.siblings else ())]

    def _failure(self) -> str | None:
        """What has ended that should not, or does not end that should: only a restart helps."""
        loading = self._loading
        if loading is not None and loading.done() and not loading.cancelled() and loading.exception():
            return f"the models could not be loaded: {loading.exception()!r}"
        return self.engine.failure(self.settings.hang_timeout)

    def served(self) -> list[Model]:
        """The latest version of every model."""
        return [self.repository.find(name, None) for name in sorted(self.repository.models)]

    def drain(self) -> None:
        """From now on /readyz says no; requests are answered until `stop`."""
        self.state = "draining"

    def stop(self) -> None:
        """Refuse what waits and what comes."""
        self.engine.close("the service is draining: ask another replica, or again")

    def ready(self) -> None:
        """Raises Unavailable."""
        if self._loaded:
            return
        if self._failure() is not None:
            raise Unavailable("the models could not be loaded: /livez says why", retry_after=1)
        raise Unavailable("the models are being loaded: try again in a second", retry_after=1)
