"""A mixture as the prior: found by expectation maximization, stored in the artifact, drawn by noise of its own."""

import io
import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from scipy import special, stats

import reparam
from export.config import TrainConfig
from export.draws import generator
from export.errors import RunError
from export.evaluate import evaluate
from export.objectives import importance_weighted_bound, log_likelihood
from export.prior import fit_mixture, fit_prior
from export.publish import publish
from export.run import Run
from export.train import train
from models import GaussianVAE, GumbelVAE, Mixture, VAEConfig
from service.artifact import load
from service.contract import ArtifactError
from tests.conftest import Running
from tests.graphs import operate, set_metadata

Array = npt.NDArray[Any]
COMPONENTS = 3
KINDS = ["gaussian", "gumbel"]
LATENTS = {"gaussian": "latents", "gumbel": "codes"}


@pytest.fixture(scope="module")
def fitted(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny runs, with a mixture of three components fitted to each."""
    folders = {kind: tmp_path_factory.mktemp("fitted") / kind for kind in KINDS}
    for kind, folder in folders.items():
        shutil.copytree(runs[f"tiny-{kind}"], folder)
        fit_prior(folder, components=COMPONENTS, seed=0)
        evaluate(folder, samples=2, rows=50, seed=0)
    return folders


@pytest.fixture(scope="module")
def mixed(fitted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("mixed")
    for kind, folder in fitted.items():
        publish(folder, kind, repository)
    return repository


@pytest.fixture(scope="module")
def service(serve: Any, mixed: Path) -> Running:
    running: Running = serve(artifacts=mixed, default_model="gaussian")
    return running


def mixture_of(repository: Path, kind: str) -> dict[str, Array]:
    metadata = {item.key: item.value for item in onnx.load(repository / kind / "1" / "model.onnx").metadata_props}
    return {name: np.array(values) for name, values in json.loads(metadata["reparam.mixture"]).items()}


def uniforms(seed: int, stream: int, row: int, elements: int) -> Array:
    """docs/architecture.md, step by step: row r of a seed begins at counter r * blocks."""
    blocks = -(-elements // 4)
    words = np.random.Philox(key=[seed, stream], counter=row * blocks).random_raw(elements)
    return (words + 0.5) * 2.0**-64


def row_by_the_book(mixture: dict[str, Array], kind: str, seed: int, row: int, temperature: float) -> Array:
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
    given = {"model": kind, "outputs": [LATENTS[kind]], **body}
    response = service.post(given, headers={"Accept": "application/x-npy"})
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content), allow_pickle=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("start", [0, 2**40])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_what_the_documented_steps_give(
    service: Running, mixed: Path, kind: str, temperature: float, start: int
) -> None:
    mixture = mixture_of(mixed, kind)
    rows = draw(service, kind, seed=7, start=start, n=40, temperature=temperature)
    expected = [row_by_the_book(mixture, kind, 7, start + row, temperature) for row in range(40)]
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_however_they_are_asked_for(service: Running, kind: str) -> None:
    """Alone, in one request, and all at once among rows of the standard prior and rows with parameters."""
    parameter = {"gaussian": {"mu": [1.0, 2.0, 3.0]}, "gumbel": {"logits": np.eye(5)[:4].tolist()}}[kind]
    others: list[dict[str, Any]] = [{"prior": "standard"}, {"prior": "standard", **parameter}, parameter]
    alone = [draw(service, kind, seed=3, n=8, temperature=0.5, **other) for other in others]
    whole = draw(service, kind, seed=5, n=64, temperature=0.5)

    def ask(number: int) -> tuple[Array, Array]:
        other = draw(service, kind, seed=3, n=8, temperature=0.5, **others[number % 3])
        return draw(service, kind, seed=5, start=number, n=1, temperature=0.5), other

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(64)))
    for number, (row, other) in enumerate(answers):
        assert np.array_equal(row[0], whole[number])
        assert np.array_equal(other, alone[number % 3])


def test_components_are_drawn_as_often_as_they_weigh(service: Running, mixed: Path) -> None:
    mixture = mixture_of(mixed, "gaussian")
    means = draw(service, "gaussian", seed=1, n=200_000, temperature=0)
    counts = [(np.abs(means - mu) < 1e-5).all(1).sum() for mu in mixture["mu"]]
    assert sum(counts) == 200_000
    assert stats.chisquare(counts, mixture["weights"] * 200_000).pvalue > 0.001


def test_the_standard_prior_stays_selectable(service: Running) -> None:
    standard = draw(service, "gaussian", seed=2, n=16, prior="standard")
    assert np.array_equal(standard, draw(service, "gaussian", seed=2, n=16, mu=[0] * 3, log_var=[0] * 3))
    # With parameters, those that are not given are the standard prior's.
    assert np.array_equal(standard, draw(service, "gaussian", seed=2, n=16, mu=[0] * 3))
    assert not np.array_equal(standard, draw(service, "gaussian", seed=2, n=16))
    answers = [service.post({"seed": 2, **prior}).json() for prior in ({}, {"prior": "mixture"}, {"prior": "standard"})]
    assert [answer["prior"] for answer in answers] == ["mixture", "mixture", "standard"]
    assert answers[0]["images"] == answers[1]["images"] != answers[2]["images"]
    assert service.get("/models/gaussian").json()["priors"] == ["mixture", "standard"]


def test_the_sdk_chooses_the_prior(service: Running) -> None:
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
def test_a_prior_that_cannot_be_is_refused(service: Running, body: dict[str, Any], fault: str) -> None:
    response = service.post(body)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["pointer"] == "/prior"
    assert fault in error["detail"]


def test_a_model_without_a_mixture_says_so(serve: Any, repository: Path) -> None:
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
def test_a_broken_mixture_is_refused_by_name(repository: Path, tmp_path: Path, mixture: Any, fault: str) -> None:
    good = repository / "tiny-gaussian" / "1" / "model.onnx"
    path = operate(good, tmp_path / "model.onnx", set_metadata("reparam.mixture", json.dumps(mixture)))
    with pytest.raises(ArtifactError) as refusal:
        load(path)
    assert fault in str(refusal.value)


def test_the_density_is_that_of_scipy() -> None:
    model = GaussianVAE(VAEConfig((1, 2, 2), (2,), "mlp", (4,)))
    mu, log_var = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.0, 0.5], [-1.0, 0.3]])
    mixture = Mixture(torch.tensor([0.3, 0.7]).log(), (mu, log_var))
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    expected = sum(
        weight * stats.norm(m.numpy(), (v / 2).exp().numpy()).pdf(z.numpy()).prod(1)
        for weight, m, v in zip((0.3, 0.7), mu, log_var, strict=True)
    )
    np.testing.assert_allclose(mixture.log_prob(model, z), np.log(expected), atol=1e-5)


def test_the_fit_finds_the_mixture_that_gaussian_latents_come_from() -> None:
    model = GaussianVAE(VAEConfig((1, 2, 2), (2,), "mlp", (4,)))
    random = np.random.default_rng(0)
    component = random.choice(2, 20_000, p=[0.25, 0.75])
    mu, sigma = np.array([[3.0, 0.0], [-1.0, 1.0]]), np.array([[0.5, 1.0], [1.0, 0.2]])
    z = mu[component] + sigma[component] * random.normal(size=(20_000, 2))
    mixture = fit_mixture(model, torch.from_numpy(z).float(), 2, seed=0)
    order = mixture.log_weights.argsort()
    np.testing.assert_allclose(mixture.log_weights[order].exp(), [0.25, 0.75], atol=0.01)
    np.testing.assert_allclose(mixture.parameters[0][order], mu, atol=0.03)
    np.testing.assert_allclose((mixture.parameters[1][order] / 2).exp(), sigma, atol=0.02)


def test_the_fit_finds_the_mixture_that_codes_come_from() -> None:
    model = GumbelVAE(VAEConfig((1, 2, 2), (8, 3), "mlp", (4,)))
    random = np.random.default_rng(0)
    component = random.choice(2, 20_000, p=[0.3, 0.7])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.3, 0.6]])
    indices = (random.random((20_000, 8, 1)) > probabilities.cumsum(-1)[component][:, None]).sum(-1)
    mixture = fit_mixture(model, torch.eye(3)[torch.from_numpy(indices)], 2, seed=0)
    order = mixture.log_weights.argsort()
    np.testing.assert_allclose(mixture.log_weights[order].exp(), [0.3, 0.7], atol=0.02)
    expected = np.broadcast_to(probabilities[:, None], (2, 8, 3))
    np.testing.assert_allclose(mixture.parameters[0][order].exp(), expected, atol=0.02)


def test_the_density_keeps_its_digits_far_from_zero() -> None:
    model = GaussianVAE(VAEConfig((1, 2, 2), (2,), "mlp", (4,)))
    z = 300 + 0.1 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    mu, log_var = model.most_likely(z, torch.ones(5000, 1))
    np.testing.assert_allclose((log_var / 2).exp(), 0.1, rtol=0.05)
    [found] = model.log_probs(z, (mu, log_var)).mean(0)
    assert found.item() == pytest.approx(model.log_prob(z, (mu, log_var)).mean().item(), rel=1e-3)


def test_a_component_of_one_latent_stays_a_density() -> None:
    model = GaussianVAE(VAEConfig((1, 2, 2), (2,), "mlp", (4,)))
    z = torch.cat([torch.randn(500, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[90.0, 90.0]])])
    mixture = fit_mixture(model, z, 2, seed=0)
    assert all(tensor.isfinite().all() for tensor in (mixture.log_weights, *mixture.parameters))
    assert mixture.log_weights.exp().sum().item() == pytest.approx(1, abs=1e-5)
    codes = GumbelVAE(VAEConfig((1, 2, 2), (2, 3), "mlp", (4,)))
    same = torch.eye(3)[torch.tensor([[0, 1]] * 50 + [[2, 2]])]
    mixture = fit_mixture(codes, same, 2, seed=0)
    assert mixture.parameters[0].isfinite().all()
    with pytest.raises(RunError, match="3 components need as many different latents, there are 2: fit fewer"):
        fit_mixture(codes, same, 3, seed=0)


def test_the_bound_with_a_mixture_reaches_the_exact_likelihood() -> None:
    torch.manual_seed(0)
    model = GumbelVAE(VAEConfig((1, 2, 2), (2, 3), "mlp", (4,))).eval()
    mixture = Mixture(torch.tensor([0.2, 0.8]).log(), (torch.randn(2, 2, 3),))
    images = torch.bernoulli(torch.full((3, 1, 2, 2), 0.5))
    codes = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=2)))]  # all nine
    with torch.inference_mode():
        decoded, prior = model.decode(codes), mixture.log_prob(model, codes)
        exact = torch.stack([(log_likelihood(decoded, image) + prior).logsumexp(0) for image in images])
        priors = [model.prior(), mixture]
        alone, bound = importance_weighted_bound(model, images, 4000, generator(0, 0), 10, priors)
        [standard] = importance_weighted_bound(model, images, 4000, generator(0, 0), 10)
    assert prior.exp().sum().item() == pytest.approx(1)
    torch.testing.assert_close(bound.float(), exact, atol=0.03, rtol=0)
    assert torch.equal(alone, standard)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_raises_the_density_of_held_out_latents_and_repeats(fitted: dict[str, Path], kind: str) -> None:
    before = fitted[kind].joinpath("prior.safetensors").read_bytes()
    densities = fit_prior(fitted[kind], components=COMPONENTS, seed=0)
    assert densities["mixture"] > densities["standard"]
    assert fitted[kind].joinpath("prior.safetensors").read_bytes() == before


def test_evaluation_reports_the_bound_with_the_mixture(fitted: dict[str, Path], mixed: Path) -> None:
    found = json.loads((fitted["gaussian"] / "evaluation.json").read_text())
    assert found["mixture_components"] == COMPONENTS
    assert found["mixture_bound"] != found["bound"]
    evaluation = load(mixed / "gaussian" / "1" / "model.onnx").contract.evaluation
    assert evaluation["mixture_bound"] == found["mixture_bound"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_learned_with_the_weights_is_what_the_artifact_samples(kind: str, tmp_path: Path) -> None:
    latent_shape = {"gaussian": (3,), "gumbel": (4, 5)}[kind]
    config = TrainConfig(
        kind=kind,  # type: ignore[arg-type]
        data="digits",
        epochs=2,
        width=(4,),
        latent_shape=latent_shape,
        prior_components=COMPONENTS,
        average=0.9,
    )
    run = train(config, tmp_path / "run", resume=False, sheet_every=1)
    model = run.trained()
    learned = model.prior()
    assert not torch.equal(*learned.parameters[0][:2])
    used = [json.loads(line)["components"] for line in run.metrics.read_text().splitlines()]
    assert used[0] == pytest.approx(COMPONENTS)  # alike
    assert 1 < used[1] < COMPONENTS
    evaluate(run.folder, samples=2, rows=50, seed=0)
    contract = load(publish(run.folder, kind, tmp_path / "artifacts") / "model.onnx").contract
    weights, components = contract.mixture_arrays()
    np.testing.assert_allclose(weights, learned.log_weights.detach().exp(), rtol=1e-6)
    for name, expected, nearest in zip(model.parameter_names, learned.parameters, model.nearest(learned), strict=True):
        np.testing.assert_array_equal(components[name], expected.detach())
        np.testing.assert_array_equal(contract.prior_arrays()[name], nearest.detach())
    with pytest.raises(RunError, match="learned a mixture of 3 components with its weights: there is nothing to fit"):
        fit_prior(run.folder, components=2, seed=0)


def test_a_mixture_of_other_weights_is_refused(fitted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(fitted["gaussian"], folder)
    shutil.copy(fitted["gumbel"] / "checkpoint.safetensors", folder)
    with pytest.raises(RunError, match="fitted to other weights: `python -m export fit-prior"):
        Run(folder).mixture()
    shutil.copy(fitted["gaussian"] / "checkpoint.safetensors", folder)
    mixture = Run(folder).mixture()
    assert mixture is not None
    nan = mixture.parameters[0] * torch.nan
    for broken in (
        mixture._replace(log_weights=mixture.log_weights * 1000),
        mixture._replace(parameters=(mixture.parameters[0][:2], mixture.parameters[1])),
        mixture._replace(parameters=(mixture.parameters[0].double(), mixture.parameters[1])),
        mixture._replace(parameters=(nan, mixture.parameters[1])),
    ):
        Run(folder).keep_prior(broken)
        with pytest.raises(RunError, match=r"prior\.safetensors is damaged"):
            Run(folder).mixture()
    (folder / "prior.safetensors").write_bytes(b"none")
    with pytest.raises(RunError, match=r"prior\.safetensors is damaged"):
        Run(folder).mixture()
    # What was evaluated with another prior may not be published either.
    (folder / "prior.safetensors").unlink()
    with pytest.raises(RunError, match="no evaluation of its last checkpoint and prior"):
        publish(folder, "stale", tmp_path / "artifacts")


def test_more_components_than_images_are_refused(fitted: dict[str, Path]) -> None:
    with pytest.raises(RunError, match="5000 components need as many different latents, there are 1617: fit fewer"):
        fit_prior(fitted["gaussian"], components=5000, seed=0)
