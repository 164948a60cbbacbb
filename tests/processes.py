"""`reparam serve` in processes of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import metric, wait_until
from tests.load import TLS

PATIENCE = 300  # seconds for the end of a process; a healthy process ends within a few
ALONE = {
    "REPARAM_WORKERS": "1",
    "REPARAM_RUNNERS": "1",
    "REPARAM_DEVICE": "cpu",
    "REPARAM_REQUEST_TIMEOUT": str(PATIENCE),
}
TWO = {**ALONE, "REPARAM_WORKERS": "2"}
QUIET = {"REPARAM_LOG_LEVEL": "warning"}  # for services whose log is not read while they run


@dataclass
class Process:
    """A service on 127.0.0.1."""

    popen: "subprocess.Popen[str]"
    url: str

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return httpx.get(self.url + path, verify=TLS, **{"timeout": 120, **arguments})

    def post(self, body: Any = None, **arguments: Any) -> httpx.Response:
        """POST /sample with a JSON body."""
        return httpx.post(f"{self.url}/sample", json=body, timeout=120, verify=TLS, **arguments)

    def await_in_flight(self, requests: int) -> None:
        """Wait until so many requests are being answered, besides the request for the metric."""
        wait_until(lambda: metric(self.url, "requests_in_flight") == requests + 1)

    def end(self, *signals: int) -> str:
        """Send the signals and wait for the end. Returns the log, as far as it was not read."""
        for number in signals:
            self.popen.send_signal(number)
        _, log = self.popen.communicate(timeout=PATIENCE)
        return log


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "reparam", "serve", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def process(repository: Path, until: str = "ready", **environment: str) -> Iterator[Process]:
    """Start a service and wait until /readyz reports the status `until`."""
    port = environment.setdefault("REPARAM_PORT", free_port())
    service = Process(start(REPARAM_ARTIFACTS=str(repository), **environment), f"http://127.0.0.1:{port}")

    def is_there() -> bool:
        assert service.popen.poll() is None, "the service has ended"
        try:
            return bool(service.get("/readyz").json()["status"] == until)
        except httpx.TransportError:
            return False

    try:
        wait_until(is_there)
        yield service
    finally:
        service.popen.kill()
        service.popen.communicate()
