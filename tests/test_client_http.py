"""HTTP libraries: the clients work with httpx2 and with httpx, whichever is installed."""

import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from reparam import AsyncClient, Client
from reparam._http import httpx
from tests.peer import MODEL, Peer, Received, as_json, rows

LIBRARIES = ["httpx2", "httpx"]  # the preferred one first
INSTALLED = [name for name in LIBRARIES if find_spec(name)]

# Calls of both clients, in a process without the libraries that the arguments name.
PROGRAM = """
import asyncio, sys
url, *blocked = sys.argv[1:]
sys.modules.update(dict.fromkeys(blocked))  # None: an import raises ModuleNotFoundError
import reparam
with reparam.Client(url) as client:
    print(client.model("peer").name, client.sample(3).n, sum(batch.n for batch in client.iter_samples(100_000)))

async def main():
    async with reparam.AsyncClient(url) as client:
        model, samples = await asyncio.gather(client.model("peer"), client.sample(3))
        print(model.name, samples.n, sum([batch.n async for batch in client.iter_samples(100_000)]))

asyncio.run(main())
print({"httpx", "httpx2"} & {name for name, module in sys.modules.items() if module})
"""


def run(url: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, url, *blocked]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def respond(request: Received, handler: BaseHTTPRequestHandler) -> None:
    (rows() if request.method == "POST" else as_json(MODEL))(request, handler)


@pytest.mark.parametrize("library", INSTALLED)
def test_both_clients_work_with_each_library_alone(library: str) -> None:
    with Peer(respond) as peer:
        ran = run(peer.url, *(name for name in LIBRARIES if name != library))
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["peer 3 100000", "peer 3 100000", str({library})]


def test_where_both_are_installed_only_httpx2_is_loaded() -> None:
    with Peer(respond) as peer:
        ran = run(peer.url)
    assert ran.stdout.splitlines()[-1] == str({INSTALLED[0]})
    assert httpx.__name__ == INSTALLED[0]


def test_without_either_library_the_error_says_what_to_install() -> None:
    ran = run("http://127.0.0.1:1", *LIBRARIES)
    assert ran.stderr.splitlines()[-1] == "ImportError: reparam needs an HTTP library: pip install httpx"


def test_a_transport_of_the_other_library_is_refused() -> None:
    for library in INSTALLED[1:]:
        other = import_module(library)
        message = f"must be an httpx2.BaseTransport, got HTTPTransport of {library}: .* make the transport with httpx2"
        with pytest.raises(TypeError, match=message):
            Client(transport=other.HTTPTransport())
        with pytest.raises(TypeError, match=rf"must be an httpx2.AsyncBaseTransport, got MockTransport of {library}:"):
            AsyncClient(transport=other.MockTransport(print))


def test_a_transport_of_the_other_kind_of_client_is_refused() -> None:
    transports: Any = httpx.HTTPTransport(), httpx.AsyncHTTPTransport()
    with pytest.raises(TypeError, match=f"must be an {httpx.__name__}.BaseTransport, got AsyncHTTPTransport"):
        Client(transport=transports[1])
    with pytest.raises(TypeError, match=f"must be an {httpx.__name__}.AsyncBaseTransport, got HTTPTransport"):
        AsyncClient(transport=transports[0])
    with pytest.raises(TypeError, match="BaseTransport, got str: "):
        Client(transport="http://proxy")  # type: ignore[arg-type]  # a wrong type on purpose


def test_a_transport_of_the_user_sees_ordinary_timeouts() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        timeout = httpx.Timeout(**request.extensions["timeout"])
        assert 0 < (timeout.read or 0) <= 9
        return httpx.Response(200, json=MODEL)

    with Client(timeout=9, transport=httpx.MockTransport(respond)) as client:
        assert client.model("peer").name == "peer"


@pytest.mark.parametrize("missing", ["httpx", "httpx2"])
def test_the_tests_of_the_client_need_one_library_only(missing: str) -> None:
    program = f"import sys; sys.modules['{missing}'] = None; import tests.conftest"
    subprocess.run([sys.executable, "-c", program], check=True)
