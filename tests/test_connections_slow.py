"""Connections that wait: idle ones, slow heads, and clients that read slowly or not at all.

Sleeps are minimum times for connections that must last. Limits for connections that must not end are at least a second.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from reparam.service.wire import transport
from tests.conftest import Running, metric, wait_until
from tests.raw import HEAD_END, LIVEZ, connect, next_response, read_response, request, send

KEEP_ALIVE = 1  # seconds; uvicorn's default is 5
SHORT = request({"seed": 1, "n": 64})
LONG = request({"n": 60_000, "seed": 7})


@pytest.fixture
def hurried(serve: Callable[..., Running]) -> Running:
    """A server that closes idle connections after KEEP_ALIVE seconds."""
    service = serve(api_key=None)
    service.server.config.timeout_keep_alive = KEEP_ALIVE
    return service


def test_an_idle_connection_ends(hurried: Running) -> None:
    with connect(hurried) as idle:
        started = time.monotonic()
        for _ in range(2):
            idle.sendall(SHORT)
            assert read_response(idle)[0] == 200
        assert idle.recv(1) == b""
    assert time.monotonic() - started >= KEEP_ALIVE


def test_a_connection_in_the_middle_of_a_request_is_not_idle(hurried: Running) -> None:
    with connect(hurried) as idle, connect(hurried) as slow:
        for connection in (slow, idle):
            connection.sendall(SHORT)
            assert read_response(connection)[0] == 200
        slow.sendall(SHORT[:-1])
        assert idle.recv(1) == b""
        time.sleep(1.5 * KEEP_ALIVE)
        slow.sendall(SHORT[-1:])
        assert read_response(slow)[0] == 200


def test_a_request_that_began_before_the_last_response_is_not_idle(hurried: Running) -> None:
    """The connection has been kept alive for longer than an idle one."""
    with connect(hurried, receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        connection.sendall(request({"n": 300}) + LONG[:15])
        assert next_response(stream)[0] == 200
        connection.sendall(LONG[15:])
        time.sleep(1.5 * KEEP_ALIVE)
        status, body = next_response(stream)
    assert (status, len(body)) == (200, 128 + 60_000 * 64)


@pytest.mark.parametrize("second", [SHORT, LONG], ids=["fast path", "ASGI path"])
def test_a_refusal_does_not_end_the_request_behind_it(hurried: Running, second: bytes) -> None:
    """Both requests come in one packet, the second not yet whole."""
    with connect(hurried) as connection, connection.makefile("rb") as stream:
        connection.sendall(request({}).replace(b"{", b"[") + second[:-3])
        assert next_response(stream)[0] == 422
        time.sleep(1.5 * KEEP_ALIVE)
        connection.sendall(second[-3:])
        assert next_response(stream)[0] == 200


def test_a_body_that_comes_after_its_refusal_does_not_keep_the_connection(serve: Callable[..., Running]) -> None:
    service = serve(api_key="sesame")
    service.server.config.timeout_keep_alive = KEEP_ALIVE
    head, end, body = request({}).partition(HEAD_END)
    with connect(service) as connection:
        connection.sendall(head + end)
        assert read_response(connection)[0] == 401
        connection.sendall(body[:1])
        assert connection.recv(1) == b""


def test_a_head_that_does_not_come_in_time_ends_the_connection(serve: Callable[..., Running]) -> None:
    service, half = serve(request_timeout=2), LIVEZ[:20]
    with connect(service) as silent, connect(service) as slow, connect(service) as second, connect(service) as typing:
        for connection in (second, typing, typing):  # twice: the second head is equal to the first
            connection.sendall(SHORT)
            assert read_response(connection)[0] == 200
        for connection, begun in ((slow, half), (second, half), (typing, b"G")):
            connection.sendall(begun)
        for connection in (slow, second, typing):
            assert read_response(connection)[0] == 400
            assert connection.recv(1) == b""
        assert silent.recv(1) == b""


def test_a_head_that_the_service_does_not_read_has_time(serve: Callable[..., Running]) -> None:
    """The head waits behind a request behind a stream that its client reads late."""
    service = serve(request_timeout=2)
    with connect(service, receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        send(connection, request({"n": 150_000, "seed": 7}), LIVEZ + LIVEZ[:10])
        wait_until(lambda: any(each.pipeline for each in list(service.server.server_state.connections)))  # type: ignore[union-attr]  # Protocol has it
        connection.sendall(LIVEZ[10:])
        time.sleep(3)  # longer than a head may take
        assert [next_response(stream)[0] for _ in range(3)] == [200, 200, 200]


def test_an_unread_response_on_a_half_closed_connection_is_given_up(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALLED", 0.5)
    service = serve()
    for listener in service.server.servers[0].sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of the connections too
    with connect(service, receive_buffer=4096) as connection:
        connection.sendall(request({"n": 300, "seed": 1}))
        wait_until(lambda: metric(service.url, "requests_total", path="/sample", status="200"))
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: not service.server.server_state.connections)


def test_an_unread_response_is_held_for_a_while_and_does_not_expire(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALLED", 3.0)
    service = serve(request_timeout=2.5)
    admission = service.lifespan.engine.admission
    body: dict[str, Any] = {"n": 30_000, "seed": 1, "outputs": ["images", "latents"]}
    with connect(service, receive_buffer=4096) as connection:
        connection.sendall(request(body, accept="application/x-npz"))
        wait_until(lambda: admission.reserved_bytes > 10**7)
        wait_until(lambda: not admission.reserved_bytes)
    assert "reparam_expired_total{" not in service.get("/metrics").text


def test_a_client_that_reads_slowly_gets_its_response(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALLED", 1.5)
    with connect(serve(), receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        connection.sendall(request({"n": 100_000, "seed": 1}))
        for _ in range(12):  # longer than two STALLED
            time.sleep(0.3)
            assert len(stream.read(300_000)) == 300_000


@pytest.mark.parametrize("reads", [True, False])
def test_a_closed_connection_lasts_while_its_client_reads(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """The response is too short for the flow to be paused. Longer ones are watched by Flow."""
    monkeypatch.setattr(transport, "STALLED", 1.0)
    lost = asyncio.Event()

    class Protocol(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

    async def bytes_read() -> int:
        loop, (ours, theirs) = asyncio.get_running_loop(), socket.socketpair()
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            theirs.setblocking(False)
            cork = transport.Cork((await loop.create_connection(Protocol, sock=ours))[0], loop)
            cork.write(bytes(60_000))
            cork.close()
            count = 0
            while reads and (some := await loop.sock_recv(theirs, 4096)):
                count += len(some)
                await asyncio.sleep(0.15)
            await asyncio.wait_for(lost.wait(), 60)
            return count

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(bytes_read()) == (60_000 if reads else 0)
