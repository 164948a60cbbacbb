"""Deadlines of requests: in every stage, and from the header `Request-Timeout` or the settings.

Timeouts that must not pass early are at least two seconds, a hundred times what the stage takes.
"""

import io
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reparam.service.operations import OPERATIONS
from tests.conftest import Running, metric
from tests.load import HOLD, bystanders, gate, occupied
from tests.problems import problem
from tests.raw import HEAD_END, connect, exchange, read_response, request


def expired(service: Running, stage: str) -> float:
    return metric(service.url, "expired_total", stage=stage)


def test_a_body_that_does_not_end_in_time_expires(engine: Running) -> None:
    with bystanders(engine), connect(engine) as slow:
        head, _, body = request({"n": 2}, Request_Timeout="0.4").partition(HEAD_END)
        slow.sendall(head + HEAD_END)
        for byte in body[:-1]:
            slow.sendall(bytes([byte]))
            time.sleep(0.1)
        status, content = read_response(slow)
    document = json.loads(content)
    assert (status, document["type"], document["stage"]) == (504, "/problems/deadline-exceeded", "body")
    assert "0.4 s were not enough, they ended in the stage 'body': send the body at once" in document["detail"]
    assert expired(engine, "body") == 1


def test_a_request_expires_in_the_queue(engine: Running) -> None:
    with occupied(engine):
        status, content = exchange(engine, request({}, Request_Timeout="0.05"))
    document = json.loads(content)
    assert (status, document["stage"]) == (504, "queue")
    assert "0.05 s were not enough" in document["detail"]
    assert expired(engine, "queue") == 1


def test_a_request_expires_during_its_batch(engine: Running) -> None:
    with bystanders(engine), occupied(engine, 504, **{"Request-Timeout": "2"}) as response:
        assert problem(response.result(), "deadline-exceeded")["stage"] == "infer"
        assert expired(engine, "infer") == 1


def test_a_request_expires_while_its_response_is_encoded(engine: Running) -> None:
    with gate("encode", n=32) as held:
        response = engine.post(held.body, path="/hold", headers={"Request-Timeout": "2"})
    document = problem(response, "deadline-exceeded")
    assert document["stage"] == "encode"
    assert "2 s were not enough" in document["detail"]
    assert expired(engine, "encode") == 1


def test_a_stream_that_has_begun_may_take_longer_than_a_request(serve: Callable[..., Running]) -> None:
    service = serve(request_timeout=2)
    with connect(service, receive_buffer=4096) as slow:
        slow.sendall(request({"n": 200_000, "seed": 6}))
        slow.recv(1, socket.MSG_PEEK)
        time.sleep(2.5)
        status, content = read_response(slow)
    assert (status, np.load(io.BytesIO(content)).shape) == (200, (200_000, 1, 8, 8))


def test_a_client_cannot_lengthen_the_deadline(serve: Callable[..., Running]) -> None:
    service = serve(request_timeout=0.1, operations=(*OPERATIONS, HOLD))
    with gate() as held:
        response = service.post(held.body, path="/hold", headers={"Request-Timeout": "60"})
    assert "0.1 s were not enough" in problem(response, "deadline-exceeded")["detail"]


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "nan", "1_0", ""])
def test_a_timeout_that_is_no_positive_number_is_refused(service: Running, timeout: str) -> None:
    document: dict[str, Any] = problem(service.post({}, headers={"Request-Timeout": timeout}), "invalid-request")
    assert f"got {timeout!r}" in document["detail"]
