"""Input of a connection besides well-formed requests: upgrades, pipelined and malformed input, trailers."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from reparam.service.wire import protocol
from tests.conftest import Running, metric, wait_until
from tests.graphs import SLOW
from tests.load import await_watch
from tests.raw import (
    HEAD_END,
    LIVEZ,
    connect,
    exchange,
    next_response,
    read_response,
    request,
    reset_on_close,
    send,
)

BODY = {"n": 2, "seed": 7}
STREAM = {"n": 150_000, "seed": 7}  # more bytes than sockets and service take before the client reads
BROKEN = request({}).replace(b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n")
MALFORMED = (400, "/problems/malformed-request")


def chunked(message: bytes) -> tuple[bytes, bytes]:
    """Return the head of the same request with a chunked body, and its first chunk."""
    head, _, body = message.partition(HEAD_END)
    head = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    return head + HEAD_END, b"%x\r\n%b\r\n" % (len(body), body)


@pytest.mark.parametrize("wanted", ["h2c", "websocket", "TLS/1.2"])
def test_an_upgrade_is_ignored(service: Running, wanted: str) -> None:
    plain = exchange(service, request(BODY))
    upgrade = request(BODY, Connection="Upgrade, HTTP2-Settings", Upgrade=wanted, HTTP2_Settings="AAMAAABk")
    assert exchange(service, upgrade) == plain
    assert exchange(service, *[upgrade[at : at + 50] for at in range(0, len(upgrade), 50)]) == plain
    assert exchange(service, b"".join([*chunked(upgrade), b"0\r\n\r\n"])) == plain
    with connect(service) as connection, connection.makefile("rb") as stream:  # and another request behind it
        connection.sendall(upgrade + upgrade.replace(b"Host:", b"Connection: close\r\nHost:"))
        assert stream.read().count(plain[1]) == 2


@pytest.mark.parametrize("headers", [{"Connection": "close"}, {"Connection": "close, Upgrade", "Upgrade": "h2c"}])
def test_input_behind_the_last_request_does_not_damage_its_response(service: Running, headers: dict[str, str]) -> None:
    many = {"n": 3000, "seed": 7}  # computed while the rest is read
    plain = exchange(service, request(many))
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(request(many, **headers) + LIVEZ)
        received = stream.read()
    assert received.startswith(b"HTTP/1.1 200")
    assert received.endswith(plain[1])


@pytest.mark.parametrize("behind", [b"", request(BODY), LIVEZ * 2], ids=["nothing", "one request", "two requests"])
def test_a_disconnect_during_a_stream_with_requests_behind_is_noticed(
    serve: Callable[..., Running], behind: bytes
) -> None:
    service = serve()
    with connect(service, receive_buffer=4096) as hasty:
        reset_on_close(hasty)
        hasty.sendall(request(STREAM))
        hasty.recv(1000)
        await_watch(service, STREAM["n"])
        hasty.sendall(behind)
        if behind:
            wait_until(lambda: any(each.pipeline for each in list(service.server.server_state.connections)))  # type: ignore[union-attr]  # Protocol has it
    wait_until(lambda: not service.lifespan.engine.jobs)
    assert sum(metric(service.url, "cancelled_total", stage=stage) for stage in ("queue", "infer")) == 1
    assert metric(service.url, "requests_total", path="/sample", status="499") == 1
    assert metric(service.url, "rows_total", model="tiny-gaussian", version="1") < STREAM["n"]


@pytest.mark.parametrize("first", [BODY, STREAM, {"model": "trouble", "temperature": SLOW + 10}])
@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", BROKEN], ids=["head", "chunk"])
def test_malformed_input_is_refused_after_the_responses_before_it(
    service: Running, first: dict[str, Any], nonsense: bytes
) -> None:
    message, second = request({**first, "seed": 7}), request(BODY)
    whole = exchange(service, message)
    for wait in (False, True):  # for the first response to begin
        with connect(service, receive_buffer=4096) as connection, connection.makefile("rb") as stream:
            send(connection, message, second[:20])
            if wait:
                stream.peek(1)
            connection.sendall(second[20:] + nonsense + b"more of it")
            assert next_response(stream) == whole
            assert next_response(stream)[0] == 200
            status, body = next_response(stream)
            assert (status, json.loads(body)["type"]) == MALFORMED
            assert stream.read() == b""
    wait_until(lambda: not service.lifespan.recorder.in_flight)


def test_input_behind_malformed_input_does_not_reset_the_connection(serve: Callable[..., Running]) -> None:
    """Closing a socket before all input is read would destroy what its client has not read."""
    service = serve()
    many = request({"n": 50_000, "seed": 7})
    with connect(service, receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        send(connection, many, LIVEZ + b"nonsense\r\n\r\n" + b"x" * 100_000)
        status, body = next_response(stream)
        assert (status, len(body)) == (200, 128 + 50_000 * 64)
        wait_until(lambda: metric(service.url, "requests_total", path="other", status="400"))  # all is written
        assert [next_response(stream)[0] for _ in range(2)] == [200, 400]


def test_a_broken_chunk_counts_as_one_request(serve: Callable[..., Running]) -> None:
    service = serve()
    assert exchange(service, BROKEN)[0] == 400
    assert metric(service.url, "requests_total", path="other", status="400") == 1
    assert metric(service.url, "requests_total", path="/sample", status="499") == 0


@pytest.mark.parametrize(
    "nonsense",
    [
        b"CONNECT example.com:80 HTTP/1.1\r\nHost: example.com\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /%b HTTP/1.1\r\nHost: reparam\r\n\r\n" % (b"a" * 100_000),
        b"GET http://reparam HTTP/1.1\r\nHost: reparam\r\n\r\n",
        b"GET http://reparam?n=1 HTTP/1.1\r\nHost: reparam\r\n\r\n",
        b"POST /sample HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    ],
    ids=["CONNECT", "nonsense", "HTTP/2", "long path", "no path", "no path but a query", "two lengths"],
)
def test_malformed_input_gets_a_problem_document(service: Running, nonsense: bytes) -> None:
    status, body = exchange(service, nonsense)
    assert (status, json.loads(body)["type"]) == MALFORMED
    assert "callback" not in json.loads(body)["detail"]


def test_a_head_without_end_is_refused(service: Running) -> None:
    line = b"X-More: " + b"a" * 1000 + b"\r\n"
    with connect(service) as connection:
        connection.sendall(b"POST /sample HTTP/1.1\r\n")
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            connection.sendall(line * (40 * protocol.MAX_FRAMING // len(line)))
    many = request(BODY).replace(b"Host:", line * (protocol.MAX_FRAMING // len(line) // 4) + b"Host:")
    assert exchange(service, many)[0] == 200


@pytest.mark.parametrize("path", [b"/sample", b"/models"])
@pytest.mark.parametrize("begun", [b"0\r\n", b"1\r\n{\r\n5;"], ids=["trailer", "size"])
def test_a_trailer_or_the_size_of_a_chunk_without_end_is_refused(service: Running, path: bytes, begun: bytes) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: reparam\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    with connect(service) as connection:
        connection.sendall(head + begun)
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            connection.sendall(b"X-More: ".ljust(40 * protocol.MAX_FRAMING, b"a"))


def test_a_trailer_that_is_too_long_is_refused_on_the_asgi_path(service: Running) -> None:
    head = b"POST /sample HTTP/1.1\r\nHost: reparam\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    with connect(service) as connection:
        connection.sendall(head)
        wait_until(lambda: any(not job.has_started for job in list(service.lifespan.engine.jobs)))
        connection.sendall(b"X-More: ".ljust(protocol.MAX_FRAMING + 1, b"a"))
        assert read_response(connection)[0] == 400
    assert exchange(service, head.replace(b"/sample", b"/models"))[0] == 405  # which needs no body


def test_trailers_are_no_headers(serve: Callable[..., Running]) -> None:
    service = serve(api_key="sesame")
    late = b"".join([*chunked(request(BODY)), b"0\r\nAuthorization: Bearer sesame\r\n\r\n"])
    assert exchange(service, late)[0] == 401
    assert exchange(service, late[:-30], late[-30:])[0] == 401


@pytest.mark.parametrize(("key", "status"), [("bearer sesame", 200), ("BEARER sesame", 200), ("Basic sesame", 401)])
def test_the_scheme_of_the_key_has_no_case(serve: Callable[..., Running], key: str, status: int) -> None:
    assert exchange(serve(api_key="sesame"), request(BODY, Authorization=key))[0] == status


@pytest.mark.parametrize("second", ["text/html", "application/x-npy;q=0.1"])
def test_headers_of_one_name_are_one_list_on_both_paths(service: Running, second: str) -> None:
    body = {**BODY, "n": 1}
    one = exchange(service, request(body, accept=f"image/png, {second}"))
    two = request(body, accept="image/png").replace(b"Host:", b"ACCEPT: %b\r\nHost:" % second.encode())
    assert one[0] == 200
    assert exchange(service, two) == one == exchange(service, two.replace(b"/sample ", b"/sample? "))
