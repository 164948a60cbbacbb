"""Several worker processes serving one port.

Only one thread of a process runs Python at a time. So one process cannot parse, check and encode as many rows as a
small model computes. Each worker is a complete service, with its own models, queue and runners. The kernel gives each
connection to one worker (SO_REUSEPORT), and no request passes between workers.
"""

import contextlib
import logging.config
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

from reparam.service.process.server import serve
from reparam.service.settings import Settings
from reparam.service.telemetry.logs import log_config
from reparam.service.telemetry.reports import WorkerReports

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections waiting to be accepted; uvicorn's default
MARGIN = 5  # seconds for a worker's exit, added to drain_delay and drain_timeout


def run(settings: Settings, count: int) -> int:
    """Serve until a signal ends the service.

    count: number of workers. A single worker is this process.

    Returns: the exit status; 0 for an orderly end after a signal.

    Raises: DeviceError; SystemExit if the service cannot listen at the port.
    """
    try:
        held = _listener(settings) if count == 1 else _reserved(settings)
    except OSError as error:
        sys.exit(f"REPARAM_HOST={settings.host} REPARAM_PORT={settings.port}: {error}")
    with held:
        host, port = held.getsockname()[:2]
        url = f"http://[{host}]:{port}" if held.family == socket.AF_INET6 else f"http://{host}:{port}"
        log.info("starting", extra={"url": url, "workers": count})
        if count == 1:
            serve(settings, held)
            return 0
        return _supervise(settings.model_copy(update={"port": port}), count)


def _supervise(settings: Settings, count: int) -> int:
    """Run worker processes until all have ended. If a worker ends by itself, the other workers drain and end too.

    So a dead worker ends the whole service, and a process manager such as systemd or Kubernetes restarts the service.

    settings: settings of the service. Each worker gets an equal part of the limits on rows and bytes.
    count: number of workers.

    Returns: the exit status; 1 if a worker failed or had to be killed.
    """
    with _signals() as inbox:
        shared = {
            "max_queue_rows": -(-settings.max_queue_rows // count),
            "max_held_bytes": -(-settings.max_held_bytes // count),
        }
        name = secrets.token_hex(8)
        context = get_context("spawn")  # fork would copy held locks without the threads that release the locks
        workers = [
            context.Process(
                target=_work, args=(settings.model_copy(update=shared), WorkerReports(name, number, count)), daemon=True
            )
            for number in range(count)
        ]
        with _without_interrupts():
            for worker in workers:
                worker.start()
        return _watch(workers, inbox, settings.drain_delay + settings.drain_timeout + MARGIN)


def _watch(workers: list[SpawnProcess], inbox: socket.socket, grace: float) -> int:
    """Wait for the end of all workers.

    The first signal, or the first worker that ends by itself, stops all workers by SIGTERM. A further signal stops the
    workers at once by SIGINT.

    workers: the running processes; removed from the list when ended.
    inbox: receives a byte for each signal to this process.
    grace: seconds from the first SIGTERM until the remaining workers are killed.

    Returns: the exit status; 1 if a worker failed or had to be killed.
    """
    stopping = failed = False
    deadline = inf
    while workers:
        left = None if deadline == inf else max(0.0, deadline - time.monotonic())
        ready = wait([inbox, *(worker.sentinel for worker in workers)], left)
        signals = len(inbox.recv(64)) if inbox in ready else 0
        for worker in [worker for worker in workers if worker.sentinel in ready]:
            worker.join()
            workers.remove(worker)
            status = {"pid": worker.pid, "status": worker.exitcode}
            if not (stopping or signals):
                log.error("a worker ended, and with it the service", extra=status)
                signals, failed = 1, True
            elif worker.exitcode not in (0, -signal.SIGTERM):  # SIGTERM kills a worker without a handler yet
                log.error("a worker failed", extra=status)
                failed = True
        for _ in range(signals):
            # The second signal ends workers at once. The two signals differ, because two equal signals can merge into
            # a single signal.
            number = signal.SIGINT if stopping else signal.SIGTERM
            for pid in [worker.pid for worker in workers if worker.pid is not None]:
                os.kill(pid, number)
            deadline = min(deadline, time.monotonic() + grace)
            stopping = True
        if time.monotonic() > deadline:
            for worker in workers:
                log.error("a worker did not end and is killed", extra={"pid": worker.pid})
                worker.kill()
            failed, deadline = True, inf
    return int(failed)


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Make a socket that receives a byte for each SIGTERM and SIGINT. Yields: the socket."""
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
    """Ignore SIGINT while the block runs.

    Processes started in the block also ignore SIGINT, so Ctrl-C in a terminal cannot kill a process before its handlers
    are set.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, handler)


def _work(settings: Settings, reports: WorkerReports) -> None:
    logging.config.dictConfig(log_config(settings))
    os.setpgrp()  # so that Ctrl-C in a terminal reaches the parent alone; the parent passes the signal on
    serve(settings, _listener(settings, shared=True), reports)


def _listener(settings: Settings, shared: bool = False) -> socket.socket:
    """Listen at the service's port.

    shared: let the other workers listen at the same port (SO_REUSEPORT).

    Returns: the listening socket.

    Raises: OSError.
    """
    host, port = settings.host, settings.port
    return socket.create_server((host, port), family=_family(host), backlog=BACKLOG, reuse_port=shared)


def _reserved(settings: Settings) -> socket.socket:
    """Reserve a port for all workers. Fails if another service uses the port.

    Returns: a bound socket that does not listen.

    Raises: OSError.
    """
    with _listener(settings) as probe:  # fails if another service uses the port
        address = probe.getsockname()
    reserved = socket.socket(_family(settings.host))
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier service may linger
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if reserved.family == socket.AF_INET6:
        reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as create_server does
    reserved.bind(address)  # without `listen`, so that all connections go to the workers
    return reserved


def _family(host: str) -> socket.AddressFamily:
    """Choose the address family of a host: IPv4 if the host has both families. Raises: OSError."""
    families = {found[0] for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
