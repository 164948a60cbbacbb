"""What comes over a connection besides requests as they should be."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from reparam.service.wire import protocol, transport
from tests.conftest import Running, metric, wait_until
from tests.graphs import SLOW
from tests.raw import answer, connect, leave_by_reset, next_answer, request, send

BODY = {"n": 2, "seed": 7}
LIVE = b"GET /livez HTTP/1.1\r\nHost: reparam\r\n\r\n"


def ask(service: Running, *pieces: bytes) -> tuple[int, bytes]:
    """The first answer to these, which are sent one after the other."""
    with connect(service) as connection:
        send(connection, *pieces)
        return answer(connection)


@pytest.mark.parametrize("wanted", ["h2c", "websocket", "TLS/1.2"])
def test_an_upgrade_is_ignored(service: Running, wanted: str) -> None:
    plain = ask(service, request(BODY))
    asking = request(BODY, Connection="Upgrade, HTTP2-Settings", Upgrade=wanted, HTTP2_Settings="AAMAAABk")
    assert ask(service, asking) == plain
    assert ask(service, *[asking[at : at + 50] for at in range(0, len(asking), 50)]) == plain
    head, body = asking.split(b"\r\n\r\n")
    chunked = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    assert ask(service, chunked + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)) == plain
    with connect(service) as connection, connection.makefile("rb") as stream:  # and another request behind it
        connection.sendall(asking + asking.replace(b"Host:", b"Connection: close\r\nHost:"))
        assert stream.read().count(plain[1]) == 2


@pytest.mark.parametrize("asks", [{"Connection": "close"}, {"Connection": "close, Upgrade", "Upgrade": "h2c"}])
def test_what_follows_the_last_request_does_not_hurt_its_answer(service: Running, asks: dict[str, str]) -> None:
    many = {"n": 3000, "seed": 7}  # which are computed while the rest is read
    plain = ask(service, request(many))
    with connect(service) as connection, connection.makefile("rb") as stream:
        connection.sendall(request(many, **asks) + b"GET /livez HTTP/1.1\r\n\r\n")
        said = stream.read()
    assert said.startswith(b"HTTP/1.1 200")
    assert said.endswith(plain[1])


STREAM = {"n": 500_000, "seed": 7}
BROKEN = request({}).replace(b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n")
BEHIND = [b"", request(BODY), LIVE * 2]


@pytest.mark.parametrize("behind", BEHIND, ids=["nothing", "a short one", "two others"])
def test_a_client_that_leaves_a_stream_with_requests_behind_it_is_noticed(
    serve: Callable[..., Running], behind: bytes
) -> None:
    service = serve()
    with connect(service, receive_buffer=4096) as hasty:
        leave_by_reset(hasty)
        hasty.sendall(request(STREAM))
        hasty.recv(1000)
        hasty.sendall(behind)
        time.sleep(0.1)  # it is read
    wait_until(lambda: not service.lifespan.engine.jobs)
    assert sum(metric(service.url, "cancelled_total", stage=stage) for stage in ("queue", "infer")) == 1
    assert metric(service.url, "requests_total", path="/sample", status="499") == 1
    assert metric(service.url, "rows_total", model="tiny-gaussian", version="1") < STREAM["n"]


@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["at once", "later"])
@pytest.mark.parametrize("first", [BODY, STREAM, {"model": "trouble", "temperature": SLOW + 20}])
@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", BROKEN], ids=["head", "chunk"])
def test_nonsense_is_refused_after_the_answers_before_it(
    service: Running, first: dict[str, Any], nonsense: bytes, pause: float
) -> None:
    asking = request({**first, "seed": 7})
    whole = ask(service, asking)
    with connect(service, receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        send(connection, asking, request(BODY)[:20])
        time.sleep(pause)  # the first may be answered meanwhile
        connection.sendall(request(BODY)[20:] + nonsense + b"more of it")
        assert next_answer(stream) == whole
        assert next_answer(stream)[0] == 200
        status, body = next_answer(stream)
        assert (status, json.loads(body)["type"]) == (400, "/problems/malformed-request")
        assert stream.read() == b""
    wait_until(lambda: not service.lifespan.recorder.in_flight)


def test_what_follows_nonsense_does_not_reset_the_connection(service: Running) -> None:
    """A socket that is closed before all is read takes with it what its client has not fetched."""
    many = request({"n": 50_000, "seed": 7})
    with connect(service, receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        send(connection, many, LIVE + b"nonsense\r\n\r\n" + b"x" * 100_000)
        time.sleep(0.5)  # all is written
        status, body = next_answer(stream)
        assert (status, len(body)) == (200, 128 + 50_000 * 64)
        assert [next_answer(stream)[0] for _ in range(2)] == [200, 400]


def test_a_chunk_that_is_none_counts_as_one_request(serve: Callable[..., Running]) -> None:
    service = serve()
    assert ask(service, BROKEN)[0] == 400
    assert metric(service.url, "requests_total", path="other", status="400") == 1
    assert metric(service.url, "requests_total", path="/sample", status="499") == 0


def test_a_request_that_began_before_the_last_answer_is_not_idle(service: Running) -> None:
    """Its connection has been kept alive for longer than one that is."""
    many = request({"n": 300_000, "seed": 7})
    with connect(service, receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        connection.sendall(request({"n": 300}) + many[:15])
        assert next_answer(stream)[0] == 200
        connection.sendall(many[15:])
        time.sleep(6)  # an idle connection would end after 5
        status, body = next_answer(stream)
    assert (status, len(body)) == (200, 128 + 300_000 * 64)


def test_a_head_that_the_service_does_not_read_has_time(serve: Callable[..., Running]) -> None:
    """Behind a request that waits for a stream, which its reader does not hurry to take."""
    with connect(serve(request_timeout=0.5), receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        connection.sendall(request(STREAM))
        connection.sendall(LIVE + LIVE[:10])
        time.sleep(0.1)  # or it is read together
        connection.sendall(LIVE[10:])
        time.sleep(1)  # twice the time that a head has
        assert [next_answer(stream)[0] for _ in range(3)] == [200, 200, 200]


def test_an_answer_that_is_not_taken_after_half_a_goodbye_is_given_up(
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
)
def test_what_is_no_request_is_told_so(service: Running, nonsense: bytes) -> None:
    with connect(service) as connection:
        connection.sendall(nonsense)
        status, body = answer(connection)
    assert (status, json.loads(body)["type"]) == (400, "/problems/malformed-request")
    assert "callback" not in json.loads(body)["detail"]


def test_a_head_without_end_is_refused(service: Running) -> None:
    line = b"X-More: " + b"a" * 1000 + b"\r\n"
    with connect(service) as connection:
        connection.sendall(b"POST /sample HTTP/1.1\r\n")
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            connection.sendall(line * (40 * protocol.MAX_FRAMING // len(line)))
    many = request(BODY).replace(b"Host:", line * (protocol.MAX_FRAMING // len(line) // 4) + b"Host:")
    assert ask(service, many)[0] == 200


@pytest.mark.parametrize("path", [b"/sample", b"/models"])
@pytest.mark.parametrize("begun", [b"0\r\n", b"1\r\n{\r\n5;"])
def test_a_trailer_or_the_size_of_a_chunk_without_end_is_refused(service: Running, path: bytes, begun: bytes) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: reparam\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    with connect(service) as connection:
        connection.sendall(head + begun)
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            connection.sendall(b"X-More: ".ljust(40 * protocol.MAX_FRAMING, b"a"))


@pytest.mark.parametrize("path", [b"/sample", b"/models"])
def test_a_trailer_that_is_too_long_is_told_so(service: Running, path: bytes) -> None:
    """Also when the request went the long way, which waits for the end of the body."""
    with connect(service) as connection:
        connection.sendall(b"POST %b HTTP/1.1\r\nHost: reparam\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" % path)
        if path == b"/sample":
            wait_until(lambda: any(not job.has_started for job in service.lifespan.engine.jobs))
            connection.sendall(b"X-More: ".ljust(protocol.MAX_FRAMING + 1, b"a"))
            assert answer(connection)[0] == 400
        else:
            assert answer(connection)[0] == 405


def test_bodies_that_never_end_leave_room_for_others(serve: Callable[..., Running]) -> None:
    service = serve(max_held_bytes=600_000)
    engine = service.lifespan.engine
    begun = request({}).replace(b"Content-Length: 2", b"Content-Length: 100000")[:-2] + b"{".ljust(80_000)
    with contextlib.ExitStack() as uploads:
        for _ in range(3):
            uploads.enter_context(connect(service)).sendall(begun)
        wait_until(lambda: engine.admission.reserved_bytes == 3 * 80_000)
        one_more = uploads.enter_context(connect(service))
        one_more.sendall(begun)
        status, body = answer(one_more)
        assert (status, json.loads(body)["type"]) == (429, "/problems/queue-full")
        assert "bytes and the limit is 300000: try again" in json.loads(body)["detail"]
        assert metric(service.url, "rejected_total", reason="incoming") == 1
        assert service.post({"n": 10}).status_code == 200
    wait_until(lambda: engine.admission.reserved_bytes == engine.admission.incoming_bytes == 0)


def test_a_body_counts_as_held_while_it_comes(serve: Callable[..., Running]) -> None:
    service = serve(max_held_bytes=600_000)
    whole = request({"mu": [0.0, 0.0, 0.0], "model": "tiny-gaussian"}).replace(b"{", b"{".ljust(700_000))
    whole = whole.replace(b"Content-Length: ", b"Content-Length: 700000\r\nX-Before: ")
    with connect(service) as connection:
        connection.sendall(whole[:650_000])
        wait_until(lambda: service.lifespan.engine.admission.reserved_bytes > 600_000)  # alone it may
        refused = service.post({})
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/queue-full")
        assert "the requests being answered hold 6" in refused.json()["detail"]
    wait_until(lambda: service.lifespan.engine.admission.reserved_bytes == 0)
    assert service.post({}).status_code == 200


@pytest.mark.parametrize("begun", [b"", b"GET /livez HTTP/1.1\r\nHost:"])
def test_a_head_that_does_not_come_is_not_waited_for(serve: Callable[..., Running], begun: bytes) -> None:
    service = serve(request_timeout=0.3)
    with connect(service) as connection:
        connection.sendall(begun)
        if begun:
            assert answer(connection)[0] == 400
        assert connection.recv(1) == b""  # hung up
    with connect(service) as connection:  # nor a second one
        connection.sendall(request(BODY))
        assert answer(connection)[0] == 200
        connection.sendall(begun or b"G")
        assert answer(connection)[0] == 400


def test_what_comes_of_a_body_after_its_answer_does_not_keep_the_connection(serve: Callable[..., Running]) -> None:
    head, end, body = request(BODY).partition(b"\r\n\r\n")
    with connect(serve(api_key="sesame")) as connection:
        connection.sendall(head + end)
        assert answer(connection)[0] == 401
        connection.sendall(body[:1])
        assert connection.recv(1) == b""  # hung up, as if it had not come


def test_trailers_are_no_headers(serve: Callable[..., Running]) -> None:
    service = serve(api_key="sesame")
    head, body = request(BODY).split(b"\r\n\r\n")
    head = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    late = b"%b\r\n\r\n%x\r\n%b\r\n0\r\nAuthorization: Bearer sesame\r\n\r\n" % (head, len(body), body)
    assert ask(service, late)[0] == 401
    assert ask(service, late[:-30], late[-30:])[0] == 401


@pytest.mark.parametrize(("key", "status"), [("bearer sesame", 200), ("BEARER sesame", 200), ("Basic sesame", 401)])
def test_the_scheme_of_the_key_has_no_case(serve: Callable[..., Running], key: str, status: int) -> None:
    assert ask(serve(api_key="sesame"), request(BODY, Authorization=key))[0] == status


@pytest.mark.parametrize("second", ["text/html", "application/x-npy;q=0.1"])
def test_headers_of_one_name_are_one_list(service: Running, second: str) -> None:
    """The same as with one header, on either way."""
    one = ask(service, request({**BODY, "n": 1}, accept=f"image/png, {second}"))
    asking = request({**BODY, "n": 1}, accept="image/png").replace(b"Host:", b"ACCEPT: %b\r\nHost:" % second.encode())
    assert one[0] == 200
    assert ask(service, asking) == one == ask(service, asking.replace(b"/sample ", b"/sample? "))


def test_a_client_that_takes_nothing_of_its_answer_holds_it_for_a_while(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALLED", 0.5)
    service = serve(request_timeout=0.4)
    engine = service.lifespan.engine
    body: dict[str, Any] = {"n": 30_000, "seed": 1, "outputs": ["images", "latents"]}
    with connect(service, receive_buffer=4096) as connection:
        connection.sendall(request(body, accept="application/x-npz"))
        wait_until(lambda: engine.admission.reserved_bytes > 10**7)
        wait_until(lambda: not engine.admission.reserved_bytes)
    assert 'expired_total{stage="send"' not in service.get("/metrics").text


def test_a_client_that_reads_slowly_gets_its_answer(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALLED", 0.3)
    with connect(serve(), receive_buffer=4096) as connection, connection.makefile("rb") as stream:
        connection.sendall(request({"n": 100_000, "seed": 1}))
        for _ in range(12):
            time.sleep(0.1)  # slow, but sooner than STALLED
            assert len(stream.read(300_000)) == 300_000


@pytest.mark.parametrize("takes", [True, False])
def test_a_closed_connection_lasts_while_its_client_takes_something(
    monkeypatch: pytest.MonkeyPatch, takes: bool
) -> None:
    """Of an answer that is too short for the flow to be paused, which is watched elsewhere."""
    monkeypatch.setattr(transport, "STALLED", 0.3)
    lost = asyncio.Event()

    class Protocol(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

    async def taken() -> int:
        loop, (ours, theirs) = asyncio.get_running_loop(), socket.socketpair()
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            theirs.setblocking(False)
            cork = transport.Cork((await loop.create_connection(Protocol, sock=ours))[0], loop)
            cork.write(bytes(60_000))
            cork.close()
            count = 0
            while takes and (some := await loop.sock_recv(theirs, 4096)):
                count += len(some)
                await asyncio.sleep(0.05)
            await asyncio.wait_for(lost.wait(), 10)
            return count

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(taken()) == (60_000 if takes else 0)
