"""Limits on rows and bytes, and readers that hold back the computing."""

import contextlib
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from reparam.service.engine.engine import FORGETTING
from reparam.service.operations import OPERATIONS
from tests.conftest import Running, metric, wait_until
from tests.load import HOLD, NPY, gate, is_at_rest, occupied
from tests.problems import problem
from tests.raw import connect, read_response, request


def test_a_full_queue_refuses_with_a_time_to_come_back(serve: Callable[..., Running]) -> None:
    service = serve(max_queue_rows=4, max_batch_rows=1, runners=1, operations=(*OPERATIONS, HOLD), request_timeout=300)
    engine = service.lifespan.engine
    with ThreadPoolExecutor(2) as pool, occupied(service):
        waiting = [pool.submit(service.post, {"n": 3})]
        wait_until(lambda: engine.queued_rows == 3)
        waiting.append(pool.submit(service.post, {}))  # exactly as many rows as may wait
        wait_until(lambda: engine.queued_rows == 4)
        response = service.post({"n": 1})
    document = problem(response, "queue-full")
    assert int(response.headers["Retry-After"]) == document["retry_after"] == 1
    assert "4 rows wait already and the limit is 4: try again in 1 s" in document["detail"]
    assert {future.result().status_code for future in waiting} == {200}
    assert metric(service.url, "rejected_total", reason="rows") == 1


def test_retry_after_grows_with_the_measured_time_of_rows(serve: Callable[..., Running]) -> None:
    service = serve(max_queue_rows=100, runners=1, operations=(*OPERATIONS, HOLD), request_timeout=300)
    with ThreadPoolExecutor(1) as pool:
        with gate() as held:
            slow = pool.submit(service.post, held.body, path="/hold")
            held.await_request()
            time.sleep(0.5)
        (milliseconds,) = re.findall("infer;dur=([0-9.]+)", slow.result().headers["Server-Timing"])
        ahead = 100 * FORGETTING * float(milliseconds) / 1000  # the one batch so far had a single row
        with occupied(service):
            waiting = pool.submit(service.post, {"n": 100})
            wait_until(lambda: service.lifespan.engine.queued_rows == 100)
            document = problem(service.post({}), "queue-full")
        assert ahead >= 5
        assert document["retry_after"] == pytest.approx(ahead, abs=1)
        assert waiting.result().status_code == 200


def test_a_request_larger_than_the_queue_is_served_piece_by_piece(serve: Callable[..., Running]) -> None:
    service = serve(max_queue_rows=4, max_batch_rows=1)
    assert len(service.post({"n": 50}).json()["images"]) == 50


def test_a_client_that_reads_slowly_holds_back_the_computing(engine: Running) -> None:
    lifespan = engine.lifespan

    def rows_taken() -> int:
        """Wait until the only job waits for its client. Returns the rows computed so far."""
        (job,) = lifespan.engine.jobs
        ticket = job.ticket
        wait_until(lambda: 0 < ticket.taken == ticket.granted and not lifespan.engine.busy)
        return ticket.taken

    with connect(engine, receive_buffer=4096) as slow:
        slow.sendall(request({"n": 1_000_000}))
        slow.recv(200)
        before, taken = 0, rows_taken()
        while taken > before:  # until the sockets are full
            time.sleep(0.2)
            before, taken = taken, rows_taken()
        window = lifespan.engine.window(lifespan.repository.find("tiny-gaussian", None).sampler)
        assert taken < 3 * window + 4 * 2**20 / 64  # 4 MiB: what the sockets hold
        assert metric(engine.url, "rows_total", model="tiny-gaussian", version="1") < 500_000
        assert metric(engine.url, "held_bytes") > 0


def test_responses_are_bounded_in_bytes(serve: Callable[..., Running]) -> None:
    service = serve(max_held_bytes=100_000)
    with connect(service, receive_buffer=4096) as slow:
        slow.sendall(request({"n": 1_000_000}))
        slow.recv(1000)
        refused = service.post({"n": 100}, headers=NPY)
        assert "the limit is 100000" in problem(refused, "queue-full")["detail"]
        assert metric(service.url, "rejected_total", reason="bytes") == 1
    wait_until(lambda: is_at_rest(service))
    assert service.post({"n": 100}, headers=NPY).status_code == 200


def test_responses_that_are_not_read_take_little_memory(serve: Callable[..., Running]) -> None:
    """The service stops reading small requests of a connection whose client reads no response."""
    service = serve()
    message = request({"seed": 1, "n": 64})
    with connect(service, receive_buffer=4096) as connection:
        connection.settimeout(3)
        with pytest.raises(TimeoutError):
            connection.sendall(message * 100_000)
        counted = metric(service.url, "requests_total", path="/sample", status="200")
        assert counted * 64 * 64 < 16 * 2**20  # what the sockets hold, and a little more
    wait_until(lambda: not service.lifespan.engine.jobs)


def test_bodies_that_never_end_leave_room_for_others(serve: Callable[..., Running]) -> None:
    service = serve(max_held_bytes=600_000)
    admission = service.lifespan.engine.admission
    begun = request({}).replace(b"Content-Length: 2", b"Content-Length: 100000")[:-2] + b"{".ljust(80_000)
    with contextlib.ExitStack() as uploads:
        for _ in range(3):
            uploads.enter_context(connect(service)).sendall(begun)
        wait_until(lambda: admission.reserved_bytes == 3 * 80_000)
        one_more = uploads.enter_context(connect(service))
        one_more.sendall(begun)
        status, body = read_response(one_more)
        assert (status, json.loads(body)["type"]) == (429, "/problems/queue-full")
        assert "bytes and the limit is 300000: try again" in json.loads(body)["detail"]
        assert metric(service.url, "rejected_total", reason="incoming") == 1
        assert service.post({"n": 10}).status_code == 200
    wait_until(lambda: admission.reserved_bytes == admission.incoming_bytes == 0)


def test_a_body_counts_as_held_while_it_comes(serve: Callable[..., Running]) -> None:
    service = serve(max_held_bytes=600_000)
    whole = request({"mu": [0.0, 0.0, 0.0], "model": "tiny-gaussian"}).replace(b"{", b"{".ljust(700_000))
    whole = whole.replace(b"Content-Length: ", b"Content-Length: 700000\r\nX-Before: ")
    with connect(service) as connection:
        connection.sendall(whole[:650_000])
        wait_until(lambda: service.lifespan.engine.admission.reserved_bytes > 600_000)  # more than the limit, alone
        assert "the requests being answered hold 6" in problem(service.post({}), "queue-full")["detail"]
    wait_until(lambda: service.lifespan.engine.admission.reserved_bytes == 0)
    assert service.post({}).status_code == 200
