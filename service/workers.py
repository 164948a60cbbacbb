"""Several processes that serve one port.

Only one thread of a process runs Python at a time: what a small model computes in a millisecond, one process cannot
parse, check and answer in one. Each worker is a whole service, with models, queue and runners of its own; no request
passes from one to another. The kernel gives each connection to one of them (SO_REUSEPORT).
"""

import logging
import os
import secrets
import signal
import socket
import sys
from multiprocessing import get_context
from multiprocessing.connection import wait
from types import FrameType

from service.server import serve
from service.settings import Settings
from service.siblings import Siblings

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted, as uvicorn has it


def supervise(settings: Settings, count: int) -> int:
    """Run so many workers until a signal ends them. One that ends by itself ends all, after they have answered what
    they have: whatever restarts the service sees it, as it would see a single process die.

    Returns the exit status.
    """
    stopping = False
    with _reserved(settings.host, settings.port) as reserved:
        shared = {
            "port": reserved.getsockname()[1],
            "max_queue_rows": -(-settings.max_queue_rows // count),
            "max_held_bytes": -(-settings.max_held_bytes // count),
        }
        name = secrets.token_hex(8)
        context = get_context("spawn")  # fork would copy the locks of threads that it does not copy
        workers = [
            context.Process(target=_work, args=(settings.model_copy(update=shared), Siblings(name, number, count)))
            for number in range(count)
        ]

        def pass_on(sig: int, frame: FrameType | None) -> None:
            nonlocal stopping
            stopping = True
            for worker in workers:
                if worker.is_alive() and worker.pid is not None:
                    os.kill(worker.pid, sig)

        for worker in workers:
            worker.start()
        signal.signal(signal.SIGTERM, pass_on)
        signal.signal(signal.SIGINT, pass_on)
        host = f"[{settings.host}]" if reserved.family == socket.AF_INET6 else settings.host
        log.info("serving", extra={"url": f"http://{host}:{shared['port']}", "workers": count})
        wait([worker.sentinel for worker in workers])
        if not stopping:
            ended = next(worker for worker in workers if worker.exitcode is not None)
            log.error("a worker ended, and with it the service", extra={"pid": ended.pid, "status": ended.exitcode})
            pass_on(signal.SIGTERM, None)
        for worker in workers:
            worker.join()
    return int(any(worker.exitcode for worker in workers))


def _work(settings: Settings, siblings: Siblings) -> None:
    os.setpgrp()  # a terminal's Ctrl-C reaches the parent, which passes it on, once
    listener = socket.create_server(
        (settings.host, settings.port), family=_family(settings.host), backlog=BACKLOG, reuse_port=True
    )
    serve(settings, siblings, listener)


def _reserved(host: str, port: int) -> socket.socket:
    """A port that the workers can share and nobody else has; or the end, if it cannot be had."""
    reserved = socket.socket(_family(host))
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
