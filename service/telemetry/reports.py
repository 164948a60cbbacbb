"""What the workers of one service tell each other: whichever is asked how the service is, answers for all."""

import asyncio
import socket
from collections.abc import Callable
from typing import NamedTuple

import orjson

from reparam.service.telemetry.metrics import Family

SILENCE = 1.0  # seconds until a worker that does not answer counts as hung


class Report(NamedTuple):
    """How a worker is. failure: why only a restart helps. metrics: None if it did not answer."""

    state: str
    failure: str | None
    metrics: list[Family] | None


class Siblings:
    """The workers of one service, numbered from 0, of which this is one. They meet at abstract Unix sockets, which
    leave no files and are Linux's own.

    name: the service's, unlike that of any other on this machine.
    """

    def __init__(self, name: str, number: int, count: int) -> None:
        self._name = name
        self._number = number
        self._others = [other for other in range(count) if other != number]
        self._met: set[int] = set()
        self._asking: asyncio.Future[list[Report]] | None = None
        self._server: asyncio.Server

    async def listen(self, report: Callable[[], Report]) -> None:
        """From now on tell who asks."""

        async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(orjson.dumps(tuple(report())))
            writer.close()

        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._address(self._number))
        self._server = await asyncio.start_unix_server(tell, sock=listener)  # lives as long as it is referred to

    def close(self) -> None:
        self._server.close()

    async def ask(self) -> list[Report]:
        """How the others are. Who asks meanwhile gets the same answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.gather(*map(self._ask, self._others))
        return await asyncio.shield(self._asking)

    def _address(self, number: int) -> str:
        return f"\0reparam-{self._name}-{number}"

    async def _ask(self, number: int) -> Report:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.setblocking(False)
                connection.connect(self._address(number))  # at once, if at all
                async with asyncio.timeout(SILENCE):
                    reader, writer = await asyncio.open_unix_connection(sock=connection)
                    told = await reader.read()
                    writer.close()
                report = Report(*orjson.loads(told))
            except ConnectionRefusedError:
                # It does not listen yet; or no longer, and then none of us will for long.
                return Report("draining", None, None) if number in self._met else Report("starting", None, [])
            except (OSError, TimeoutError, ValueError) as error:
                return Report("failed", f"worker {number} does not answer: {error!r}", None)
        self._met.add(number)
        return report
