"""Clients that disconnect: their rows are dropped, other requests are not affected, and each disconnect is counted."""

import contextlib
import socket

from tests.conftest import Running, metric, wait_until
from tests.load import await_watch, bystanders, gate, is_at_rest, occupied
from tests.raw import connect, request, reset_on_close

STAGES = ("queue", "infer", "send")


def disconnects(service: Running, *stages: str) -> float:
    return sum(metric(service.url, "cancelled_total", stage=stage) for stage in stages)


def test_a_client_that_disconnects_before_its_batch_leaves_the_queue(engine: Running) -> None:
    with bystanders(engine), occupied(engine):
        with connect(engine) as hasty:
            hasty.sendall(request({"n": 500}))
            wait_until(lambda: engine.lifespan.engine.queued_rows >= 500)
        wait_until(lambda: engine.lifespan.engine.queued_rows < 500)
        assert disconnects(engine, "queue") == 1


def test_a_client_whose_body_came_slowly_leaves_the_queue_when_it_disconnects(engine: Running) -> None:
    """The job has waited for two looks of the deadlines before its rows are submitted."""
    with bystanders(engine), occupied(engine):
        with connect(engine) as hasty:
            content = request({"n": 500})
            hasty.sendall(content[:-5])
            await_watch(engine, None)
            hasty.sendall(content[-5:])
            wait_until(lambda: engine.lifespan.engine.queued_rows >= 500)
        wait_until(lambda: engine.lifespan.engine.queued_rows < 500)
        assert disconnects(engine, "queue") == 1


def test_a_disconnect_during_the_batch_is_counted_before_the_batch_ends(engine: Running) -> None:
    with bystanders(engine), gate() as held:
        with connect(engine) as hasty:
            hasty.sendall(request(held.body, path="/hold"))
            held.await_request()
        wait_until(lambda: disconnects(engine, "infer") == 1)


def test_a_disconnect_during_the_stream_is_counted_once(engine: Running) -> None:
    with bystanders(engine):
        with connect(engine, receive_buffer=4096) as hasty:
            hasty.sendall(request({"n": 150_000}))
            await_watch(engine, 150_000)
        wait_until(lambda: metric(engine.url, "requests_total", path="/sample", status="499"))
    assert metric(engine.url, "requests_total", path="/sample", status="499") == 1
    assert disconnects(engine, *STAGES) == 1


def test_many_clients_that_disconnect_together_are_all_counted(engine: Running) -> None:
    clients, others = 300, 2
    with bystanders(engine, others), occupied(engine), contextlib.ExitStack() as crowd:
        for _ in range(clients):
            connection = crowd.enter_context(connect(engine))
            reset_on_close(connection)
            connection.sendall(request({"n": 10}))
        wait_until(lambda: len(engine.lifespan.engine.jobs) == clients + others + 1)  # 1: the batch that runs
        crowd.close()
        wait_until(lambda: len(engine.lifespan.engine.jobs) == others + 1)
        assert engine.lifespan.engine.queued_rows <= 3 * others
        assert disconnects(engine, *STAGES) == clients
        assert metric(engine.url, "requests_total", path="/sample", status="499") == clients


def test_a_disconnect_before_the_body_is_whole_is_counted(engine: Running) -> None:
    with connect(engine) as half:
        half.sendall(request({})[:-1])
        wait_until(lambda: engine.lifespan.engine.jobs)
    wait_until(lambda: is_at_rest(engine))
    assert disconnects(engine, "body") == 1


def test_rows_of_a_buffered_response_are_dropped_when_the_client_disconnects(engine: Running) -> None:
    with gate(n=3000) as held:
        with connect(engine) as hasty:
            hasty.sendall(request(held.body, accept="application/json", path="/hold"))
            held.await_request()
        wait_until(lambda: engine.lifespan.recorder.in_flight == 0)
        held.is_open.set()
        wait_until(lambda: is_at_rest(engine))
        assert held.passages == 1
    assert disconnects(engine, "infer") == 1


def test_a_disconnect_while_the_response_is_encoded_is_counted(engine: Running) -> None:
    with gate("encode", n=32) as held:
        with connect(engine) as hasty:
            hasty.sendall(request(held.body, accept="application/json", path="/hold"))
            held.await_request()
        wait_until(lambda: any(job.error is not None for job in list(engine.lifespan.engine.jobs)))
        held.is_open.set()
        wait_until(lambda: is_at_rest(engine))
    assert disconnects(engine, "send") == 1
    assert metric(engine.url, "requests_total", path="/hold", status="499") == 1


def test_closing_one_half_of_the_connection_early_counts_as_a_disconnect(engine: Running) -> None:
    with gate() as held, connect(engine) as hasty:
        hasty.sendall(request(held.body, path="/hold"))
        held.await_request()
        hasty.shutdown(socket.SHUT_WR)
        wait_until(lambda: disconnects(engine, "infer") == 1)
