"""Failures of models, runners and the service itself: their problems, and other requests, which are not affected."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from reparam.service.artifact import noise
from reparam.service.operations import OPERATIONS
from tests.conftest import Running, wait_until
from tests.graphs import FAILS, NAN, POISON, WILD
from tests.load import HOLD, NPY, TLS, gate, occupied
from tests.problems import problem


def test_a_model_that_fails_is_an_internal_error(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    failing = {"model": "trouble", "temperature": FAILS, "seed": 7, "start": 40, "n": 2}
    document = problem(service.post(failing), "model-failed")
    assert "rows 40 .. 41 of seed 7 of model 'trouble' version 1 failed: the service's log" in document["detail"]
    (record,) = (record for record in caplog.records if record.message == "a run failed")
    assert vars(record).items() >= {"model": "trouble", "version": 1, "seed": 7, "start": 40, "n": 2}.items()
    assert service.post({"model": "trouble"}).status_code == 200


def test_parameters_that_overflow_are_refused(service: Running) -> None:
    document = problem(service.post({"temperature": 3e38, "log_var": [60, 60, 60]}), "non-finite-sample")
    assert "lower temperature or mu or log_var" in document["detail"]


def test_parameters_are_at_fault_only_if_the_rows_are_finite_without_them(service: Running) -> None:
    words = noise.words(18, 0, 1 << 16, (3,))
    (wild,) = np.flatnonzero((noise.normal(words) > WILD).any(1)).tolist()
    rows = {"model": "trouble", "seed": 18, "start": wild - 1}
    for parameters in ({}, {"temperature": 1.5}, {"mu": [1, 1, 1]}, {"temperature": NAN}):
        document = problem(service.post({**rows, "n": 2, **parameters}), "model-failed")
        assert document["detail"].startswith(
            f"rows {wild - 1} .. {wild} of seed 18 of model 'trouble' version 1 are NaN"
        )
    document = problem(service.post({**rows, "temperature": NAN}), "non-finite-sample")
    assert document["detail"].endswith("overflow float32 at temperature 3: lower temperature or mu or log_var")
    huge = {"mu": [3e38, -3e38, 3e38]}
    document = problem(service.post({**rows, **huge}), "non-finite-sample")
    assert document["detail"].endswith("at temperature 1: lower temperature or mu or log_var")
    document = problem(service.post({**rows, **huge, "temperature": 0}), "non-finite-sample")
    assert document["detail"].endswith("at temperature 0: lower mu or log_var")
    assert service.post(rows).status_code == 200


def test_requests_that_fail_in_a_shared_batch_fail_alone(engine: Running) -> None:
    body = {"model": "trouble", "seed": 1, "n": 4}
    expected = engine.post(body).json()["images"]
    with ThreadPoolExecutor(8) as pool:
        with occupied(engine):
            bad = [pool.submit(engine.post, {**body, "temperature": value}) for value in (FAILS, NAN)]
            good = [pool.submit(engine.post, body) for _ in range(6)]
            wait_until(lambda: engine.lifespan.engine.queued_rows == 8 * 4)
        problem(bad[0].result(), "model-failed")
        problem(bad[1].result(), "non-finite-sample")
        assert [future.result().json()["images"] for future in good] == [expected] * 6


def test_a_response_below_a_mebibyte_fails_as_a_whole(service: Running) -> None:
    """The first batches succeed long before the last one fails."""
    mu = np.zeros((10_000, 3), int)
    mu[-1] = POISON
    problem(service.post({"model": "trouble", "n": len(mu), "mu": mu.tolist()}, headers=NPY), "model-failed")


def test_a_stream_that_fails_midway_breaks_off(service: Running) -> None:
    mu = np.zeros((30_000, 3), int)
    mu[20_000] = POISON
    body = {"model": "trouble", "n": len(mu), "mu": mu.tolist()}
    with httpx.stream("POST", f"{service.url}/sample", json=body, headers=NPY, timeout=60, verify=TLS) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            response.read()


def test_livez_fails_when_a_runner_dies(serve: Callable[..., Running]) -> None:
    """Rows that wait are refused, as are the rows of the batch that the runner had begun."""
    service = serve(runners=1, operations=(*OPERATIONS, HOLD))
    assert service.get("/livez").status_code == 200
    with ThreadPoolExecutor(2) as pool:
        with gate("die") as held:
            runs = pool.submit(service.post, held.body, path="/hold")
            held.await_request()
            waits = pool.submit(service.post, {})
            wait_until(lambda: service.lifespan.engine.queued_rows == 1)
        for future in (runs, waits):
            problem(future.result(), "unavailable")
    response = service.get("/livez")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    assert "SystemExit" in response.json()["failure"]
    problem(service.post({}), "unavailable")


def test_livez_fails_while_a_batch_hangs(serve: Callable[..., Running]) -> None:
    service = serve(hang_timeout=0.2, operations=(*OPERATIONS, HOLD))
    with occupied(service):
        wait_until(lambda: service.get("/livez").status_code == 503)
        assert "a batch has been running for" in service.get("/livez").json()["failure"]
    assert service.get("/livez").status_code == 200


def test_an_unforeseen_error_does_not_show_its_inside(serve: Callable[..., Running]) -> None:
    service = serve()
    service.lifespan.repository.find = None  # type: ignore[method-assign,assignment]  # a fault of ours
    document = problem(service.post({}), "internal")
    assert "None" not in document["detail"]
    assert document["instance"].removeprefix("urn:request:") in document["detail"]
