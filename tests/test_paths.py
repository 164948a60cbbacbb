"""The fast path and the ASGI path of `POST /sample`: equal responses, and requests whose heads repeat."""

import json
import time
from collections.abc import Callable
from io import BufferedReader
from typing import Any

import pytest

from reparam.service.engine.deadlines import GRACE
from tests.conftest import Running
from tests.graphs import FAILS, NAN
from tests.raw import HEAD_END, LIVEZ, connect, request, send, whole_response

Response = tuple[int, dict[bytes, bytes], bytes]
VARYING = {b"date", b"server-timing"}


def read(stream: BufferedReader) -> Response:
    """Read the next response, without headers that differ between equal requests."""
    status, headers, body = whole_response(stream)
    return status, {name: value for name, value in headers.items() if name not in VARYING}, body


def exchange(service: Running, *pieces: bytes) -> Response:
    """Send the pieces on a fresh connection, each in a packet of its own. Returns the first response."""
    with connect(service) as connection, connection.makefile("rb") as stream:
        send(connection, *pieces)
        return read(stream)


def on_asgi_path(message: bytes) -> bytes:
    """Add a query, which keeps a request from the fast path."""
    return message.replace(b"POST /sample HTTP/1.1", b"POST /sample? HTTP/1.1")


def named(body: Any, accept: str = "application/x-npy", **headers: str) -> bytes:
    """Write a request with a request id."""
    return request(body, accept, X_Request_Id="mine", **headers)


CASES = {
    "npy": named({"seed": 1}),
    "json": named({"seed": 1, "n": 3, "outputs": ["images", "latents"]}, "application/json"),
    "png": named({"seed": 1, "n": 4}, "image/png"),
    "npz": named({"seed": 1, "n": 2, "outputs": ["images", "latents"]}, "application/x-npz"),
    "gumbel": named({"model": "tiny-gumbel", "seed": 2, "outputs": ["indices"]}),
    "empty": b"POST /sample HTTP/1.1\r\nHost: reparam\r\nX-Request-Id: mine\r\nContent-Length: 0\r\n\r\n",
    "chunked": named({"seed": 1}).replace(b"Content-Length: 11", b"Transfer-Encoding: chunked").replace(
        HEAD_END, b"\r\n\r\nb\r\n") + b"\r\n0\r\n\r\n",
    "closing": named({"seed": 1}, Connection="close"),
    "no JSON": named({"seed": 1}).replace(b"{", b"["),
    "unknown field": named({"sed": 1}),
    "unknown model": named({"model": "absent"}),
    "negative": named({"n": -1}),
    "not acceptable": named({"outputs": ["images", "latents"]}, "image/png"),
    "media type": named({}, Content_Encoding="gzip"),
    "coding": named({}, Transfer_Encoding="gzip, chunked").replace(b"Content-Length: 2\r\n", b"").replace(
        b"{}", b"2\r\n{}\r\n0\r\n\r\n"),
    "timeout": named({}, Request_Timeout="soon"),
    "expired": named({}, Request_Timeout="0.000001"),
    "fails": named({"model": "trouble", "temperature": FAILS, "seed": 1}),
    "nan": named({"model": "trouble", "temperature": NAN}),
    "large": named({"seed": 1, "n": 5000}),
    "large body": named({"seed": 1, "mu": [[0.0] * 8] * 2000, "n": 2000}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_response_does_not_depend_on_the_path(service: Running, case: str) -> None:
    message = CASES[case]
    fast, asgi = exchange(service, message), exchange(service, on_asgi_path(message))
    if case == "empty":  # each request has a fresh seed
        assert fast[0] == asgi[0] == 200
        assert set(fast[1]) == set(asgi[1])
    else:
        assert fast == asgi
    assert fast[1][b"x-request-id"] == b"mine"
    if case in ("coding", "media type"):
        assert fast[0] == 415


def test_a_response_does_not_depend_on_the_packets_of_its_request(service: Running) -> None:
    message = CASES["npy"]
    whole = exchange(service, message)
    middle = message.index(HEAD_END) + 4
    for cut in (10, middle - 2, middle, middle + 3, len(message) - 1):
        assert exchange(service, message[:cut], message[cut:]) == whole
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(message[:-1])
        time.sleep(3 * GRACE)  # too long for the fast path
        connection.sendall(message[-1:])
        assert read(stream) == whole


def test_responses_come_in_the_order_of_the_requests(service: Running) -> None:
    large = named({"seed": 3, "n": 3000})
    messages = [CASES["npy"], large, CASES["json"], LIVEZ, CASES["negative"], CASES["npy"], CASES["json"], large]
    alone = [exchange(service, message) for message in messages]
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"".join(messages))
        for message, expected in zip(messages, alone, strict=True):
            found = read(stream)
            assert found == expected or (message == LIVEZ and found[0] == expected[0])


def test_lone_requests_get_the_responses_of_requests_in_one_packet(service: Running) -> None:
    message, refused = CASES["npy"], CASES["no JSON"]
    whole = exchange(service, message)
    with connect(service) as connection, connection.makefile("rb") as stream:
        for together in (1, 1, 1, 2, 20, 1, 3, 1):
            connection.sendall(message * together + refused)
            assert [read(stream) for _ in range(together)] == [whole] * together
            assert read(stream)[0] == 422
    assert not service.lifespan.engine.jobs


def test_a_connection_that_is_not_kept_ends(service: Running) -> None:
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(CASES["npy"])
        assert read(stream)[0] == 200
        connection.sendall(CASES["closing"])
        status, headers, _ = read(stream)
        assert (status, headers[b"connection"]) == (200, b"close")
        assert stream.read() == b""


def test_both_paths_require_the_key(serve: Callable[..., Running]) -> None:
    service = serve(api_key="secret")
    for message in (CASES["npy"], on_asgi_path(CASES["npy"])):
        status, headers, body = exchange(service, message)
        assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
        assert json.loads(body)["instance"] == "urn:request:mine"
        allowed = message.replace(b"Host: reparam", b"Host: reparam\r\nAuthorization: Bearer secret")
        assert exchange(service, allowed)[0] == 200


def test_the_limit_of_a_body_holds_on_both_paths(serve: Callable[..., Running]) -> None:
    service = serve(max_body_bytes=100)
    message = named({"model": "x" * 100})
    fast, asgi = exchange(service, message), exchange(service, on_asgi_path(message))
    assert fast == asgi
    assert fast[0] == 413


def test_a_request_refused_by_its_head_need_not_send_its_body(serve: Callable[..., Running]) -> None:
    service = serve(max_body_bytes=1000)
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"POST /sample HTTP/1.1\r\nHost: reparam\r\nContent-Length: 5000\r\n\r\n")
        assert read(stream)[0] == 413
