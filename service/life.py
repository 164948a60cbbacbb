"""The life of the service: what the routes share, from the loading of the models to the last answer."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from fastapi import FastAPI

from service.artifact import Arrays
from service.batcher import Batcher, Timing
from service.devices import choose
from service.errors import Unavailable
from service.metrics import Metrics
from service.repository import Model, Repository
from service.rows import Rows
from service.settings import Settings

log = logging.getLogger(__name__)


class Service:
    """What the routes share: the models, the batcher, and whether requests are taken."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = choose(settings.device)
        self.metrics = Metrics()
        self.repository = Repository(settings.default_model)
        self.batcher = Batcher(settings.max_batch_rows, settings.max_queue_rows, self.metrics)
        self.state = "starting"
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics.queue_rows.set_function(lambda: self.batcher.queued_rows)

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Load the models beside the event loop, so that /livez answers meanwhile; serve until the end."""
        self._tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._serve())]
        yield
        self.drain()
        self.stop()
        for task in self._tasks:
            task.cancel()

    async def _load(self) -> None:
        with _logged("the models could not be loaded"):
            await asyncio.to_thread(self.repository.load, self.settings.artifacts, self.device, self.settings.threads)
        for model in self.served():
            self.metrics.model_served.labels(model.name, str(model.version), model.artifact.provider).set(1)
        self.metrics.model_refused.set(len(self.repository.refused))
        if self.state == "starting":
            self.state = "ready" if self.repository.models else "no model"

    async def _serve(self) -> None:
        with _logged("the batcher ended"):
            await self.batcher.serve()

    def failure(self) -> BaseException | None:
        """What ended the loading or the batcher, if they did not end as they should: only a restart helps."""
        ended = (task for task in self._tasks if task.done() and not task.cancelled())
        return next((task.exception() for task in ended if task.exception()), None)

    def served(self) -> list[Model]:
        """The latest version of every model."""
        return [self.repository.find(name, None) for name in sorted(self.repository.models)]

    def drain(self) -> None:
        """From now on /readyz says no; requests are answered until `stop`."""
        self.state = "draining"

    def stop(self) -> None:
        """Refuse what waits and what comes."""
        self.batcher.close("the service is draining: ask another replica, or again")

    def ready(self) -> None:
        """Raises Unavailable."""
        if self.state == "starting":
            raise Unavailable("the models are being loaded", retry_after=1)

    @contextlib.asynccontextmanager
    async def within(self, deadline: float, stage: str) -> AsyncIterator[None]:
        """Raises DeadlineExceeded if what is done inside outlasts the deadline, on the event loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError:
            raise self.batcher.expired(stage) from None

    async def outputs(self, rows: Rows, timing: Timing, deadline: float | None) -> AsyncGenerator[Arrays, None]:
        """The graph's outputs for the rows, in pieces of at most one batch."""
        size = self.batcher.max_batch_rows
        for lo in range(0, rows.n, size):
            yield await self.batcher.run(rows.part(lo, min(lo + size, rows.n)), timing, deadline)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception(what)
        raise
