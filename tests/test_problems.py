"""What is refused, how it is said, and that nobody else notices."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from reparam.service.artifact import noise
from reparam.service.engine.engine import FORGETTING
from reparam.service.errors import PROBLEMS
from tests.conftest import Running, metric, wait_until
from tests.graphs import FAILS, NAN, POISON, SLOW, WILD
from tests.raw import connect, request

SEEDS = 2**64


def problem(response: httpx.Response, slug: str) -> dict[str, Any]:
    """The document, after checking that it is a proper one of this type."""
    document: dict[str, Any] = response.json()
    assert response.headers["Content-Type"] == "application/problem+json"
    assert document["type"] == f"/problems/{slug}", document
    assert document["status"] == response.status_code == PROBLEMS[slug].status
    assert document["instance"] == f"urn:request:{response.headers['X-Request-ID']}"
    assert document["title"]
    return document


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"n": 0}, "/n", "greater than or equal to 1, got 0"),
        ({"n": -1}, "/n", "got -1"),
        ({"n": 1.5}, "/n", "got 1.5"),
        ({"n": "3"}, "/n", 'got "3"'),
        ({"n": True}, "/n", "got true"),
        ({"n": None}, "/n", "got null"),
        ({"n": SEEDS}, "/n", f"less than {SEEDS}, got {SEEDS}"),
        ({"n": "m" * 1000}, "/n", "mmm..."),
        ({"n": list(range(1000))}, "/n", "got 1000 elements"),
        ({"temperature": -0.1}, "/temperature", "got -0.1"),
        ({"temperature": 1e39}, "/temperature", "got 1e+39"),
        ({"temperature": "1"}, "/temperature", 'got "1"'),
        ({"temperature": True}, "/temperature", "got true"),
        ({"seed": SEEDS}, "/seed", f"got {SEEDS}"),
        ({"seed": -1}, "/seed", "got -1"),
        ({"seed": 1.0}, "/seed", "got 1.0"),
        ({"start": SEEDS}, "/start", f"got {SEEDS}"),
        ({"start": SEEDS - 1, "n": 2}, "/start", "start + n"),
        ({"start": -1}, "/start", "got -1"),
        ({"tempreature": 1}, "/tempreature", "the fields are model, version, n, temperature"),
        ({"model": 3}, "/model", "got 3"),
        ({"version": "1"}, "/version", 'got "1"'),
        ({"hard": True}, "/hard", "is gaussian and has no hard; of its own it has: mu, log_var"),
        ({"model": "tiny-gumbel", "hard": 1}, "/hard", "got 1"),
        ({"logits": [[0] * 5] * 4}, "/logits", "is gaussian and has no logits"),
        ({"model": "tiny-gumbel", "mu": [0, 0, 0]}, "/mu", "is gumbel and has no mu"),
        ({"outputs": []}, "/outputs", "List should have at least 1 item, not 0, got []"),
        ({"outputs": "images"}, "/outputs", "valid list, got \"images\""),
        ({"outputs": ["pixels"]}, "/outputs/0", "'images', 'latents', 'codes' or 'indices'"),
        ({"outputs": ["images", "codes"]}, "/outputs/1", "has no codes; it has: images, latents"),
        ({"outputs": ["images", "images"]}, "/outputs", "named twice"),
        ({"mu": 1.0}, "/mu", "got 1.0"),
        ({"a/b~c": 1}, "/a~1b~0c", "unknown field"),
        ({"x" * 1000: 1}, "/" + "x" * 77 + "...", "unknown field"),
        ({"n": [["x" * 1000, *[0] * 1000]]}, "/n", "got [[\"" + "x" * 74 + "..."),
        ({"mu": []}, "/mu", "[3] or [1, 3], got a list of 0"),
        ({"mu": [[]]}, "/mu", "got shape [1, 0]"),
        ({"mu": [0, 0]}, "/mu", "[3] or [1, 3], got a list of 2"),
        ({"mu": [[[0, 0, 0]]]}, "/mu", "got 3 nested lists"),
        ({"n": 2, "mu": [[0, 0, 0]]}, "/mu", "[3] or [2, 3], got a list of 1"),
        ({"n": 2, "mu": [[0, 0, 0], [0, 0]]}, "/mu", "lists of different lengths"),
        ({"n": 2, "mu": [[0, 0, 0], 0]}, "/mu/1", "got 0"),
        ({"mu": [0, True, 0]}, "/mu/1", "got true"),
        ({"mu": [0, "1", 0]}, "/mu/1", 'got "1"'),
        ({"mu": [0, None, 0]}, "/mu/1", "got null"),
        ({"mu": [0, 1e39, 0]}, "/mu/1", "got 1e+39"),
        ({"log_var": [0, 0, 1e30]}, "/log_var/2", "less than or equal to 60, got 1e+30"),
        ({"model": "tiny-gumbel", "logits": [0] * 5}, "/logits", "[4, 5] or [1, 4, 5], got 1 nested lists"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_value_and_the_way_out(
    service: Running, body: dict[str, Any], pointer: str, says: str
) -> None:
    document = problem(service.post(body), "invalid-request")
    assert document["errors"][0]["pointer"] == pointer
    assert says in document["errors"][0]["detail"]
    assert document["errors"][0]["detail"] == document["detail"].removeprefix(f"{pointer[1:]}: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ['"temperature": {}', '"mu": [0, {}, 0]'])
def test_numbers_that_are_not_finite_are_refused(service: Running, field: str, number: str) -> None:
    content = "{" + field.format(number) + "}"
    document = problem(service.post(content=content, headers={"Content-Type": "application/json"}), "invalid-request")
    assert "finite" in document["detail"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"3", b"\xff\xfe{}", b'{"model": "\xff"}', b"{}{}", b"n=1"])
def test_a_body_that_is_no_json_object_is_refused(service: Running, body: bytes) -> None:
    response = service.post(content=body, headers={"Content-Type": "application/json"})
    problem(response, "invalid-request")


def test_a_message_repeats_no_more_of_a_name_than_a_reader_needs(service: Running) -> None:
    name = "x" * 10_000
    answers = [
        service.post({"model": name}),
        service.post({}, headers={"Accept": name[:900]}),
        service.post({}, headers={"Accept": "application/json," * 100}),
        service.post({}, headers={"Content-Type": name}),
        service.post({}, headers={"Content-Encoding": name}),
        service.post({}, headers={"Request-Timeout": name}),
        service.get(f"/models/{name}"),
        service.get(f"/problems/{name}"),
        service.get(f"/{name}"),
    ]
    assert [answer.status_code for answer in answers] == [404, 406, 406, 415, 415, 422, 404, 404, 404]
    assert all(len(answer.json()["detail"]) < 400 for answer in answers)


def test_several_faults_are_told_at_once(service: Running) -> None:
    document = problem(service.post({"n": 0, "seed": -1, "tau": 1}), "invalid-request")
    assert {error["pointer"] for error in document["errors"]} == {"/n", "/seed", "/tau"}


def test_parameters_that_overflow_are_refused_not_sampled(service: Running) -> None:
    document = problem(service.post({"temperature": 3e38, "log_var": [60, 60, 60]}), "non-finite-sample")
    assert "lower temperature or mu or log_var" in document["detail"]


def test_an_unknown_model_lists_the_known(service: Running) -> None:
    document = problem(service.post({"model": "mnst"}), "unknown-model")
    assert document["detail"] == "unknown model 'mnst'; this server has: tiny-gaussian, tiny-gumbel, trouble"
    assert document["available"] == {"tiny-gaussian": [1], "tiny-gumbel": [1], "trouble": [1]}
    problem(service.get("/models/mnst"), "unknown-model")


def test_an_unknown_version_lists_the_known(service: Running) -> None:
    document = problem(service.post({"version": 2}), "unknown-model")
    assert document["detail"] == "model 'tiny-gaussian' has no version 2; this server has: 1"


def test_unknown_paths_and_methods(service: Running) -> None:
    problem(service.get("/smaple"), "unknown-path")
    problem(service.get("/problems/none"), "unknown-path")
    response = service.get("/sample")
    problem(response, "method-not-allowed")
    assert response.headers["Allow"] == "POST"
    response = httpx.put(f"{service.url}/livez")
    problem(response, "method-not-allowed")
    assert response.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "application/json;q=0", "nonsense", ","])
def test_an_accept_that_cannot_be_met_names_what_can(service: Running, accept: str) -> None:
    document = problem(service.post({}, headers={"Accept": accept}), "not-acceptable")
    assert document["available"] == ["application/json", "image/png", "application/x-npy", "application/x-npz"]


@pytest.mark.parametrize("accept", ["image/png", "application/x-npy"])
def test_one_output_types_refuse_several(service: Running, accept: str) -> None:
    response = service.post({"outputs": ["images", "latents"]}, headers={"Accept": accept})
    document = problem(response, "not-acceptable")
    assert "cannot carry images, latents; application/json, application/x-npz can" in document["detail"]


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "application/jsonx", ""])
def test_a_body_not_declared_as_json_is_refused(service: Running, content_type: str) -> None:
    response = service.post(content=b"{}", headers={"Content-Type": content_type})
    assert "Content-Type: application/json" in problem(response, "unsupported-media-type")["detail"]


def test_json_may_be_declared_with_a_charset(service: Running) -> None:
    response = service.post(content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


def test_a_body_of_100_mb_is_refused(service: Running) -> None:
    response = service.post(content=b" " * 100_000_000, headers={"Content-Type": "application/json"})
    document = problem(response, "too-large")
    assert (document["limit"], document["got"]) == (2**23, 100_000_000)


def test_a_body_that_hides_its_length_is_cut_off_at_the_limit(service: Running) -> None:
    pieces = (b" " * 2**20 for _ in range(40))
    response = service.post(content=pieces, headers={"Content-Type": "application/json"})
    assert problem(response, "too-large")["got"] > 2**23


def test_too_many_rows_are_refused_with_the_limit(service: Running, serve: Any) -> None:
    document = problem(service.post({"n": 2_000_000}), "too-large")
    assert (document["limit"], document["got"]) == (2**25 // 1024, 2_000_000)
    assert "stream one output as application/x-npy" in document["detail"]
    small = serve(max_rows=20, max_buffered_bytes=10 * 1024)
    assert "the limit is 20 rows" in problem(small.post({"n": 21}), "too-large")["detail"]
    assert len(small.post({"n": 10}).json()["images"]) == 10
    assert problem(small.post({"n": 11}), "too-large")["limit"] == 10


def test_a_model_that_fails_is_an_internal_error(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    failing = {"model": "trouble", "temperature": FAILS, "seed": 7, "start": 40, "n": 2}
    document = problem(service.post(failing), "model-failed")
    assert "rows 40 .. 41 of seed 7 of model 'trouble' version 1 failed: the service's log" in document["detail"]
    (record,) = (record for record in caplog.records if record.message == "a run failed")
    assert vars(record).items() >= {"model": "trouble", "version": 1, "seed": 7, "start": 40, "n": 2}.items()
    assert service.post({"model": "trouble"}).status_code == 200


def test_nan_is_the_fault_of_parameters_only_if_without_them_there_is_none(service: Running) -> None:
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


def test_one_failing_request_fails_alone(service: Running) -> None:
    """All of them wait behind a slow run, so they share the next batch."""
    body = {"model": "trouble", "seed": 1, "n": 4}
    expected = service.post(body).json()["images"]
    with ThreadPoolExecutor(10) as pool:
        slow = pool.submit(service.post, {"model": "trouble", "temperature": SLOW + 50})
        wait_until(lambda: service.lifespan.recorder.in_flight >= 1)
        bad = [pool.submit(service.post, {**body, "temperature": value}) for value in (FAILS, NAN)]
        good = [pool.submit(service.post, body) for _ in range(6)]
        assert slow.result().status_code == 200
        problem(bad[0].result(), "model-failed")
        problem(bad[1].result(), "non-finite-sample")
        assert [future.result().json()["images"] for future in good] == [expected] * 6


def test_an_answer_below_a_mebibyte_fails_as_a_whole(service: Running) -> None:
    """Though its first batches are there long before."""
    mu = np.zeros((10_000, 3), int)
    mu[-1] = POISON
    response = service.post(
        {"model": "trouble", "n": len(mu), "mu": mu.tolist()}, headers={"Accept": "application/x-npy"}
    )
    problem(response, "model-failed")


def test_a_stream_that_fails_midway_breaks_off(service: Running) -> None:
    mu = np.zeros((30_000, 3), int)
    mu[20_000] = POISON
    body = {"model": "trouble", "n": len(mu), "mu": mu.tolist()}
    with httpx.stream("POST", f"{service.url}/sample", json=body, headers={"Accept": "application/x-npy"}) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            response.read()


def test_a_full_queue_says_when_to_come_back(serve: Any) -> None:
    service: Running = serve(max_queue_rows=4, max_batch_rows=1, runners=1)
    slow = {"model": "trouble", "temperature": SLOW + 100}
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(service.post, slow)
        wait_until(lambda: service.lifespan.engine.busy)
        waiting = [pool.submit(service.post, {"n": 3})]
        wait_until(lambda: service.lifespan.engine.queued_rows == 3)
        waiting.append(pool.submit(service.post, {}))  # exactly as many as may
        wait_until(lambda: service.lifespan.engine.queued_rows == 4)
        response = service.post({"n": 1})
        document = problem(response, "queue-full")
        assert int(response.headers["Retry-After"]) == document["retry_after"] == 1
        assert "4 rows wait already and the limit is 4: try again in 1 s" in document["detail"]
        assert {future.result().status_code for future in [running, *waiting]} == {200}
    assert metric(service.url, "rejected_total", reason="rows") == 1


def test_the_slower_rows_were_the_later_one_shall_come_back(serve: Any) -> None:
    service: Running = serve(max_queue_rows=100, runners=1)
    slow = {"model": "trouble", "temperature": SLOW + 100}
    timing = service.post(slow).headers["Server-Timing"]
    (milliseconds,) = re.findall("infer;dur=([0-9.]+)", timing)
    ahead = 100 * FORGETTING * float(milliseconds) / 1000  # the one batch so far had a single row
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(service.post, slow)
        wait_until(lambda: service.lifespan.engine.busy)
        waiting = pool.submit(service.post, {"n": 100})
        wait_until(lambda: service.lifespan.engine.queued_rows == 100)
        document = problem(service.post({}), "queue-full")
        assert document["retry_after"] == pytest.approx(ahead, abs=1)
        assert [future.result().status_code for future in (running, waiting)] == [200, 200]


def test_a_request_larger_than_the_queue_is_served_piece_by_piece(serve: Any) -> None:
    service: Running = serve(max_queue_rows=4, max_batch_rows=1)
    assert len(service.post({"n": 50}).json()["images"]) == 50


def test_a_deadline_in_the_model_and_one_in_the_queue(serve: Any) -> None:
    service: Running = serve(runners=1)
    slow = {"model": "trouble", "temperature": SLOW + 150}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(service.post, slow, headers={"Request-Timeout": "0.3"})
        wait_until(lambda: service.lifespan.engine.busy)
        waiting = service.post({}, headers={"Request-Timeout": "0.05"})
        document = problem(waiting, "deadline-exceeded")
        assert document["stage"] == "queue"
        assert "0.05 s were not enough" in document["detail"]
        assert problem(running.result(), "deadline-exceeded")["stage"] == "infer"
    assert service.post({}).status_code == 200


def test_a_deadline_while_the_answer_is_encoded(serve: Any) -> None:
    service: Running = serve(max_buffered_bytes=2**30)
    body = {"n": 100_000}  # computed in a tenth of the time that their PNGs take
    document = problem(service.post(body, headers={"Request-Timeout": "1.2"}), "deadline-exceeded")
    assert document["stage"] == "encode"
    assert "1.2 s were not enough" in document["detail"]
    assert metric(service.url, "expired_total", stage="encode") == 1


def test_a_client_cannot_lengthen_the_deadline(serve: Any) -> None:
    service: Running = serve(request_timeout=0.1)
    slow = {"model": "trouble", "temperature": SLOW + 60}
    problem(service.post(slow, headers={"Request-Timeout": "60"}), "deadline-exceeded")


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "nan", "1_0", ""])
def test_a_deadline_that_is_no_positive_number_is_refused(service: Running, timeout: str) -> None:
    document = problem(service.post({}, headers={"Request-Timeout": timeout}), "invalid-request")
    assert f"got {timeout!r}" in document["detail"]


def test_an_api_key_guards_samples_and_models(serve: Any) -> None:
    service: Running = serve(api_key="secret")
    refused = service.post({})
    problem(refused, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    problem(service.get("/models", headers={"Authorization": "Bearer wrong"}), "unauthorized")
    assert service.post({}, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert service.get("/readyz").status_code == 200


def test_without_models_the_service_is_unavailable(serve: Any, tmp_path: Path) -> None:
    empty: Running = serve(artifacts=tmp_path, default_model=None)
    assert empty.get("/livez").status_code == 200
    assert empty.get("/readyz").status_code == 503
    response = empty.post({})
    assert "no model is served" in problem(response, "unavailable")["detail"]
    assert response.headers["Retry-After"] == "5"


def test_a_client_that_leaves_costs_nobody_anything(service: Running) -> None:
    with connect(service) as half:
        half.sendall(request({})[:-1])
    with connect(service) as hasty:
        hasty.sendall(request({"n": 1_000_000}))
        hasty.recv(1000)
    wait_until(lambda: service.lifespan.recorder.in_flight == 0)
    assert service.post({}).status_code == 200
    assert 'status="499"' in service.get("/metrics").text


def test_a_runner_that_died_is_no_life(serve: Any) -> None:
    service: Running = serve()
    assert service.get("/livez").status_code == 200
    service.lifespan.engine._queue.wait = None  # type: ignore[method-assign,assignment]  # so that the thread dies
    problem(service.post({"n": 500}), "unavailable")  # more than are computed without a runner
    response = service.get("/livez")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    assert "NoneType" in response.json()["failure"]
    problem(service.post({}), "unavailable")


def test_a_batch_that_does_not_end_is_no_life_until_it_ends(serve: Any) -> None:
    service: Running = serve(hang_timeout=0.2)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(service.post, {"model": "trouble", "temperature": SLOW + 100})
        wait_until(lambda: service.get("/livez").status_code == 503)
        assert "a batch has been running for" in service.get("/livez").json()["failure"]
        assert slow.result().status_code == 200
    assert service.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"mu": [""] * 1_000_000},
        {"mu": [[]] * 1_000_000},
        {"n": 400_000, "mu": [[True]] * 400_000},
        {"n": 100_000, "mu": [["a", "b", "c"]] * 100_000},
        {"outputs": [1] * 1_000_000},
        {f"x{index}": 0 for index in range(300_000)},
    ],
)
def test_a_body_full_of_faults_costs_no_more_than_its_reading(service: Running, body: dict[str, Any]) -> None:
    """It used to take a minute and gigabytes to list them all; now the answer names a few."""
    response = service.post(body)
    assert len(problem(response, "invalid-request")["errors"]) <= 10
    assert len(response.content) < 10_000


def test_a_buffered_request_whose_client_has_left_is_dropped(service: Running) -> None:
    minutes_of_work = {"model": "trouble", "temperature": SLOW + 30, "n": 32_000}
    with connect(service) as hasty:
        hasty.sendall(request(minutes_of_work, accept="application/json"))
        wait_until(lambda: service.lifespan.engine.busy)
    wait_until(lambda: service.lifespan.recorder.in_flight == 0)
    wait_until(lambda: not service.lifespan.engine.busy)
    assert service.lifespan.engine.queued_rows == 0


def test_a_client_that_leaves_while_its_answer_is_encoded_is_counted(serve: Any) -> None:
    service: Running = serve()
    with connect(service) as hasty:
        hasty.sendall(request({"n": 32_000}, accept="application/json"))
        wait_until(lambda: any(job.stage == "send" for job in list(service.lifespan.engine.jobs)))
    wait_until(lambda: not service.lifespan.engine.jobs)
    assert metric(service.url, "cancelled_total", stage="send") == 1
    assert metric(service.url, "requests_total", path="/sample", status="499") == 1


def test_a_body_that_trickles_in_runs_into_the_deadline(service: Running) -> None:
    def trickle() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.5)
        yield b"}"

    headers = {"Content-Type": "application/json", "Request-Timeout": "0.1"}
    document = problem(service.post(content=trickle(), headers=headers), "deadline-exceeded")
    assert document["stage"] == "body"
    assert "0.1 s were not enough, they ended in the stage 'body': send the body at once" in document["detail"]


def test_a_compressed_body_is_refused(service: Running) -> None:
    response = service.post(content=b"{}", headers={"Content-Type": "application/json", "Content-Encoding": "gzip"})
    assert "'gzip'" in problem(response, "unsupported-media-type")["detail"]


def test_what_nobody_foresaw_is_told_without_its_inside(serve: Any) -> None:
    service: Running = serve()
    service.lifespan.repository.find = None  # type: ignore[method-assign,assignment]  # a fault of ours
    document = problem(service.post({}), "internal")
    assert "None" not in document["detail"]
    assert document["instance"].removeprefix("urn:request:") in document["detail"]
