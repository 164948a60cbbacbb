"""Count the files that a lone one-row request crosses in the service: python -m benchmarks.peers.crossings

Prints each call in order with --calls, then JSON: files crossed, calls, changes from one file to another.
"""

import argparse
import asyncio
import json
import logging
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.connection import Connection
from reparam.service.app import create_app
from reparam.service.process.server import Server
from reparam.service.settings import Settings
from reparam.service.telemetry.logs import AccessLog

SERVICE = Path(sys.modules["reparam.service"].__path__[0]).resolve()
WARM_UP = 50  # requests before the one that is counted


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.crossings", description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="the folder of models")
    parser.add_argument("--calls", action="store_true", help="print every call")
    options = parser.parse_args()
    calls = asyncio.run(_traced(options.artifacts))
    if options.calls:
        print("\n".join(f"{file}: {function}" for file, function in calls))
    files = [file for file, _ in calls]
    crossed = sorted(set(files))
    changes = sum(before != after for before, after in pairwise(files))
    of = len([path for path in SERVICE.rglob("*.py") if path.name != "__init__.py"])
    print(json.dumps({"files": len(crossed), "of": of, "calls": len(calls), "changes": changes, "crossed": crossed}))


async def _traced(artifacts: Path) -> list[tuple[str, str]]:
    """Return the calls of one request in order: file below the service's folder, and function."""
    logging.getLogger(AccessLog.LOGGER).setLevel(logging.INFO)
    settings = Settings(artifacts=artifacts, device="cpu", workers=1, port=0, log_format="text")
    server = Server(create_app(settings), settings)
    calls: list[tuple[str, str]] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_absolute() and SERVICE in path.resolve().parents:
            calls.append((str(path.resolve().relative_to(SERVICE)), frame.f_code.co_qualname))

    asking = asyncio.to_thread(_ask, server, asyncio.get_running_loop(), trace)
    await asyncio.gather(server.serve(), asking)
    return calls


def _ask(server: Server, loop: asyncio.AbstractEventLoop, trace: Any) -> None:
    """Warm up, then send one request whose calls are traced on the loop's thread. Ends the server."""
    while not (server.started and server.reparam.is_loaded):
        time.sleep(0.01)
    body = b'{"seed":7}'
    request = (
        b"POST /sample HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-npy\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    with Connection(server.servers[0].sockets[0].getsockname()[1]) as connection:
        for _ in range(WARM_UP):
            connection.ask(request)
        _set_profile(loop, trace)
        connection.ask(request)
        _set_profile(loop, None)
    server.should_exit = True


def _set_profile(loop: asyncio.AbstractEventLoop, trace: Any) -> None:
    done = threading.Event()

    def set_profile() -> None:
        sys.setprofile(trace)
        done.set()

    loop.call_soon_threadsafe(set_profile)
    done.wait()


if __name__ == "__main__":
    main()
