"""The steps of a training epoch."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reparam.export.data import load
from reparam.export.draws import HELD_OUT, as_images, generator
from reparam.export.learner import PRIOR_RATE, Learner, flat_gradient
from reparam.export.objectives import elbo_terms, negative_elbo
from reparam.export.train import contact_sheet, train, train_epoch
from reparam.models import MODELS, GaussianVAE, VAEConfig
from reparam.models.bodies import set_initial_bias
from tests.conftest import small


class Recording(Learner):
    """A learner with a record of all steps."""

    def __init__(self, model: GaussianVAE) -> None:
        super().__init__(model, 0.0)
        self.steps: list[tuple[Tensor, float, float]] = []

    def step(self, gradient: Tensor, learning_rate: float, kl_weight: float) -> None:
        self.steps.append((gradient.clone(), learning_rate, kl_weight))
        super().step(gradient, learning_rate, kl_weight)


@torch.no_grad()
def remove_variance(model: GaussianVAE) -> None:
    """Set the variance of q(z | x) to nearly 0."""
    last = model.encoder[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight[len(last.weight) // 2 :] = 0
    last.bias[len(last.bias) // 2 :] = -50


def test_gradients_of_shares_add_up_to_the_gradient_of_the_batch() -> None:
    pixels = torch.from_numpy(load("digits").train[:11].copy())
    torch.manual_seed(0)
    model = GaussianVAE(VAEConfig((1, 8, 8), (3,), "mlp", (4,), activation="tanh"))
    remove_variance(model)

    def gradient(shares: int) -> Tensor:
        learner = Learner(copy.deepcopy(model), 0.0)
        train_epoch(learner, pixels, small(binarize=False, shares=shares, kl_warm_up=0), 0)
        return 10 * learner.state()["optimizer.exp_avg"]  # Adam's first moment is 0.1 * gradient

    whole, parts = gradient(1), gradient(3)
    assert len(whole) == sum(parameter.numel() for parameter in model.parameters())
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_epoch_returns_means_over_all_images() -> None:
    pixels = torch.from_numpy(load("digits").train[:11].copy())
    torch.manual_seed(0)
    model = GaussianVAE(VAEConfig((1, 8, 8), (3,), "mlp", (4,)))
    remove_variance(model)
    likelihood, kl = elbo_terms(model, pixels / 255, 1.0, torch.Generator())
    config = small(binarize=False, shares=2, batch_size=4, learning_rate=1e-9)
    metrics = train_epoch(Learner(model, 0.0), pixels, config, 0)
    assert metrics["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["elbo"] == pytest.approx((likelihood - kl).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "gumbel"])
def test_step_equals_plain_adam_and_a_plain_average(kind: str) -> None:
    """Convolutions of one channel, because autograd lays out their gradients in another order."""
    torch.manual_seed(0)
    model = MODELS[kind](VAEConfig((1, 8, 8), (3, 4), "conv", (4, 5), prior_components=2))
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    learner = Learner(model, 0.15)
    pixels = torch.from_numpy(load("digits").train[:20].copy())
    adam = torch.optim.Adam([*plain.encoder.parameters(), *plain.decoder.parameters()], lr=1e-2, foreach=False)
    for step in range(3):
        loss = negative_elbo(model, pixels / 255, torch.Generator().manual_seed(step), temperature=1.0).loss
        learner.step(flat_gradient(loss, model), 1e-2, 1.0)
        plain.zero_grad()
        negative_elbo(plain, pixels / 255, torch.Generator().manual_seed(step), temperature=1.0).loss.backward()
        adam.step()
        plain.learn_prior([p.grad for p in plain.parameters(recurse=False) if p.grad is not None], PRIOR_RATE)
        decay = (0.1, 0.15, 0.15)[step]  # (1 + t) / (10 + t), at most the given 0.15
        for average, parameter in zip(start.parameters(), plain.parameters(), strict=True):
            average.data = decay * average.data + (1 - decay) * parameter.data
    for name, parameter in plain.state_dict().items():
        torch.testing.assert_close(learner.model.state_dict()[name], parameter, rtol=1e-4, atol=1e-5, msg=name)
    for name, parameter in start.state_dict().items():
        torch.testing.assert_close(learner.evaluated.state_dict()[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_schedules_count_the_steps_of_all_epochs() -> None:
    pixels = torch.from_numpy(load("digits").train[:11].copy())
    learner = Recording(GaussianVAE(VAEConfig((1, 8, 8), (3,), "mlp", (4,))))
    config = small(epochs=3, batch_size=4, learning_rate=0.01, kl_warm_up=2)
    for epoch in range(3):
        train_epoch(learner, pixels, config, epoch)
    rates = [0.005 * (1 + math.cos(math.pi * step / 9)) for step in range(9)]
    assert [rate for _, rate, _ in learner.steps] == pytest.approx(rates)
    assert [weight for _, _, weight in learner.steps] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1, 1])


def test_temperature_counts_the_steps_of_all_epochs() -> None:
    pixels = torch.from_numpy(load("digits").train[:11].copy())
    learner = Learner(MODELS["gumbel"](VAEConfig((1, 8, 8), (3, 4), "mlp", (4,))), 0.0)
    config = small(kind="gumbel", epochs=3, batch_size=4, tau_rate=0.1, tau_every=2)
    last = [train_epoch(learner, pixels, config, epoch)["temperature"] for epoch in range(3)]
    assert last == pytest.approx([math.exp(-0.2), math.exp(-0.4), 0.5])  # at steps 2, 5 and 8


@pytest.mark.parametrize("drawn", ["order", "pixels"])
def test_epochs_have_different_draws(drawn: str) -> None:
    pixels = torch.from_numpy(load("digits").train[:11].copy())
    torch.manual_seed(0)
    model = GaussianVAE(VAEConfig((1, 8, 8), (3,), "mlp", (4,)))
    remove_variance(model)
    by_order = drawn == "order"
    if not by_order:
        pixels = pixels[:1].expand_as(pixels)  # equal images: their order has no effect
    config = small(epochs=2, binarize=not by_order, batch_size=4 if by_order else 11, kl_warm_up=0)

    def first_gradient(epoch: int) -> Tensor:
        learner = Recording(copy.deepcopy(model))
        train_epoch(learner, pixels, config, epoch)
        return learner.steps[0][0]

    assert torch.equal(first_gradient(0), first_gradient(0))
    assert (first_gradient(0) - first_gradient(1)).abs().max() > 0.1


def test_metrics_and_sheet_use_the_averaged_weights(tmp_path: Path) -> None:
    config = small(average=0.999, learning_rate=0.01, epochs=2)
    run = train(config, tmp_path, resume=False, sheet_every=1)
    held_out = torch.from_numpy(run.data().test.copy())
    assert (tmp_path / "sheets" / "epoch-0002.png").read_bytes() == contact_sheet(run.trained(), held_out, config)
    with torch.inference_mode():
        draws = generator(config.seed, HELD_OUT)
        likelihood, kl = elbo_terms(run.trained(), as_images(held_out, True, draws), 1.0, draws)
    logged = json.loads(run.metrics.read_text().splitlines()[-1])["held_out_elbo"]
    assert logged == pytest.approx((likelihood - kl).mean().item(), rel=1e-4)


def test_training_starts_from_the_mean_image(tmp_path: Path) -> None:
    run = train(small(body="mlp", learning_rate=1e-9), tmp_path, resume=False, sheet_every=1)
    expected = run.config().build().decoder
    set_initial_bias(expected, torch.from_numpy(run.data().train).float().mean(0) / 255)
    for found, started in zip(run.trained().decoder.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, started, atol=1e-4, rtol=0)
