"""The two ways of `POST /sample`, the short one and the one through ASGI: nobody can tell which was taken."""

import json
import time
from io import BufferedReader
from typing import Any

import pytest

from tests.conftest import Running, metric, wait_until
from tests.graphs import FAILS, NAN
from tests.raw import connect, request, send

Answer = tuple[int, dict[bytes, bytes], bytes]
THEIR_OWN = {b"date", b"server-timing"}


def read(stream: BufferedReader) -> Answer:
    """The next answer, without what differs from one to the next."""
    status = int(stream.readline().split()[1])
    headers = {}
    while (line := stream.readline().rstrip(b"\r\n")) != b"":
        name, _, value = line.partition(b": ")
        headers[name] = value
    body = stream.read(int(headers[b"content-length"]))
    return status, {name: value for name, value in headers.items() if name not in THEIR_OWN}, body


def ask(service: Running, *pieces: bytes) -> Answer:
    with connect(service) as connection, connection.makefile("rb") as stream:
        send(connection, *pieces)
        return read(stream)


def by_the_long_way(message: bytes) -> bytes:
    """A query keeps a request from the short one."""
    return message.replace(b"POST /sample HTTP/1.1", b"POST /sample? HTTP/1.1")


def numbered(body: Any, accept: str = "application/x-npy", **headers: str) -> bytes:
    return request(body, accept, X_Request_Id="mine", **headers)


CASES = {
    "npy": numbered({"seed": 1}),
    "json": numbered({"seed": 1, "n": 3, "outputs": ["images", "latents"]}, "application/json"),
    "png": numbered({"seed": 1, "n": 4}, "image/png"),
    "npz": numbered({"seed": 1, "n": 2, "outputs": ["images", "latents"]}, "application/x-npz"),
    "gumbel": numbered({"model": "tiny-gumbel", "seed": 2, "outputs": ["indices"]}),
    "empty": b"POST /sample HTTP/1.1\r\nHost: reparam\r\nX-Request-Id: mine\r\nContent-Length: 0\r\n\r\n",
    "chunked": numbered({"seed": 1}).replace(b"Content-Length: 11", b"Transfer-Encoding: chunked").replace(
        b"\r\n\r\n", b"\r\n\r\nb\r\n") + b"\r\n0\r\n\r\n",
    "closing": numbered({"seed": 1}, Connection="close"),
    "no JSON": numbered({"seed": 1}).replace(b"{", b"["),
    "unknown field": numbered({"sed": 1}),
    "unknown model": numbered({"model": "absent"}),
    "negative": numbered({"n": -1}),
    "not acceptable": numbered({"outputs": ["images", "latents"]}, "image/png"),
    "media type": numbered({}, Content_Encoding="gzip"),
    "coding": numbered({}, Transfer_Encoding="gzip, chunked").replace(b"Content-Length: 2\r\n", b"").replace(
        b"{}", b"2\r\n{}\r\n0\r\n\r\n"),
    "timeout": numbered({}, Request_Timeout="soon"),
    "expired": numbered({}, Request_Timeout="0.000001"),
    "fails": numbered({"model": "trouble", "temperature": FAILS, "seed": 1}),
    "nan": numbered({"model": "trouble", "temperature": NAN}),
    "large": numbered({"seed": 1, "n": 5000}),
    "large body": numbered({"seed": 1, "mu": [[0.0] * 8] * 2000, "n": 2000}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_answer_does_not_depend_on_the_way(service: Running, case: str) -> None:
    message = CASES[case]
    short, long = ask(service, message), ask(service, by_the_long_way(message))
    if case == "empty":  # a seed of its own each time
        assert short[0] == long[0] == 200
        assert set(short[1]) == set(long[1])
    else:
        assert short == long
    assert short[1][b"x-request-id"] == b"mine"
    if case in ("coding", "media type"):
        assert short[0] == 415


def test_an_answer_does_not_depend_on_how_the_request_arrives(service: Running) -> None:
    message = CASES["npy"]
    whole = ask(service, message)
    middle = message.index(b"\r\n\r\n") + 4
    for cut in (10, middle - 2, middle, middle + 3, len(message) - 1):
        assert ask(service, message[:cut], message[cut:]) == whole
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(message[:-1])
        time.sleep(0.3)  # longer than the short way has patience
        connection.sendall(message[-1:])
        assert read(stream) == whole


def test_answers_come_in_the_order_of_the_questions(service: Running) -> None:
    live = b"GET /livez HTTP/1.1\r\nHost: reparam\r\n\r\n"
    large = numbered({"seed": 3, "n": 3000})
    messages = [CASES["npy"], large, CASES["json"], live, CASES["negative"], CASES["npy"], CASES["json"], large]
    alone = [ask(service, message) for message in messages]
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"".join(messages))
        for message, (status, headers, body) in zip(messages, alone, strict=True):
            together = read(stream)
            assert together[0] == status
            if message != live:
                assert together == (status, headers, body)


def test_a_lone_request_is_answered_as_one_that_comes_with_others(service: Running) -> None:
    """The first few come one by one, and those after them in one packet: in the same turn of the loop."""
    message, refused = CASES["npy"], CASES["no JSON"]
    whole = ask(service, message)
    with connect(service) as connection, connection.makefile("rb") as stream:
        for together in (1, 1, 1, 2, 20, 1, 3, 1):
            connection.sendall(message * together + refused)
            assert [read(stream) for _ in range(together)] == [whole] * together
            assert read(stream)[0] == 422
    assert not service.lifespan.engine.jobs


def test_a_connection_that_is_not_kept_ends(service: Running) -> None:
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(CASES["closing"])
        status, headers, _ = read(stream)
        assert (status, headers[b"connection"]) == (200, b"close")
        assert stream.read() == b""


def test_an_idle_connection_ends_but_not_one_that_is_in_the_middle_of_a_request(service: Running) -> None:
    message = CASES["npy"]
    with connect(service) as idle, connect(service) as slow:
        for connection in (idle, slow):
            connection.sendall(message)
            assert read(connection.makefile("rb"))[0] == 200
        idle_since = time.monotonic()
        time.sleep(1)
        slow.sendall(message[:-1])
        assert idle.recv(1) == b""
        assert 4 < time.monotonic() - idle_since < 8
        time.sleep(1.5)
        slow.sendall(message[-1:])
        assert read(slow.makefile("rb"))[0] == 200


def test_a_key_is_asked_for_on_both_ways(serve: Any) -> None:
    service: Running = serve(api_key="secret")
    for message in (CASES["npy"], by_the_long_way(CASES["npy"])):
        status, headers, body = ask(service, message)
        assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
        assert json.loads(body)["instance"] == "urn:request:mine"
        allowed = message.replace(b"Host: reparam", b"Host: reparam\r\nAuthorization: Bearer secret")
        assert ask(service, allowed)[0] == 200


def test_answers_that_nobody_reads_take_little_memory(serve: Any) -> None:
    """Thousands of small requests on one connection: the service stops reading them."""
    service: Running = serve()
    message = numbered({"seed": 1, "n": 64})
    with connect(service, receive_buffer=4096) as connection:
        connection.settimeout(3)
        with pytest.raises(TimeoutError):
            connection.sendall(message * 100_000)
        counted = metric(service.url, "requests_total", path="/sample", status="200")
        assert counted * 64 * 64 < 16 * 2**20  # what the sockets hold, and a little more
    wait_until(lambda: not service.lifespan.engine.jobs)


@pytest.mark.parametrize("second", [numbered({"seed": 1, "n": 64}), CASES["large"]], ids=["short", "long"])
def test_a_refusal_does_not_end_the_request_behind_it(service: Running, second: bytes) -> None:
    """Both come in one packet, the second not yet whole; the connection is not idle."""
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(CASES["no JSON"] + second[:-3])
        assert read(stream)[0] == 422
        time.sleep(5.5)
        connection.sendall(second[-3:])
        assert read(stream)[0] == 200


def test_the_limit_of_a_body_holds_on_both_ways(serve: Any) -> None:
    service: Running = serve(max_body_bytes=100)
    message = numbered({"model": "x" * 100})
    answers = [ask(service, message), ask(service, by_the_long_way(message))]
    assert answers[0] == answers[1]
    assert answers[0][0] == 413


def test_what_is_refused_by_its_head_need_not_send_its_body(serve: Any) -> None:
    service: Running = serve(max_body_bytes=1000)
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"POST /sample HTTP/1.1\r\nHost: reparam\r\nContent-Length: 5000\r\n\r\n")
        assert read(stream)[0] == 413
