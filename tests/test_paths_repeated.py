"""Requests whose heads repeat byte for byte on a connection, so that the fast path skips the parser."""

import random
import signal
from collections.abc import Callable

import pytest

from reparam.service.wire.protocol import Protocol
from tests.conftest import Running, metric, wait_until
from tests.raw import HEAD_END, LIVEZ, connect, request, send
from tests.test_paths import CASES, exchange, named, read


def seeds(*numbers: int) -> list[bytes]:
    """Write requests of one head and one size, with bodies that differ."""
    return [named({"seed": number}) for number in numbers]


def padded(n: int) -> bytes:
    """Write a request for n rows of the same head and size as for any other n below 10000."""
    return named({"seed": 1, "n": 1000}).replace(b"1000", b"%4d" % n)


def has_seen_a_head(service: Running) -> bool:
    """Tell whether a connection keeps the head of its last request."""
    connections = list(service.server.server_state.connections)
    return any(connection._seen is not None for connection in connections if isinstance(connection, Protocol))


def test_an_equal_head_gets_the_response_of_its_own_body(serve: Callable[..., Running]) -> None:
    service = serve()
    messages = seeds(1, 1, 2, 3, 1)
    alone = [exchange(service, message) for message in messages]
    with connect(service) as connection, connection.makefile("rb") as stream:
        for message, expected in zip(messages, alone, strict=True):
            connection.sendall(message)
            assert read(stream) == expected
        assert has_seen_a_head(service)
    assert metric(service.url, "requests_total", path="/sample", status="200") == 2 * len(messages)
    assert metric(service.url, "requests_in_flight") == 1


def test_requests_in_any_order_and_packets_get_the_responses_of_fresh_connections(service: Running) -> None:
    names = ["npy", "json", "chunked", "no JSON", "unknown model", "gumbel", "nan", "large", "media type", "coding"]
    messages = [*seeds(1, 1, 2), padded(9), padded(5000), *(CASES[name] for name in names), named({"seed": 10})]
    messages += [b"\r\n" + messages[0], messages[0].replace(b"POST", b"GET")]
    expected = {message: exchange(service, message) for message in messages}
    for number in range(15):
        chance = random.Random(number)
        usual = messages[: chance.choice([3, 5, len(messages)])]
        with connect(service) as connection, connection.makefile("rb") as stream:
            for _ in range(20):
                together = chance.choices(usual, k=chance.choice([1, 1, 1, 2, 3]))
                data = b"".join(together)
                cut = chance.randrange(1, len(data)) if chance.random() < 0.2 else len(data)
                send(connection, *filter(None, [data[:cut], data[cut:]]))
                assert [read(stream) for _ in together] == [expected[message] for message in together]


def test_line_breaks_around_a_body_move_no_byte_to_another_request(service: Running) -> None:
    head, end, body = named({"seed": 1}).replace(b"Content-Length: 11", b"Content-Length: 13").partition(HEAD_END)
    message = head + end + b"\r\n" + body
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(message + b"\r\n")
        assert read(stream)[0] == 200
        connection.sendall(message + b"GE")  # of the same size, with the beginning of GET
        assert read(stream)[0] == 200
        connection.sendall(LIVEZ.removeprefix(b"GE"))
        assert read(stream)[2] == b'{"status":"alive"}'


def test_each_request_has_its_own_request_id(service: Running) -> None:
    message, fresh = request({"seed": 1}), set()
    with connect(service) as connection, connection.makefile("rb") as stream:
        for _ in range(5):
            connection.sendall(message)
            fresh.add(read(stream)[1][b"x-request-id"])
        for name in (b"aaaa", b"aaaa", b"bbbb"):
            connection.sendall(message.replace(b"Host:", b"X-Request-ID: " + name + b"\r\nHost:"))
            assert read(stream)[1][b"x-request-id"] == name
    assert len(fresh) == 5


def test_a_head_that_differs_only_in_the_key_is_refused(serve: Callable[..., Running]) -> None:
    service = serve(api_key="secret")
    right, wrong = (named({"seed": 1}, Authorization=f"Bearer {key}") for key in ("secret", "secreT"))
    with connect(service) as connection, connection.makefile("rb") as stream:
        for message, status in ((wrong, 401), (right, 200), (right, 200), (wrong, 401), (right, 200), (wrong, 401)):
            connection.sendall(message)
            assert read(stream)[0] == status


@pytest.mark.parametrize("message", ["closing", "empty", "chunked", "large", "no JSON"])
def test_only_heads_of_whole_requests_with_a_body_are_kept(serve: Callable[..., Running], message: str) -> None:
    service = serve()
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(CASES[message])
        read(stream)
        assert has_seen_a_head(service) == (message == "no JSON")  # whose head is that of a good request
        if message != "closing":
            connection.sendall(CASES["npy"])
            assert read(stream) == exchange(service, CASES["npy"])


def test_an_equal_request_is_answered_during_the_drain_and_refused_after_it(serve: Callable[..., Running]) -> None:
    service = serve(drain_delay=3600)
    (message,) = seeds(1)
    loop = service.server.servers[0].get_loop()
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(message)
        expected = read(stream)
        loop.call_soon_threadsafe(service.server._end, signal.SIGTERM)
        wait_until(lambda: service.lifespan.state == "draining")
        connection.sendall(message)
        assert read(stream) == expected
        loop.call_soon_threadsafe(service.lifespan.stop)
        wait_until(lambda: service.lifespan.engine._closed)
        connection.sendall(message)
        status, headers, _ = read(stream)
        assert (status, headers[b"retry-after"]) == (503, b"1")


def test_an_equal_request_that_is_being_answered_ends_the_connection_of_a_server_that_ends(
    serve: Callable[..., Running],
) -> None:
    service = serve(drain_timeout=3600)
    (message,) = seeds(1)
    with connect(service) as connection, connection.makefile("rb") as stream:
        for _ in range(2):
            connection.sendall(message)
            assert read(stream)[0] == 200
        service.server.should_exit = True
        assert stream.read() == b""
