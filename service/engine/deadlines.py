"""Deadlines of requests, at almost no cost to requests that end soon.

Starting a timer for each request would be costly beside a small request. So one timer visits all jobs every GRACE
seconds. A job present at two visits gets its own timer. A job with a timeout below SHORT gets its own timer at once.
"""

import asyncio
from collections.abc import Callable, Collection
from math import inf

from reparam.service.engine.job import Job

GRACE = 0.1  # seconds between two visits of all jobs
SHORT = 2 * GRACE  # seconds; a job with a shorter timeout gets a timer of its own at once


class Deadlines:
    """Calls `expire` for each job in `jobs` whose deadline passes.

    loop: event loop of the jobs.
    jobs: jobs in the engine; the engine adds and removes jobs.
    expire: called on the loop with the job.
    is_running: the common timer runs. While the timer runs, the engine need not call `watch` for a new job, unless the
        job's timeout is below SHORT.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, jobs: Collection[Job], expire: Callable[[Job], None]) -> None:
        self.is_running = False
        self._loop = loop
        self._jobs = jobs
        self._expire = expire

    def watch(self, job: Job) -> None:
        """Watch a new job, by the common timer or by a timer of its own."""
        if job.timeout < SHORT:
            job.ticks = 2
            self._start_timer(job)
        elif not self.is_running:
            self.is_running = True
            self._loop.call_later(GRACE, self._look)

    def lift(self, job: Job) -> None:
        """Remove the job's deadline."""
        job.deadline = inf
        if job.timer is not None:
            job.timer.cancel()

    def _look(self) -> None:
        for job in list(self._jobs):
            job.ticks += 1
            if job.ticks == 2:
                self._start_timer(job)
        self.is_running = bool(self._jobs)
        if self.is_running:
            self._loop.call_later(GRACE, self._look)

    def _start_timer(self, job: Job) -> None:
        if job.deadline < inf:
            job.timer = self._loop.call_at(job.deadline, self._expire, job)
        job.on_wait()
