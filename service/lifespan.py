"""The lifespan of an application: models, engine and state, from loading to the last response."""

import asyncio
import contextlib
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
from reparam.service.telemetry.recorder import Recorder
from reparam.service.telemetry.reports import Report, WorkerReports

log = logging.getLogger(__name__)

# States of a worker process, the worst state first. The state of a service is the worst state of its workers.
STATES = ("failed", "draining", "no model", "no default model", "starting", "ready")


class Lifespan:
    """The models, the engine and the state of an application.

    settings: settings of the service.
    reports: exchange of reports between the workers of the service; None for a single process.
    device: device of the models.
    metrics, recorder: metrics and access log of this process.
    repository: the models.
    engine: runs rows of the models.
    state: an entry of STATES except "failed"; `report` detects failures.
    is_loaded: the models are loaded, and requests are accepted.
    loading: the task that loads the models; None before the start.

    Raises: DeviceError, as devices.choose.
    """

    def __init__(self, settings: Settings, reports: WorkerReports | None = None) -> None:
        self.settings = settings
        self.device = device_of(settings)
        self.metrics = Metrics()
        self.recorder = Recorder(self.metrics, AccessLog(settings.log_format))
        self.repository = Repository(settings.default_model)
        self.engine = Engine(
            self.device.runners, settings.max_queue_rows, settings.max_held_bytes, self.metrics, self.recorder
        )
        self.state = "starting"
        self.is_loaded = False
        self.loading: asyncio.Task[None] | None = None
        self._reports = reports
        self.metrics.noise_version.labels(str(NOISE_VERSION)).set(1)
        self.metrics.queue_rows.set_function(lambda: self.engine.queued_rows)
        self.metrics.queue_oldest.set_function(self.engine.oldest_wait)
        self.metrics.held_bytes.set_function(lambda: self.engine.admission.reserved_bytes)

    @contextlib.asynccontextmanager
    async def run(self, _: FastAPI) -> AsyncIterator[None]:
        """Serve from entry to exit, as FastAPI's lifespan.

        The models load on a runner thread, so /livez can answer during loading. At exit, all unanswered requests fail.
        """
        settings = self.settings
        load = partial(self.repository.load, settings.artifacts, self.device, settings.max_batch_rows, BATCH_SECONDS)
        self.loading = asyncio.create_task(self._serve(self.engine.start(asyncio.get_running_loop(), load)))
        if self._reports is not None:
            await self._reports.listen(self.report)
        yield
        self.drain()
        self.stop()
        self.engine.abandon()
        self.loading.cancel()
        if self._reports is not None:
            self._reports.close()
        self.recorder.flush()

    async def _serve(self, loaded: Awaitable[None]) -> None:
        try:
            await loaded
        except Exception:
            log.exception("the models could not be loaded")
            raise
        for model in self.served():
            self.metrics.model_served.labels(*model.sampler.labels, model.artifact.provider).set(1)
        for versions in self.repository.models.values():
            for model in versions.values():
                self.engine.serve(model.sampler)
        self.metrics.model_refused.set(len(self.repository.refused))
        self.is_loaded = True
        if self.state == "starting":
            self.state = self.repository.state

    def report(self) -> Report:
        """Report the state and the metrics of this process."""
        failure = self._failure()
        self.recorder.flush()
        return Report("failed" if failure else self.state, failure, self.metrics.families())

    async def collect_reports(self) -> list[Report]:
        """Collect the reports of all processes of the service, this one first."""
        return [self.report(), *(await self._reports.ask() if self._reports else ())]

    def served(self) -> list[Model]:
        """List the latest version of every model."""
        return [self.repository.find(name, None) for name in sorted(self.repository.models)]

    def drain(self) -> None:
        """Make /readyz fail, so that load balancers send no new requests. Requests are still answered."""
        self.state = "draining"

    def stop(self) -> None:
        """Refuse queued requests and new requests. Rows already running are still answered."""
        self.engine.close("the service is draining: ask another replica, or again")

    def check_ready(self) -> None:
        """Check that the models are loaded.

        Raises: Unavailable during loading, and after a failure.
        """
        if self.is_loaded:
            return
        if self._failure() is not None:
            raise Unavailable("the models could not be loaded: /livez says why", retry_after=1)
        raise Unavailable("the models are being loaded: try again in a second", retry_after=1)

    def _failure(self) -> str | None:
        """Return the reason for a restart; None if the process is well."""
        loading = self.loading
        if loading is not None and loading.done() and not loading.cancelled() and loading.exception():
            return f"the models could not be loaded: {loading.exception()!r}"
        return self.engine.failure(self.settings.hang_timeout)
