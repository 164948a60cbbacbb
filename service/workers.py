"""Several processes that serve one port.

Only one thread of a process runs Python at a time: what a small model computes in a millisecond, one process cannot
parse, check and answer in one. Each worker is a whole service, with models, queue and runners of its own; no request
passes from one to another. The kernel gives each connection to one of them (SO_REUSEPORT).
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from math import inf
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from service.server import serve
from service.settings import Settings
from service.siblings import Siblings

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted, as uvicorn has it
MARGIN = 5  # seconds that a worker has besides those that the settings give it to end


def supervise(settings: Settings, count: int) -> int:
    """Run so many workers until a signal ends them. One that ends by itself ends all, after they have answered what
    they have: whatever restarts the service sees it, as it would see a single process die.

    Returns the exit status, 0 if the end was asked for and orderly.
    """
    with _reserved(settings.host, settings.port) as reserved, _signals() as inbox:
        shared = {
            "port": reserved.getsockname()[1],
            "max_queue_rows": -(-settings.max_queue_rows // count),
            "max_held_bytes": -(-settings.max_held_bytes // count),
        }
        name = secrets.token_hex(8)
        context = get_context("spawn")  # fork would copy the locks of threads that it does not copy
        workers = [
            context.Process(
                target=_work, args=(settings.model_copy(update=shared), Siblings(name, number, count)), daemon=True
            )
            for number in range(count)
        ]
        with _without_interrupts():
            for worker in workers:
                worker.start()
        host = f"[{settings.host}]" if reserved.family == socket.AF_INET6 else settings.host
        log.info("starting", extra={"url": f"http://{host}:{shared['port']}", "workers": count})
        return _watch(workers, inbox, settings.drain_delay + settings.drain_timeout + MARGIN)


def _watch(workers: list[SpawnProcess], inbox: socket.socket, patience: float) -> int:
    """Wait for the end of all. patience: seconds from when it is asked for until they are killed."""
    stopping = failed = False
    deadline = inf
    while workers:
        left = None if deadline == inf else max(0.0, deadline - time.monotonic())
        ready = wait([inbox, *(worker.sentinel for worker in workers)], left)
        asked = len(inbox.recv(64)) if inbox in ready else 0
        for worker in [worker for worker in workers if worker.sentinel in ready]:
            worker.join()
            workers.remove(worker)
            status = {"pid": worker.pid, "status": worker.exitcode}
            if not (stopping or asked):
                log.error("a worker ended, and with it the service", extra=status)
                asked, failed = 1, True
            elif worker.exitcode not in (0, -signal.SIGTERM):  # the latter before it was ready
                log.error("a worker failed", extra=status)
                failed = True
        for _ in range(asked):
            number = signal.SIGINT if stopping else signal.SIGTERM  # two of one might arrive as one; the second hurries
            for pid in [worker.pid for worker in workers if worker.pid is not None]:
                os.kill(pid, number)
            deadline = min(deadline, time.monotonic() + patience)
            stopping = True
        if time.monotonic() > deadline:
            for worker in workers:
                log.error("a worker did not end and is killed", extra={"pid": worker.pid})
                worker.kill()
            failed, deadline = True, inf
    return int(failed)


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that receives a byte for each SIGTERM and SIGINT."""
    inbox, outbox = socket.socketpair()
    with inbox, outbox:
        outbox.setblocking(False)
        signal.set_wakeup_fd(outbox.fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        yield inbox
        signal.set_wakeup_fd(-1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started meanwhile ignore a terminal's Ctrl-C until they can handle it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, handler)


def _work(settings: Settings, siblings: Siblings) -> None:
    os.setpgrp()  # from here on a terminal's Ctrl-C reaches the parent alone, which passes it on
    listener = socket.create_server(
        (settings.host, settings.port), family=_family(settings.host), backlog=BACKLOG, reuse_port=True
    )
    serve(settings, siblings, listener)


def _reserved(host: str, port: int) -> socket.socket:
    """A port that the workers can share and nobody else has; or the end, if it cannot be had."""
    reserved = socket.socket(_family(host))
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a service before may linger
    try:
        with socket.create_server((host, port), family=reserved.family) as probe:  # fails if another service has it
            port = probe.getsockname()[1]
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))  # without listening: connections go to the workers
    except OSError as error:
        sys.exit(f"REPARAM_HOST={host} REPARAM_PORT={port}: {error}")
    return reserved


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
