"""Mixture priors in the service: stored in the artifact, drawn by a separate noise stream."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from scipy import special, stats

import reparam
from reparam.service.artifact.contract import ArtifactError
from reparam.service.artifact.file import load
from tests.conftest import KINDS, Running
from tests.graphs import operate, set_metadata

Array = npt.NDArray[Any]
LATENTS = {"gaussian": "latents", "gumbel": "codes"}


@pytest.fixture(scope="module")
def service(serve: Any, mixed: Path) -> Running:
    running: Running = serve(artifacts=mixed, default_model="gaussian")
    return running


def mixture_of(repository: Path, kind: str) -> dict[str, Array]:
    metadata = {item.key: item.value for item in onnx.load(repository / kind / "1" / "model.onnx").metadata_props}
    return {name: np.array(values) for name, values in json.loads(metadata["reparam.mixture"]).items()}


def uniforms(seed: int, stream: int, row: int, elements: int) -> Array:
    """The steps in docs/architecture.md: row r of a seed begins at counter r * blocks."""
    blocks = -(-elements // 4)
    words = np.random.Philox(key=[seed, stream], counter=row * blocks).random_raw(elements)
    return (words + 0.5) * 2.0**-64


def documented_row(mixture: dict[str, Array], kind: str, seed: int, row: int, temperature: float) -> Array:
    [u] = uniforms(seed, 1, row, 1)
    component = int(np.searchsorted(np.cumsum(mixture["weights"]), u))
    if kind == "gaussian":
        eps = special.ndtri(uniforms(seed, 0, row, 3))
        z: Array = mixture["mu"][component] + temperature * np.exp(mixture["log_var"][component] / 2) * eps
        return z
    g = -np.log(-np.log1p(-uniforms(seed, 0, row, 20))).reshape(4, 5)
    scores = mixture["logits"][component] + g
    one_hot: Array = np.eye(5)[scores.argmax(-1)]
    return one_hot if temperature == 0 else special.softmax(scores / temperature, -1)


def draw(service: Running, kind: str, **body: Any) -> Array:
    response = service.post(
        {"model": kind, "outputs": [LATENTS[kind]], **body}, headers={"Accept": "application/x-npy"}
    )
    assert response.status_code == 200, response.text
    rows: npt.NDArray[Any] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return rows


@pytest.mark.parametrize("start", [0, 2**40])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_row_follows_the_documented_steps(
    service: Running, mixed: Path, kind: str, temperature: float, start: int
) -> None:
    mixture = mixture_of(mixed, kind)
    rows = draw(service, kind, seed=7, start=start, n=40, temperature=temperature)
    expected = [documented_row(mixture, kind, 7, start + row, temperature) for row in range(40)]
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_in_any_request_and_batch(service: Running, kind: str) -> None:
    """Singly, in one request, and in batches with rows of the standard prior and rows with parameters."""
    parameter = {"gaussian": {"mu": [1.0, 2.0, 3.0]}, "gumbel": {"logits": np.eye(5)[:4].tolist()}}[kind]
    others: list[dict[str, Any]] = [{"prior": "standard"}, {"prior": "standard", **parameter}, parameter]
    alone = [draw(service, kind, seed=3, n=8, temperature=0.5, **other) for other in others]
    whole = draw(service, kind, seed=5, n=64, temperature=0.5)

    def draw_both(number: int) -> tuple[Array, Array]:
        other = draw(service, kind, seed=3, n=8, temperature=0.5, **others[number % 3])
        return draw(service, kind, seed=5, start=number, n=1, temperature=0.5), other

    with ThreadPoolExecutor(16) as pool:
        drawn = list(pool.map(draw_both, range(64)))
    for number, (row, other) in enumerate(drawn):
        assert np.array_equal(row[0], whole[number])
        assert np.array_equal(other, alone[number % 3])


def test_components_are_drawn_by_weight(service: Running, mixed: Path) -> None:
    mixture = mixture_of(mixed, "gaussian")
    means = draw(service, "gaussian", seed=1, n=200_000, temperature=0)
    counts = [(np.abs(means - mu) < 1e-5).all(1).sum() for mu in mixture["mu"]]
    assert sum(counts) == 200_000
    assert stats.chisquare(counts, mixture["weights"] * 200_000).pvalue > 0.001


def test_standard_prior_is_selectable(service: Running) -> None:
    standard = draw(service, "gaussian", seed=2, n=16, prior="standard")
    assert np.array_equal(standard, draw(service, "gaussian", seed=2, n=16, mu=[0] * 3, log_var=[0] * 3))
    # Parameters left out are parameters of the standard prior.
    assert np.array_equal(standard, draw(service, "gaussian", seed=2, n=16, mu=[0] * 3))
    assert not np.array_equal(standard, draw(service, "gaussian", seed=2, n=16))
    responses = [
        service.post({"seed": 2, **prior}).json() for prior in ({}, {"prior": "mixture"}, {"prior": "standard"})
    ]
    assert [response["prior"] for response in responses] == ["mixture", "mixture", "standard"]
    assert responses[0]["images"] == responses[1]["images"] != responses[2]["images"]
    assert service.get("/models/gaussian").json()["priors"] == ["mixture", "standard"]


def test_sdk_selects_the_prior(service: Running) -> None:
    with reparam.Client(service.url) as client:
        assert client.model("gumbel").priors == ("mixture", "standard")
        default, mixture, standard = (
            client.sample(8, model="gaussian", seed=4, prior=prior, outputs="latents").outputs["latents"]
            for prior in (None, "mixture", "standard")
        )
    assert np.array_equal(default, mixture)
    assert not np.array_equal(default, standard)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"prior": "mixture", "mu": [0, 0, 0]}, "with mu given no component is drawn: leave out one or the other"),
        ({"prior": "vampire"}, "'mixture'"),
        ({"prior": ["standard"]}, "'standard'"),
    ],
)
def test_impossible_prior_is_refused(service: Running, body: dict[str, Any], fault: str) -> None:
    response = service.post(body)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["pointer"] == "/prior"
    assert fault in error["detail"]


def test_model_without_a_mixture_lists_its_priors(serve: Any, repository: Path) -> None:
    plain: Running = serve(artifacts=repository)
    assert plain.get("/models/tiny-gaussian").json()["priors"] == ["standard"]
    assert plain.post({"prior": "standard", "seed": 1}).json()["prior"] == "standard"
    response = plain.post({"prior": "mixture"})
    assert response.status_code == 422
    assert "has no such prior; it has: standard" in response.json()["detail"]


@pytest.mark.parametrize(
    ("mixture", "fault"),
    [
        ({"weights": [0.5, 0.4], "mu": 0, "log_var": 0}, "positive numbers that sum to 1"),
        ({"weights": [1.5, -0.5], "mu": 0, "log_var": 0}, "positive numbers that sum to 1"),
        ({"weights": 1.0, "mu": 0, "log_var": 0}, "positive numbers that sum to 1"),
        ({"mu": 0, "log_var": 0}, "positive numbers that sum to 1"),
        ({"weights": ["0.5", "0.5"], "mu": 0, "log_var": 0}, "the weights of reparam.mixture are no numbers"),
        ({"weights": [0.5, 0.5], "mu": 10**400, "log_var": 0}, "does not fit the shape [2, 3]: it holds object"),
        ({"weights": [0.5, 0.5], "mu": 0, "log_var": [[0] * 3, [1000] * 3]}, "holds NaN or infinity for the mixture"),
        ({"weights": ["a"], "mu": 0, "log_var": 0}, "the weights of reparam.mixture are no numbers"),
        ({"weights": [0.5, 0.5], "mu": 0}, "reparam.mixture has ['mu'], a gaussian has ['log_var', 'mu']"),
        ({"weights": [0.5, 0.5], "mu": [[0, 0, 0]] * 3, "log_var": 0}, "does not fit the shape [2, 3]"),
        ({"weights": [0.5, 0.5], "mu": float("nan"), "log_var": 0}, "reparam.mixture holds NaN or infinity"),
        ([1.0], "'reparam.mixture' is [1.0]"),
    ],
)
def test_broken_mixture_is_refused_with_the_reason(repository: Path, tmp_path: Path, mixture: Any, fault: str) -> None:
    good = repository / "tiny-gaussian" / "1" / "model.onnx"
    path = operate(good, tmp_path / "model.onnx", set_metadata("reparam.mixture", json.dumps(mixture)))
    with pytest.raises(ArtifactError) as refusal:
        load(path)
    assert fault in str(refusal.value)
