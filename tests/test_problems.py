"""Requests that are refused: the problem names the fault, its value and the way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Running
from tests.load import TLS
from tests.problems import problem

SEEDS = 2**64
JSON = {"Content-Type": "application/json"}


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
    document = problem(service.post(content="{" + field.format(number) + "}", headers=JSON), "invalid-request")
    assert "finite" in document["detail"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"3", b"\xff\xfe{}", b'{"model": "\xff"}', b"{}{}", b"n=1"])
def test_a_body_that_is_no_json_object_is_refused(service: Running, body: bytes) -> None:
    problem(service.post(content=body, headers=JSON), "invalid-request")


def test_a_message_repeats_only_the_beginning_of_a_long_value(service: Running) -> None:
    name = "x" * 10_000
    responses = [
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
    assert [response.status_code for response in responses] == [404, 406, 406, 415, 415, 422, 404, 404, 404]
    assert all(len(response.json()["detail"]) < 400 for response in responses)


def test_several_faults_are_named_together(service: Running) -> None:
    document = problem(service.post({"n": 0, "seed": -1, "tau": 1}), "invalid-request")
    assert {error["pointer"] for error in document["errors"]} == {"/n", "/seed", "/tau"}


@pytest.mark.parametrize(
    "body",
    [
        {"mu": [""] * 200_000},
        {"mu": [[]] * 200_000},
        {"n": 100_000, "mu": [[True]] * 100_000},
        {"n": 50_000, "mu": [["a", "b", "c"]] * 50_000},
        {"outputs": [1] * 200_000},
        {f"x{index}": 0 for index in range(100_000)},
    ],
    ids=["strings", "empty lists", "booleans", "rows of strings", "outputs", "fields"],
)
def test_a_body_full_of_faults_gets_a_short_response(service: Running, body: dict[str, Any]) -> None:
    response = service.post(body)
    assert len(problem(response, "invalid-request")["errors"]) <= 10
    assert len(response.content) < 10_000


def test_an_unknown_model_lists_the_known(service: Running) -> None:
    document = problem(service.post({"model": "mnst"}), "unknown-model")
    assert document["detail"] == "unknown model 'mnst'; this server has: tiny-gaussian, tiny-gumbel, trouble"
    assert document["available"] == {"tiny-gaussian": [1], "tiny-gumbel": [1], "trouble": [1]}
    problem(service.get("/models/mnst"), "unknown-model")


def test_an_unknown_version_lists_the_known(service: Running) -> None:
    document = problem(service.post({"version": 2}), "unknown-model")
    assert document["detail"] == "model 'tiny-gaussian' has no version 2; this server has: 1"


def test_unknown_paths_and_methods_are_refused(service: Running) -> None:
    problem(service.get("/smaple"), "unknown-path")
    problem(service.get("/problems/none"), "unknown-path")
    response = service.get("/sample")
    problem(response, "method-not-allowed")
    assert response.headers["Allow"] == "POST"
    response = httpx.put(f"{service.url}/livez", verify=TLS)
    problem(response, "method-not-allowed")
    assert response.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "application/json;q=0", "nonsense", ","])
def test_an_accept_header_that_cannot_be_met_gets_the_media_types(service: Running, accept: str) -> None:
    document = problem(service.post({}, headers={"Accept": accept}), "not-acceptable")
    assert document["available"] == ["application/json", "image/png", "application/x-npy", "application/x-npz"]


@pytest.mark.parametrize("accept", ["image/png", "application/x-npy"])
def test_media_types_of_one_output_refuse_several(service: Running, accept: str) -> None:
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


def test_a_compressed_body_is_refused(service: Running) -> None:
    response = service.post(content=b"{}", headers={**JSON, "Content-Encoding": "gzip"})
    assert "'gzip'" in problem(response, "unsupported-media-type")["detail"]


def test_a_body_of_100_mb_is_refused(service: Running) -> None:
    document = problem(service.post(content=b" " * 100_000_000, headers=JSON), "too-large")
    assert (document["limit"], document["got"]) == (2**23, 100_000_000)


def test_a_body_without_length_is_refused_at_the_limit(service: Running) -> None:
    pieces = (b" " * 2**20 for _ in range(40))
    assert problem(service.post(content=pieces, headers=JSON), "too-large")["got"] > 2**23


def test_too_many_rows_are_refused_with_the_limit(service: Running, serve: Callable[..., Running]) -> None:
    document = problem(service.post({"n": 2_000_000}), "too-large")
    assert (document["limit"], document["got"]) == (2**25 // 1024, 2_000_000)
    assert "stream one output as application/x-npy" in document["detail"]
    small = serve(max_rows=20, max_buffered_bytes=10 * 1024)
    assert "the limit is 20 rows" in problem(small.post({"n": 21}), "too-large")["detail"]
    assert len(small.post({"n": 10}).json()["images"]) == 10
    assert problem(small.post({"n": 11}), "too-large")["limit"] == 10


def test_an_api_key_guards_samples_and_models(serve: Callable[..., Running]) -> None:
    service = serve(api_key="secret")
    refused = service.post({})
    problem(refused, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    problem(service.get("/models", headers={"Authorization": "Bearer wrong"}), "unauthorized")
    assert service.post({}, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert service.get("/readyz").status_code == 200


def test_without_models_the_service_is_unavailable(serve: Callable[..., Running], tmp_path: Path) -> None:
    empty = serve(artifacts=tmp_path, default_model=None)
    assert empty.get("/livez").status_code == 200
    assert empty.get("/readyz").status_code == 503
    response = empty.post({})
    assert "no model is served" in problem(response, "unavailable")["detail"]
    assert response.headers["Retry-After"] == "5"
