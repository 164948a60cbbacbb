"""Reports between the workers of one service, so that any worker can answer probes for all workers."""

import asyncio
import socket
from collections.abc import Callable
from typing import NamedTuple

import orjson

from reparam.service.telemetry.metrics import Family

TIMEOUT = 1.0  # seconds; a worker that takes longer to answer counts as hung


class Report(NamedTuple):
    """The state of a worker.

    state: an entry of lifespan.STATES.
    failure: the reason for a restart; None if the worker is well.
    metrics: metrics of the worker; None if the worker did not answer.
    """

    state: str
    failure: str | None
    metrics: list[Family] | None


class WorkerReports:
    """Exchanges reports with the other workers.

    Each worker listens at an abstract Unix socket. Abstract sockets leave no files and exist on Linux only.

    name: name of the service, unique on this machine.
    number: number of this worker, 0 .. count - 1.
    count: number of workers.
    """

    def __init__(self, name: str, number: int, count: int) -> None:
        self._name = name
        self._number = number
        self._others = [other for other in range(count) if other != number]
        self._seen: set[int] = set()  # numbers of workers with an earlier report
        self._asking: asyncio.Future[list[Report]] | None = None
        self._server: asyncio.Server

    async def listen(self, report: Callable[[], Report]) -> None:
        """Answer each request of another worker with `report()`, from now on."""

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(orjson.dumps(tuple(report())))
            writer.close()

        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._address(self._number))
        self._server = await asyncio.start_unix_server(answer, sock=listener)  # a reference, against garbage collection

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    async def ask(self) -> list[Report]:
        """Return the reports of the other workers, in order of their numbers.

        Concurrent calls share a round of requests. A worker that does not answer within TIMEOUT has the state "failed".
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.gather(*map(self._ask, self._others))
        return await asyncio.shield(self._asking)

    def _address(self, number: int) -> str:
        return f"\0reparam-{self._name}-{number}"

    async def _ask(self, number: int) -> Report:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.setblocking(False)
                connection.connect(self._address(number))  # a Unix socket connects at once, or fails
                async with asyncio.timeout(TIMEOUT):
                    reader, writer = await asyncio.open_unix_connection(sock=connection)
                    received = await reader.read()
                    writer.close()
                report = Report(*orjson.loads(received))
            except ConnectionRefusedError:
                # The worker does not listen yet, or no longer. If no longer, the whole service is ending.
                return Report("draining", None, None) if number in self._seen else Report("starting", None, [])
            except (OSError, TimeoutError, ValueError) as error:
                return Report("failed", f"worker {number} does not answer: {error!r}", None)
        self._seen.add(number)
        return report
