"""A toy operation, which shows that a further operation takes one module and one line."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import BaseModel, ConfigDict

from reparam.service.artifact.outputs import OUTPUTS, Output
from reparam.service.errors import InvalidRequest, Problem
from reparam.service.operations import OPERATIONS
from reparam.service.operations.arrays import parameter
from reparam.service.operations.operation import Operation, response_model
from reparam.service.runtime.graphs import Graph
from reparam.service.runtime.repository import Repository
from reparam.service.runtime.sampler import SamplerInputs
from tests.conftest import Running, metric, wait_until
from tests.load import HOLD, TLS, occupied

# The module of the toy operation: images of given means, without noise.

FACTS = ("model", "version", "n")


class MeansRequest(BaseModel):
    """The means to decode."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    mu: list[Any]
    """Means, (n, *latent_shape)."""


@dataclass(slots=True, eq=False)
class Means:
    graph: Graph
    mu: npt.NDArray[np.float32]
    outputs: tuple[Output, ...] = (OUTPUTS["images"],)

    @property
    def n(self) -> int:
        return len(self.mu)

    def fill(self, inputs: SamplerInputs, lo: int, hi: int, at: int) -> None:
        inputs.draw(at, hi - lo, seed=0, start=lo, temperature=0.0, prior="standard")
        inputs.give("mu", at, hi - lo, self.mu[lo:hi])

    def facts(self) -> dict[str, Any]:
        return {"model": self.graph.model, "version": self.graph.version, "n": self.n}

    def describe(self, lo: int, hi: int) -> str:
        return f"means {lo} .. {hi - 1}"

    def log_fields(self, lo: int, hi: int) -> dict[str, Any]:
        return {"means": hi - lo}

    def with_defaults(self) -> "Means":
        return Means(self.graph, np.zeros_like(self.mu))

    def overflow(self) -> Problem:
        return InvalidRequest("the means overflow float32: lower mu")


def resolve(request: MeansRequest, repository: Repository, _: int) -> Means:
    model = repository.find(None, None)
    return Means(model.sampler, parameter("mu", request.mu, len(request.mu), model.contract))


MEANS = Operation(
    path="/means",
    summary="Decode means",
    description="Decode given means, without noise.",
    request=MeansRequest,
    response=response_model("MeansResponse", FACTS, ("images",), "The decoded means."),
    resolve=resolve,
    facts=FACTS,
)


@pytest.fixture(scope="module")
def service(serve: Callable[..., Running]) -> Running:
    return serve(operations=(*OPERATIONS, MEANS, HOLD), runners=1)


def post(service: Running, mu: Any, path: str = "/means", accept: str = "application/x-npy") -> httpx.Response:
    return httpx.post(service.url + path, json={"mu": mu}, headers={"Accept": accept}, timeout=60, verify=TLS)


def array(response: httpx.Response) -> npt.NDArray[Any]:
    assert response.status_code == 200, response.text
    loaded: npt.NDArray[Any] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return loaded


class Broken(Means):
    """Writes its rows, and then fails."""

    def fill(self, inputs: SamplerInputs, lo: int, hi: int, at: int) -> None:
        super().fill(inputs, lo, hi, at)
        raise MemoryError("no memory for the words")


BROKEN = replace(
    MEANS,
    path="/broken",
    resolve=lambda request, repository, rows: Broken(**vars_of(MEANS.resolve(request, repository, rows))),
)


def vars_of(means: Any) -> dict[str, Any]:
    return {"graph": means.graph, "mu": means.mu}


def test_rows_of_a_batch_that_failed_stay_out_of_the_next(serve: Callable[..., Running]) -> None:
    service = serve(operations=(*OPERATIONS, BROKEN), runners=1)
    body, headers = {"seed": 1, "n": 4}, {"Accept": "application/x-npy"}
    expected = service.post(body, headers=headers).content
    assert post(service, MU, path="/broken").status_code == 500
    assert service.post(body, headers=headers).content == expected


MU = [[0.5, -1.0, 2.0], [0.0, 0.25, -0.5]]


def test_a_further_operation_takes_both_paths_with_equal_responses(service: Running) -> None:
    fast, asgi = post(service, MU), post(service, MU, path="/means?")  # a query keeps a request from the fast path
    assert fast.content == asgi.content
    assert fast.headers["model-name"] == asgi.headers["model-name"] == "tiny-gaussian"
    assert "sample-seed" not in fast.headers
    expected = service.post({"n": 2, "mu": MU, "temperature": 0.0}, headers={"Accept": "application/x-npy"})
    assert fast.content == expected.content


def test_a_further_operation_has_every_media_type_and_streams(service: Running) -> None:
    found = post(service, MU, accept="application/json").json()
    assert {name: found[name] for name in FACTS} == {"model": "tiny-gaussian", "version": 1, "n": 2}
    assert len(found["images"]) == 2
    assert post(service, MU, accept="image/png").content.startswith(b"\x89PNG")
    many = np.random.default_rng(0).normal(size=(20_000, 3)).round(3)
    streamed = array(post(service, many.tolist()))
    assert np.array_equal(streamed[10_000:10_002], array(post(service, many[10_000:10_002].tolist())))


def test_rows_of_two_operations_on_one_graph_share_a_batch(service: Running) -> None:
    alone = post(service, MU).content
    with ThreadPoolExecutor(2) as pool:
        with occupied(service):
            batches = metric(service.url, "batch_rows_count", model="tiny-gaussian", version="1")
            together = [pool.submit(post, service, MU), pool.submit(service.post, {"n": 3})]
            wait_until(lambda: service.lifespan.engine.queued_rows == 5)
        assert [future.result().status_code for future in together] == [200, 200]
        assert together[0].result().content == alone
    assert metric(service.url, "batch_rows_count", model="tiny-gaussian", version="1") == batches + 1


def test_a_further_operation_refuses_and_is_counted_as_every_operation(service: Running) -> None:
    refused = service.post({"mu": [[1.0]], "n": 1}, path="/means")
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/invalid-request")
    assert "the fields are mu" in refused.json()["detail"]
    assert post(service, [[3e38, 0, 0]]).json()["detail"] == "the means overflow float32: lower mu"
    assert service.get("/means").headers["allow"] == "POST"
    assert metric(service.url, "requests_total", path="/means", status="422") == 2


def test_a_further_operation_is_documented(service: Running) -> None:
    api = service.get("/openapi.json").json()
    described = api["paths"]["/means"]["post"]
    assert described["operationId"] == "means"
    assert described["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/MeansRequest")
    assert set(described["responses"]["200"]["headers"]) == {
        "X-Request-ID", "Model-Name", "Model-Version", "Server-Timing",
    }  # fmt: skip
    assert set(api["components"]["schemas"]["MeansResponse"]["properties"]) == {*FACTS, "images"}
