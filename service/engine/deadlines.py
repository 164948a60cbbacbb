"""Deadlines of requests, at no cost to those that are answered at once.

A timer for each request would take longer than most samples. So one timer looks at all jobs from time to time. Only a
job that the timer finds twice gets a timer of its own.
"""

import asyncio
from collections.abc import Callable, Collection
from math import inf

from reparam.service.engine.job import Job

GRACE = 0.1  # seconds between two looks at all jobs
SHORT = 2 * GRACE  # seconds; a shorter timeout gets a timer at once


class Deadlines:
    """Calls `expire` for each job whose deadline passes while it is in `jobs`.

    is_running: the jobs are looked at. If not, or for a timeout below SHORT, the engine calls `watch`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, jobs: Collection[Job], expire: Callable[[Job], None]) -> None:
        self.is_running = False
        self._loop = loop
        self._jobs = jobs
        self._expire = expire

    def watch(self, job: Job) -> None:
        """Watch a job that has just begun."""
        if job.timeout < SHORT:
            job.ticks = 2
            self._start_timer(job)
        elif not self.is_running:
            self.is_running = True
            self._loop.call_later(GRACE, self._look)

    def lift(self, job: Job) -> None:
        """Let the job take as long as it likes."""
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
