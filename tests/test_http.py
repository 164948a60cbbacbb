"""The responses of every route, and their headers."""

import base64
import io
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from reparam import __version__
from reparam.service.errors import PROBLEMS
from reparam.service.telemetry.metrics import Histogram
from tests.conftest import Running
from tests.load import TLS, gate


def picture(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_an_empty_post_samples_one_image_of_the_default_model(service: Running) -> None:
    found = service.post(None).json()
    assert (found["model"], found["version"], found["n"], found["start"]) == ("tiny-gaussian", 1, 1, 0)
    assert (found["temperature"], found["hard"], found["noise_version"]) == (1.0, False, 1)
    assert picture(base64.b64decode(found["images"][0])).size == (8, 8)


def test_json_holds_the_outputs_of_the_request(service: Running) -> None:
    body = {"model": "tiny-gumbel", "version": 1, "n": 2, "temperature": 0.5, "outputs": ["codes", "indices"]}
    found = service.post(body).json()
    assert np.shape(found["codes"]) == (2, 4, 5)
    assert np.argmax(found["codes"], -1).tolist() == found["indices"]
    assert "images" not in found


def test_a_seed_beyond_53_bits_survives_json(service: Running) -> None:
    assert service.post({"seed": 2**64 - 1, "start": 2**64 - 1}).json()["seed"] == 2**64 - 1


def test_png_of_one_row_is_the_image(service: Running) -> None:
    response = service.post({"seed": 1}, headers={"Accept": "image/png"})
    pixels = service.post({"seed": 1}, headers={"Accept": "application/x-npy"}).content[-64:]
    assert picture(response.content).tobytes() == pixels


def test_png_of_many_rows_is_a_contact_sheet(service: Running) -> None:
    sheet = picture(service.post({"n": 10, "seed": 1}, headers={"Accept": "image/png"}).content)
    assert sheet.size == (4 * 10 + 2, 3 * 10 + 2)
    first = picture(service.post({"seed": 1}, headers={"Accept": "image/png"}).content)
    assert sheet.crop((2, 2, 10, 10)).tobytes() == first.tobytes()


def test_npy_holds_uint8_pixels(service: Running) -> None:
    response = service.post({"n": 3}, headers={"Accept": "application/x-npy"})
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert (array.shape, array.dtype) == ((3, 1, 8, 8), np.uint8)


def test_npz_holds_every_output(service: Running) -> None:
    body = {"model": "tiny-gumbel", "n": 70, "outputs": ["images", "codes", "indices"]}
    response = service.post(body, headers={"Accept": "application/x-npz"})
    with np.load(io.BytesIO(response.content), allow_pickle=False) as archive:
        types = {name: (archive[name].shape, str(archive[name].dtype)) for name in archive.files}
    assert types == {
        "images": ((70, 1, 8, 8), "uint8"),
        "codes": ((70, 4, 5), "float32"),
        "indices": ((70, 4), "int32"),
    }


@pytest.mark.parametrize("accept", ["application/json", "image/png", "application/x-npy", "application/x-npz"])
def test_the_headers_of_a_response_say_how_to_get_it_again(service: Running, accept: str) -> None:
    response = service.post({"seed": 5, "start": 2}, headers={"Accept": accept, "X-Request-ID": "mine"})
    names = ("Model-Name", "Model-Version", "Sample-Seed", "Sample-Start", "Noise-Version", "X-Request-ID")
    assert [response.headers[name] for name in names] == ["tiny-gaussian", "1", "5", "2", "1", "mine"]
    assert response.headers["Content-Type"] == accept


def test_server_timing_says_how_many_milliseconds_each_stage_took(engine: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        with gate() as held:
            began = time.perf_counter()
            future = pool.submit(engine.post, held.body, path="/hold")
            held.await_request()
            reached = time.perf_counter()
            time.sleep(0.1)
            least = 1e3 * (time.perf_counter() - reached)
        response = future.result()
        most = 1e3 * (time.perf_counter() - began)
    stages = dict(stage.split(";dur=") for stage in response.headers["Server-Timing"].split(", "))
    assert list(stages) == ["queue", "infer", "encode"]
    assert least <= float(stages["infer"]) <= sum(map(float, stages.values())) <= most


def test_fresh_seeds_differ_and_fit_every_reader_of_json(service: Running) -> None:
    seeds = {service.post().json()["seed"] for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) < 2**53


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("application/*", "application/json"),
        ("text/html,application/xhtml+xml,image/avif,image/webp,image/png,*/*;q=0.8", "image/png"),
        ("application/json;q=0.5, application/x-npy", "application/x-npy"),
        ("application/x-npz;q=0.9, image/png;q=0.1", "application/x-npz"),
        ("application/json;q=0, */*;q=0.1", "image/png"),
        ("Application/X-NPY", "application/x-npy"),
    ],
)
def test_the_media_type_follows_weights_and_wildcards(service: Running, accept: str, chosen: str) -> None:
    assert service.post({}, headers={"Accept": accept}).headers["Content-Type"] == chosen


@pytest.mark.parametrize("unfit", ["", "with space", "x" * 129, "é".encode()])
def test_a_request_id_that_fits_no_log_line_is_replaced(service: Running, unfit: str | bytes) -> None:
    fresh = [service.get("/livez", headers={"X-Request-ID": unfit}).headers["X-Request-ID"] for _ in range(2)]
    fresh += [service.post({}, headers={"X-Request-ID": unfit}).headers["X-Request-ID"] for _ in range(2)]
    assert {len(request_id) for request_id in fresh} == {32}
    assert len(set(fresh)) == 4


def test_the_media_type_can_carry_the_outputs(service: Running) -> None:
    both = {"outputs": ["images", "latents"]}
    response = service.post(both, headers={"Accept": "application/x-npy, image/png, application/x-npz;q=0.1"})
    assert response.headers["Content-Type"] == "application/x-npz"


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/metrics", "/models", "/models/tiny-gumbel", "/problems/internal"]
)
def test_every_get_route_answers_head_requests(service: Running, path: str) -> None:
    head, whole = httpx.head(service.url + path, timeout=60, verify=TLS), service.get(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]


def test_models_describe_themselves(service: Running) -> None:
    body = service.get("/models").json()
    assert body["default"] == "tiny-gaussian"
    assert [model["name"] for model in body["models"]] == ["tiny-gaussian", "tiny-gumbel", "trouble"]
    gumbel = service.get("/models/tiny-gumbel").json()
    assert service.get("/models/tiny-gumbel/versions/1").json() == gumbel
    assert "has no version 2; this server has: 1" in service.get("/models/tiny-gumbel/versions/2").json()["detail"]
    for odd in ("0", "one", "9" * 5000):
        assert service.get(f"/models/tiny-gumbel/versions/{odd}").json()["type"] == "/problems/unknown-path"
    assert gumbel == body["models"][1]
    assert (gumbel["kind"], gumbel["latent_shape"], gumbel["image_shape"]) == ("gumbel", [4, 5], [1, 8, 8])
    assert (gumbel["parameters"], gumbel["outputs"]) == (["logits"], ["images", "codes", "indices"])
    assert gumbel["evaluation"]["m"] == 2
    assert gumbel["trained_on"]["data"] == "digits"
    assert gumbel["provider"].endswith("ExecutionProvider")


def test_livez_and_readyz_of_a_healthy_service(service: Running) -> None:
    assert service.get("/livez").json() == {"status": "alive"}
    ready = service.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["models"] == {"tiny-gaussian": [1], "tiny-gumbel": [1], "trouble": [1]}
    assert ready.json()["refused"] == {}


def test_metrics_count_rows_and_requests(service: Running) -> None:
    def rows() -> float:
        lines = service.get("/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith('reparam_rows_total{model="tiny-gumbel"'))
        return float(line.split()[-1])

    service.post({"model": "tiny-gumbel"})
    before = rows()
    service.post({"model": "tiny-gumbel", "n": 100})
    assert rows() == before + 100
    assert service.get("/nowhere").status_code == 404
    text = service.get("/metrics").text
    assert 'reparam_requests_total{path="/sample",status="200"}' in text
    assert 'reparam_requests_total{path="other",status="404"}' in text
    assert "nowhere" not in text  # or clients could fill the memory with names
    assert 'reparam_infer_duration_seconds_bucket{le="0.0005",model="tiny-gumbel",version="1"}' in text


def test_an_observation_at_the_edge_of_a_bucket_counts_in_it() -> None:
    histogram = Histogram("rows", "Rows.", (), (1, 8, 64))
    histogram.labels().observe(1, 8, 9, 65)
    (family,) = histogram.collect()
    counts = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "rows_bucket"}
    assert counts == {"1.0": 1, "8.0": 2, "64.0": 3, "+Inf": 4}


def test_openapi_describes_requests_and_responses(service: Running) -> None:
    assert "swagger" in service.get("/docs").text
    api = service.get("/openapi.json").json()
    sample = api["paths"]["/sample"]["post"]
    schemas = api["components"]["schemas"]
    assert sample["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/SampleRequest"
    }
    fields = schemas["SampleRequest"]["properties"]
    assert list(fields) == [
        "model", "version", "n", "temperature", "hard", "seed", "start", "mu", "log_var", "logits", "prior", "outputs",
    ]  # fmt: skip
    assert all(field["description"] for field in fields.values())
    assert set(sample["responses"]) >= {"200", "404", "406", "413", "415", "422", "429", "500", "503", "504"}
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(api)))
    assert named == schemas.keys() >= {"SampleResponse", "ProblemDocument", "ModelList", "Liveness", "Readiness"}
    response = service.post({})
    assert response.headers.keys() >= {name.lower() for name in sample["responses"]["200"]["headers"]}
    assert [parameter["name"] for parameter in sample["parameters"]] == ["Request-Timeout", "X-Request-ID"]
    assert "Retry-After" in sample["responses"]["429"]["headers"]
    assert api["info"]["version"] == __version__
    assert "HTTPValidationError" not in json.dumps(api)
    assert set(api["paths"]["/problems/{slug}"]["get"]["responses"]) == {"200", "404", "default"}
    assert "securitySchemes" not in api["components"]


def test_openapi_requires_the_key_where_the_service_does(serve: Callable[..., Running]) -> None:
    api = serve(api_key="sesame").get("/openapi.json").json()
    secured = [path for path, methods in api["paths"].items() if any("security" in each for each in methods.values())]
    assert sorted(secured) == ["/models", "/models/{name}", "/models/{name}/versions/{version}", "/sample"]
    assert api["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.mark.parametrize("slug", PROBLEMS)
def test_every_problem_type_is_explained_at_its_path(service: Running, slug: str) -> None:
    text = service.get(f"/problems/{slug}").text
    assert text.startswith(f"{PROBLEMS[slug].status} {slug}")
    assert PROBLEMS[slug].meaning in text
