"""The application under other servers: the same rows and the same problems as under `reparam serve`."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from reparam.service.app import create_app
from reparam.service.settings import Settings
from tests.conftest import Running, wait_until
from tests.graphs import FAILS, NAN
from tests.load import TLS

REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "one row": ({"seed": 1}, "application/x-npy"),
    "json": ({"seed": 1, "n": 3, "outputs": ["images", "latents"]}, "application/json"),
    "picture": ({"seed": 2, "n": 9, "model": "tiny-gumbel"}, "image/png"),
    "archive": ({"seed": 3, "n": 70, "model": "tiny-gumbel", "outputs": ["codes", "indices"]}, "application/x-npz"),
    "stream": ({"seed": 4, "n": 30_000}, "application/x-npy"),
    "unknown field": ({"sed": 1}, "application/json"),
    "unknown model": ({"model": "absent"}, "application/json"),
    "not acceptable": ({"outputs": ["images", "latents"]}, "image/png"),
    "too large": ({"n": 10**6}, "application/json"),
    "fails": ({"model": "trouble", "temperature": FAILS, "seed": 1}, "application/json"),
    "not finite": ({"model": "trouble", "temperature": NAN, "seed": 1}, "application/json"),
}
OF_A_RESPONSE = ("content-type", "model-name", "model-version", "sample-seed", "sample-start", "noise-version")


def responses(client: Any, url: str) -> dict[str, tuple[int, dict[str, str], bytes]]:
    """Send each request. Returns status, headers and body by name."""
    found = {}
    for name, (body, accept) in REQUESTS.items():
        headers = {"Accept": accept, "X-Request-ID": "mine"}
        response = client.post(f"{url}/sample", json=body, headers=headers)
        shown = {header: response.headers[header] for header in OF_A_RESPONSE if header in response.headers}
        found[name] = response.status_code, shown, response.content
    for path in ("/models", "/problems/queue-full", "/absent", "/sample"):
        response = client.get(url + path)
        body = response.json() if path == "/models" else response.content
        found[path] = response.status_code, {}, b"" if path in ("/absent", "/sample") else repr(body).encode()
    return found


@pytest.fixture(scope="module")
def expected(service: Running) -> dict[str, tuple[int, dict[str, str], bytes]]:
    with httpx.Client(timeout=120, verify=TLS) as client:
        return responses(client, service.url)


@pytest.fixture
def uvicorn(repository: Path) -> Iterator[str]:
    """The address of a stock uvicorn with two workers."""
    command = [sys.executable, "-m", "uvicorn", "--factory", "reparam.service.app:create_app", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        env={**os.environ, "REPARAM_ARTIFACTS": str(repository), "REPARAM_DEFAULT_MODEL": "tiny-gaussian"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "running on" in line)
        url = line.partition("running on ")[2].split()[0]
        ready: set[str] = set()

        def are_ready() -> bool:
            """Tell whether both workers have reported to be ready. A request id begins with digits of its process."""
            with contextlib.suppress(httpx.TransportError):
                response = httpx.get(f"{url}/readyz", timeout=60, verify=TLS)
                if response.status_code == 200:
                    ready.add(response.headers["x-request-id"][:20])
            return len(ready) == 2

        wait_until(are_ready)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=300)


def test_stock_uvicorn_gives_the_same_responses(uvicorn: str, expected: dict[str, Any]) -> None:
    for _ in range(4):  # with a fresh connection each time, because either worker may take it
        with httpx.Client(timeout=120, verify=TLS) as client:
            assert responses(client, uvicorn) == expected


def test_a_body_that_the_server_drops_is_refused(uvicorn: str) -> None:
    """Stock uvicorn drops the body of a request for an upgrade, which some clients send by default."""
    headers = {"Connection": "Upgrade", "Upgrade": "h2c"}
    response = httpx.post(f"{uvicorn}/sample", json={"seed": 1}, headers=headers, timeout=60)
    assert (response.status_code, response.json()["type"]) == (400, "/problems/malformed-request")


def test_starlettes_test_client_gives_the_same_responses(repository: Path, expected: dict[str, Any]) -> None:
    app = create_app(Settings(artifacts=repository, default_model="tiny-gaussian", device="cpu"))
    with TestClient(app) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert responses(client, "") == expected
