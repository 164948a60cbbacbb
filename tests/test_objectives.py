"""The objectives of a training, compared with values computed in another way."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import one_hot

from reparam.export.draws import generator
from reparam.export.objectives import (
    cosine_decay,
    elbo_terms,
    gains,
    gumbel_temperature,
    importance_weighted_bound,
    log_likelihood,
    negative_elbo,
    negative_iwae,
    negative_vimco,
    systematic,
    warm_up,
)
from reparam.models import VAE, GaussianVAE, GumbelVAE, Mixture, VAEConfig
from reparam.models.bodies import set_initial_bias

IMAGE = (1, 2, 2)


def gaussian(width: tuple[int, ...] = (4,)) -> GaussianVAE:
    """A VAE with four pixels and one latent, in float64."""
    torch.manual_seed(0)
    return GaussianVAE(VAEConfig(IMAGE, (1,), "mlp", width)).double()


def images(n: int) -> Tensor:
    return torch.bernoulli(torch.full((n, *IMAGE), 0.5, dtype=torch.float64), generator=generator(5, 0))


def quadrature(model: GaussianVAE, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q(z | x) dz, log p(x | z), log p(z) and log q(z | x) on a grid of latents, (4001,) each."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    mu, log_var = (parameter.item() for parameter in model.encode(image))
    q = stats.norm(mu, math.exp(0.5 * log_var))
    likelihood = log_likelihood(model.decode(z[:, None]), image)
    weight = torch.from_numpy(q.pdf(z.numpy())) * (z[1] - z[0])
    return weight, likelihood, torch.from_numpy(stats.norm.logpdf(z.numpy())), torch.from_numpy(q.logpdf(z.numpy()))


def gradient(model: VAE, loss: Tensor) -> Tensor:
    parameters = [parameter for _, parameter in model.named_parameters()]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def last_weight(network: nn.Sequential) -> Tensor:
    layer = network[-1]
    assert isinstance(layer, nn.Linear)
    return layer.weight


def test_elbo_equals_quadrature() -> None:
    model, image = gaussian(), images(1)
    with torch.no_grad():
        weight, likelihood, prior, posterior = quadrature(model, image)
        exact = (weight * (likelihood + prior - posterior)).sum().item()
        terms = negative_elbo(model, image, generator(0, 0), temperature=1.0, samples=200_000)
    assert -terms.loss.item() == pytest.approx(exact, abs=0.01)
    assert (terms.likelihood - terms.kl).item() == pytest.approx(-terms.loss.item())
    kl = (weight * (posterior - prior)).sum().item()
    assert terms.kl.item() == pytest.approx(kl, abs=1e-6)


def test_iwae_rises_from_the_elbo_to_the_likelihood() -> None:
    model, image = gaussian(), images(1)
    with torch.no_grad():
        weight, likelihood, prior, posterior = quadrature(model, image)
        elbo = (weight * (likelihood + prior - posterior)).sum().item()
        exact = (likelihood + prior).exp().sum().log().item() + math.log(24 / 4000)
        copies = image.expand(100_000, -1, -1, -1)
        one = -negative_iwae(model, copies, generator(0, 0), samples=1).loss.item()
        many = -negative_iwae(model, image, generator(0, 0), samples=200_000).loss.item()
    assert one == pytest.approx(elbo, abs=0.01)
    assert many == pytest.approx(exact, abs=0.005)
    assert elbo < exact


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_dreg_has_the_gradient_of_iwae_with_less_variance(kl_weight: float) -> None:
    """The decoder's gradients are equal for equal draws, the encoder's gradients on average."""
    model, image = gaussian(), images(1).expand(200, -1, -1, -1)
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())

    def gradients(seed: int) -> Tensor:
        losses = (
            negative_iwae(model, image, generator(seed, 0), samples=8, kl_weight=kl_weight, doubly=doubly).loss
            for doubly in (False, True)
        )
        return torch.stack([gradient(model, loss) for loss in losses])

    iwae, dreg = torch.stack([gradients(seed) for seed in range(200)]).unbind(1)
    torch.testing.assert_close(dreg[:, encoder:], iwae[:, encoder:])
    difference = (dreg - iwae)[:, :encoder]
    error = difference.std(0) / len(difference) ** 0.5
    assert (difference.mean(0).abs() <= 4.5 * error).all()
    assert dreg[:, :encoder].var(0).sum() < (0.5 if kl_weight == 1 else 1) * iwae[:, :encoder].var(0).sum()


@pytest.mark.parametrize("doubly", [False, True])
def test_resampled_latents_have_the_gradient_of_all_latents_on_average(doubly: bool) -> None:
    model, image = gaussian(), images(1).expand(500, -1, -1, -1)

    def gradients(seed: int, resampled: int) -> Tensor:
        draws = generator(seed, 0)
        terms = negative_iwae(model, image, draws, samples=8, kl_weight=0.6, doubly=doubly, resampled=resampled)
        return gradient(model, terms.loss)

    difference = torch.stack([gradients(seed, 3) - gradients(seed, 0) for seed in range(200)])
    error = difference.std(0) / len(difference) ** 0.5
    assert (difference.mean(0).abs() <= 4.5 * error).all()


def test_systematic_resampling_rounds_each_count_up_or_down() -> None:
    shares = torch.rand(7, 40_000, generator=generator(0, 0)).softmax(0)
    shares[2], shares[5] = 0, shares[5] + shares[2]
    drawn = one_hot(systematic(shares, 4, generator(1, 0)), 7).sum(0).T
    assert (drawn.sum(0) == 4).all()
    assert ((drawn >= (4 * shares - 1e-5).floor()) & (drawn <= (4 * shares + 1e-5).ceil())).all()
    torch.testing.assert_close(drawn.double().mean(1), 4 * shares.double().mean(1), atol=0.01, rtol=0)


def test_free_bits_charge_only_the_kl_above() -> None:
    model, batch = GaussianVAE(VAEConfig(IMAGE, (5,), "mlp", (4,))), images(6).float()
    with torch.no_grad():
        kl = model.kl(model.encode(batch), model.prior().parameters).mean(0)
        bits = kl.median().item()  # two of the five variables have less
        free = negative_elbo(model, batch, generator(0, 0), temperature=1.0, free_bits=bits)
        none = negative_elbo(model, batch, generator(0, 0), temperature=1.0)
    excess = (kl.clamp_min(bits) - kl).sum().item()
    assert excess > 0
    assert (free.loss - none.loss).item() == pytest.approx(excess, abs=1e-5)


def test_straight_through_decodes_one_hot_codes_with_the_relaxed_gradient() -> None:
    """The chain rule by hand: d loss / d codes at the one-hot code, times d codes / d logits of the relaxed code."""
    torch.manual_seed(0)
    model, batch = GumbelVAE(VAEConfig(IMAGE, (2, 3), "mlp", ())).double(), images(4)
    loss = negative_elbo(model, batch, generator(0, 0), temperature=0.7, kl_weight=0.0, straight_through=True).loss
    weight = last_weight(model.encoder)
    found = torch.autograd.grad(loss, weight)[0]
    (logits,) = model.encode(batch)
    relaxed = model.sample((logits,), model.noise((4, 2, 3), generator(0, 0)), 0.7)
    code = nn.functional.one_hot(relaxed.argmax(-1), 3).double().requires_grad_()
    by_hand = -log_likelihood(model.decode(code), batch).mean()
    assert loss.item() == pytest.approx(by_hand.item())
    (at_code,) = torch.autograd.grad(by_hand, code)
    torch.testing.assert_close(found, torch.autograd.grad(relaxed, weight, at_code)[0])


def learn_prior(model: VAE, loss: Tensor, rate: float) -> None:
    own = list(model.parameters(recurse=False))
    model.learn_prior(torch.autograd.grad(loss, own, materialize_grads=True), rate)


def test_learned_prior_is_the_mean_posterior_with_the_least_kl() -> None:
    torch.manual_seed(0)
    model, batch = GumbelVAE(VAEConfig(IMAGE, (5, 3), "mlp", (4,))).double(), images(40)
    with torch.no_grad():
        model.prior_logits.normal_()
        last_weight(model.encoder).mul_(9)
    loss = negative_elbo(model, batch, generator(0, 0), temperature=1.0, kl_weight=0.3).loss
    learn_prior(model, loss, 1 / 0.3)
    posterior = model.encode(batch)
    torch.testing.assert_close(model.prior_logits[0].exp(), posterior[0].softmax(-1).mean(0))
    (gradient,) = torch.autograd.grad(model.prior().kl(model, posterior).mean(), model.prior_logits)
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("kind", [GaussianVAE, GumbelVAE])
def test_mixture_learns_by_expectation_maximization(kind: type[GaussianVAE] | type[GumbelVAE]) -> None:
    """At rate 1 a step is an iteration over the batch: a component's moments are weighted by responsibility."""
    torch.manual_seed(0)
    model, batch = kind(VAEConfig(IMAGE, (5, 3), "mlp", (4,), prior_components=3)).double(), images(40)
    model.set_prior(Mixture(torch.rand(3).log_softmax(0), tuple(map(torch.randn_like, model.prior().parameters))))
    with torch.no_grad():
        posterior, before = model.encode(batch), model.prior()
        shares = (before.log_weights - model.pairwise_kl(posterior, before.parameters)).softmax(1)
    loss = negative_elbo(model, batch, generator(0, 0), temperature=1.0, kl_weight=0.3).loss
    learn_prior(model, loss, 1 / 0.3)
    found = model.prior()
    torch.testing.assert_close(found.log_weights.exp(), shares.mean(0))

    def mean(values: Tensor) -> Tensor:
        return torch.einsum("nc,n...->c...", shares / shares.sum(0), values)

    if kind is GumbelVAE:
        torch.testing.assert_close(found.parameters[0].softmax(-1), mean(posterior[0].softmax(-1)))
    else:
        mu, log_var = posterior
        torch.testing.assert_close(found.parameters[0], mean(mu))
        torch.testing.assert_close(found.parameters[1].exp(), mean(mu**2 + log_var.exp()) - mean(mu) ** 2)


@pytest.mark.parametrize("kind", [GaussianVAE, GumbelVAE])
def test_component_far_from_all_images_stays_finite(kind: type[GaussianVAE] | type[GumbelVAE]) -> None:
    model, image = kind(VAEConfig(IMAGE, (5, 3), "mlp", (), prior_components=2)), torch.ones(1, *IMAGE)
    with torch.no_grad():
        last_weight(model.encoder)[:15] = 0
        last_weight(model.encoder)[15:] = -50  # for a Gaussian: variance nearly 0
    far = tuple(torch.stack([same[0], same[0] + 40 * torch.eye(5, 3)]) for same in model.prior().parameters)
    model.set_prior(Mixture(torch.zeros(2).log_softmax(0), far))
    for _ in range(3):
        loss = negative_elbo(model, image, generator(0, 0), temperature=1.0).loss
        learn_prior(model, loss, 1.0)
    prior = model.prior()
    assert prior.log_weights.exp().tolist() == pytest.approx([1, 0], abs=1e-5)
    assert all(tensor.isfinite().all() for tensor in (prior.log_weights, *prior.parameters))


def test_bound_is_exact_for_an_exact_posterior() -> None:
    """A linear encoder can be exact: log p(z | x) is linear in x for one variable and a linear decoder.

    Every importance weight is then p(x), a finite sum over all codes.
    """
    torch.manual_seed(0)
    model = GumbelVAE(VAEConfig(IMAGE, (1, 6), "mlp", ())).double().eval()
    encoder = model.encoder[1]
    assert isinstance(encoder, nn.Linear)
    with torch.no_grad():
        model.prior_logits.normal_()
        pixel_logits = model.decode(torch.eye(6, dtype=torch.float64)[:, None]).flatten(1)
        encoder.weight.copy_(pixel_logits)
        log_prior = model.prior_logits[0, 0].log_softmax(-1)
        encoder.bias.copy_(log_prior - nn.functional.softplus(pixel_logits).sum(1))
        every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64).reshape(16, *IMAGE)
        exact = torch.stack(
            [(log_likelihood(pixel_logits.reshape(6, *IMAGE), image) + log_prior).logsumexp(0) for image in every]
        )
        assert exact.exp().sum().item() == pytest.approx(1)
        for samples, at_a_time in ((1, 1), (7, 3), (50, 50)):
            [bound] = importance_weighted_bound(model, every, samples, generator(0, 0), at_a_time)
            torch.testing.assert_close(bound, exact, atol=1e-6, rtol=0)
        likelihood, kl = elbo_terms(model, every.repeat(20_000, 1, 1, 1), 0.0, generator(0, 0))
    elbo = (likelihood - kl).unflatten(0, (20_000, 16)).mean(0)
    torch.testing.assert_close(elbo, exact, atol=0.05, rtol=0)


def test_bound_does_not_depend_on_the_samples_per_call() -> None:
    model, batch = gaussian(), images(3)
    with torch.no_grad():
        one, other = (importance_weighted_bound(model, batch, 12, generator(0, 0), size) for size in (12, 5))
    torch.testing.assert_close(one, other, atol=0.5, rtol=0)  # the draws differ, their distribution does not
    assert torch.isfinite(one).all()


@pytest.mark.parametrize(("body", "width"), [("mlp", (4,)), ("mlp", ()), ("conv", (3, 4))])
def test_initial_bias_decodes_to_the_mean_image(body: str, width: tuple[int, ...]) -> None:
    model = GaussianVAE(VAEConfig((1, 8, 8), (2,), body, width))  # type: ignore[arg-type]  # a Literal
    mean = torch.from_numpy(np.random.default_rng(0).random((1, 8, 8), np.float32)) * 0.5
    set_initial_bias(model.decoder, mean)
    with torch.no_grad():
        found = torch.sigmoid(model.decode(torch.zeros(1, 2)))[0]
    if body == "mlp":
        torch.testing.assert_close(found, mean.clamp_min(1e-3))
    else:
        assert found.mean().item() == pytest.approx(mean.mean().item(), abs=0.01)


def test_gain_of_a_sample_replaces_its_weight_by_the_geometric_mean() -> None:
    weights = torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)
    [bound] = (weights.exp().mean(0)).log()
    for number, gain in enumerate(gains(weights)):
        others = [weight for other, weight in enumerate(weights[:, 0].tolist()) if other != number]
        replaced = math.log((sum(map(math.exp, others)) + math.exp(sum(others) / 2)) / 3)
        assert gain.item() == pytest.approx(bound.item() - replaced)


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_vimco_has_the_gradient_of_the_bound_on_average(kl_weight: float) -> None:
    """The exact gradient: the bound of two samples, summed over all pairs of codes."""
    torch.manual_seed(0)
    model = GumbelVAE(VAEConfig(IMAGE, (2, 2), "mlp", (4,), prior_components=3)).double()
    model.set_prior(Mixture(torch.rand(3).log_softmax(0), (torch.randn(3, 2, 2),)))
    image = images(1)
    codes = torch.eye(2, dtype=torch.float64)[torch.tensor(list(itertools.product(range(2), repeat=2)))]  # all 4 codes
    log_q = model.log_prob(codes, model.encode(image))
    densities = model.prior().log_prob(model, codes) - log_q
    weights = log_likelihood(model.decode(codes), image) + kl_weight * densities
    pairs = torch.logaddexp(weights[:, None], weights) - math.log(2)
    exact = gradient(model, -((log_q[:, None] + log_q).exp() * pairs).sum())
    repeats, same = 20, image.expand(2000, -1, -1, -1)
    found = torch.stack(
        [
            gradient(model, negative_vimco(model, same, generator(seed, 0), samples=2, kl_weight=kl_weight).loss)
            for seed in range(repeats)
        ]
    )
    error = found.std(0) / repeats**0.5
    assert ((found.mean(0) - exact).abs() <= 5 * error + 1e-9).all()
    assert exact.abs().max() > 10 * error.max()


def test_temperature_is_a_closed_form_of_the_step() -> None:
    def tau(step: int) -> float:
        return gumbel_temperature(step, start=1.0, minimum=0.5, rate=1e-4, every=500)

    assert tau(0) == tau(499) == 1.0
    assert tau(500) == tau(999) == math.exp(-0.05)
    assert tau(1000) == pytest.approx(tau(500) ** 2)  # a factor every 500 steps
    assert tau(10**9) == 0.5


def test_schedules_begin_and_end_at_their_limits() -> None:
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm_up(0, 0) == 1
    assert cosine_decay(0, 10) == 1
    assert cosine_decay(5, 10) == pytest.approx(0.5)
    assert 0 < cosine_decay(9, 10) < 0.03
