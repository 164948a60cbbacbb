"""Deadlines and departures of requests, at no cost to those that are answered at once.

A timer for each request, and a task that watches its client, would take longer than most samples. So one timer looks
at all requests from time to time, and only one that it finds twice is watched by itself.
"""

import asyncio
from collections.abc import Collection

from reparam.service.engine.job import Job

PATIENCE = 0.1  # seconds


class Patience:
    """With all jobs of one event loop; whichever is in the collection waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, jobs: Collection[Job]) -> None:
        self._loop = loop
        self._jobs = jobs
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, job: Job) -> None:
        if job.timeout < 2 * PATIENCE:
            job.seen = 2
            job.look_after()
        elif self._timer is None:
            self._timer = self._loop.call_later(PATIENCE, self._look)

    def _look(self) -> None:
        for job in list(self._jobs):
            job.seen += 1
            if job.seen == 2:
                job.look_after()
        self._timer = self._loop.call_later(PATIENCE, self._look) if self._jobs else None
