"""Mixture priors: fitted after the training by expectation maximization, or learned with the weights."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from reparam.export.__main__ import main
from reparam.export.config import TrainConfig
from reparam.export.data import load as load_images
from reparam.export.draws import generator
from reparam.export.errors import RunError
from reparam.export.evaluate import evaluate
from reparam.export.objectives import importance_weighted_bound, log_likelihood
from reparam.export.prior import default_components, fit_mixture, fit_prior
from reparam.export.publication import publish_run
from reparam.export.run import Run
from reparam.export.train import train
from reparam.models import GaussianVAE, GumbelVAE, Mixture, VAEConfig
from reparam.service.artifact.file import load
from tests.conftest import COMPONENTS, KINDS, small


def test_mixture_density_equals_scipys() -> None:
    model = GaussianVAE(VAEConfig((1, 2, 2), (2,), "mlp", (4,)))
    mu, log_var = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.0, 0.5], [-1.0, 0.3]])
    mixture = Mixture(torch.tensor([0.3, 0.7]).log(), (mu, log_var))
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    expected = sum(
        weight * stats.norm(m.numpy(), (v / 2).exp().numpy()).pdf(z.numpy()).prod(1)
        for weight, m, v in zip((0.3, 0.7), mu, log_var, strict=True)
    )
    np.testing.assert_allclose(mixture.log_prob(model, z), np.log(expected), atol=1e-5)


def test_fit_finds_the_mixture_of_gaussian_latents() -> None:
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


def test_fit_finds_the_mixture_of_codes() -> None:
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


def test_density_keeps_its_digits_far_from_zero() -> None:
    model = GaussianVAE(VAEConfig((1, 2, 2), (2,), "mlp", (4,)))
    z = 300 + 0.1 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    mu, log_var = model.most_likely(z, torch.ones(5000, 1))
    np.testing.assert_allclose((log_var / 2).exp(), 0.1, rtol=0.05)
    [found] = model.pairwise_log_prob(z, (mu, log_var)).mean(0)
    assert found.item() == pytest.approx(model.log_prob(z, (mu, log_var)).mean().item(), rel=1e-3)


def test_component_of_a_single_latent_stays_finite() -> None:
    model = GaussianVAE(VAEConfig((1, 2, 2), (2,), "mlp", (4,)))
    z = torch.cat([torch.randn(500, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[90.0, 90.0]])])
    mixture = fit_mixture(model, z, 2, seed=0)
    assert all(tensor.isfinite().all() for tensor in (mixture.log_weights, *mixture.parameters))
    assert mixture.log_weights.exp().sum().item() == pytest.approx(1, abs=1e-5)
    codes = GumbelVAE(VAEConfig((1, 2, 2), (2, 3), "mlp", (4,)))
    same = torch.eye(3)[torch.tensor([[0, 1]] * 50 + [[2, 2]])]
    mixture = fit_mixture(codes, same, 2, seed=0)
    assert mixture.parameters[0].isfinite().all()
    with pytest.raises(
        RunError, match="3 components need as many different latents, there are 2: fit fewer components"
    ):
        fit_mixture(codes, same, 3, seed=0)


def test_bound_with_a_mixture_reaches_the_exact_likelihood() -> None:
    torch.manual_seed(0)
    model = GumbelVAE(VAEConfig((1, 2, 2), (2, 3), "mlp", (4,))).eval()
    mixture = Mixture(torch.tensor([0.2, 0.8]).log(), (torch.randn(2, 2, 3),))
    images = torch.bernoulli(torch.full((3, 1, 2, 2), 0.5))
    codes = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=2)))]  # all 9 codes
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
def test_fit_raises_the_density_of_held_out_latents_and_repeats(fitted: dict[str, Path], kind: str) -> None:
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
def test_mixture_learned_with_the_weights_is_published(kind: str, tmp_path: Path) -> None:
    latent_shape = {"gaussian": (3,), "gumbel": (4, 5)}[kind]
    config = TrainConfig(
        kind=kind,  # type: ignore[arg-type]  # a Literal
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
    assert used[0] == pytest.approx(COMPONENTS)  # equal until the warm-up ends
    assert 1 < used[1] < COMPONENTS
    evaluate(run.folder, samples=2, rows=50, seed=0)
    contract = load(publish_run(run.folder, kind, tmp_path / "artifacts") / "model.onnx").contract
    weights, components = contract.mixture_arrays()
    np.testing.assert_allclose(weights, learned.log_weights.detach().exp(), rtol=1e-6)
    for name, expected, nearest in zip(model.parameter_names, learned.parameters, model.nearest(learned), strict=True):
        np.testing.assert_array_equal(components[name], expected.detach())
        np.testing.assert_array_equal(contract.prior_arrays()[name], nearest.detach())
    with pytest.raises(RunError, match="learned a mixture of 3 components with its weights: there is nothing to fit"):
        fit_prior(run.folder, components=2, seed=0)


def test_damaged_or_stale_mixture_is_refused(fitted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(fitted["gaussian"], folder)
    shutil.copy(fitted["gumbel"] / "checkpoint.safetensors", folder)
    with pytest.raises(RunError, match="fitted to other weights: `reparam fit-prior"):
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
        Run(folder).save_prior(broken)
        with pytest.raises(RunError, match=r"prior\.safetensors is damaged"):
            Run(folder).mixture()
    (folder / "prior.safetensors").write_bytes(b"none")
    with pytest.raises(RunError, match=r"prior\.safetensors is damaged"):
        Run(folder).mixture()
    # An evaluation with another prior may not be published either.
    (folder / "prior.safetensors").unlink()
    with pytest.raises(RunError, match="no evaluation of its last checkpoint and prior"):
        publish_run(folder, "stale", tmp_path / "artifacts")


def test_more_components_than_images_are_refused(fitted: dict[str, Path]) -> None:
    with pytest.raises(
        RunError, match="5000 components need as many different latents, there are 1617: fit fewer components"
    ):
        fit_prior(fitted["gaussian"], components=5000, seed=0)


def test_overfitted_mixture_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An older mixture stays, unless the file is damaged or belongs to other weights."""
    images = load_images("digits").train
    np.savez(tmp_path / "few.npz", train=images[:60], test=images[60:120])
    run = train(small(data=str(tmp_path / "few.npz"), latent_shape=(3,)), tmp_path / "run", resume=False, sheet_every=1)
    run.save_prior(run.trained().prior())
    before = run.prior_file.read_bytes()
    densities = fit_prior(run.folder, components=40, seed=0)
    assert densities["mixture"] < densities["standard"]
    assert run.prior_file.read_bytes() == before
    run.prior_file.write_bytes(b"none")
    main(["fit-prior", str(run.folder), "--components", "40"])
    assert "the mixture gains nothing" in capsys.readouterr().out
    assert not run.prior_file.exists()


def test_default_is_a_component_per_200_images() -> None:
    assert [default_components(images) for images in (1, 200, 1617, 10_000, 60_000)] == [1, 1, 8, 50, 50]


def test_fit_uses_the_default_number_of_components(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["tiny-gaussian"], tmp_path / "r")
    fit_prior(tmp_path / "r", components=None, seed=0)
    mixture = Run(tmp_path / "r").mixture()
    assert mixture is not None
    assert len(mixture.log_weights) == default_components(1617)
