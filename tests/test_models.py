"""The distributions, compared with values computed in another way."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.nn.functional import conv_transpose2d

from reparam.export.draws import generator
from reparam.export.objectives import elbo_terms, importance_weighted_bound, log_likelihood
from reparam.models import MODELS, GaussianVAE, GumbelVAE, Mixture, VAEConfig

SHAPES = [(1, 28, 28), (1, 8, 8), (3, 7, 10), (1, 5, 1)]


@pytest.mark.parametrize("image_shape", SHAPES)
@pytest.mark.parametrize("body", ["mlp", "conv"])
@pytest.mark.parametrize(("kind", "latent"), [("gaussian", (4,)), ("gaussian", (2, 3, 3)), ("gumbel", (3, 5))])
def test_shapes_of_encoder_and_decoder(
    kind: str, latent: tuple[int, ...], body: str, image_shape: tuple[int, int, int]
) -> None:
    dense = (6,) if body == "conv" else ()
    model = MODELS[kind](VAEConfig(image_shape, latent, body, (4, 8), dense))  # type: ignore[arg-type]  # a Literal
    parameters = model.encode(torch.rand(2, *image_shape))
    assert [tuple(parameter.shape) for parameter in parameters] == [(2, *latent)] * len(model.parameter_names)
    assert model.decode(parameters[0]).shape == (2, *image_shape)


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (1, 7, 10)])
def test_convolution_to_one_channel_equals_torchs_convolution(image_shape: tuple[int, int, int]) -> None:
    *_, last = GaussianVAE(VAEConfig(image_shape, (4,), "conv", (6,))).decoder.double()
    assert isinstance(last, torch.nn.ConvTranspose2d)
    assert last.bias is not None
    torch.nn.init.normal_(last.bias)
    values = torch.randn(5, 6, *((size + 1) // 2 for size in image_shape[1:]), dtype=torch.float64, requires_grad=True)
    images = last(values)
    expected = conv_transpose2d(values, last.weight, last.bias, stride=2, padding=1)
    torch.testing.assert_close(images, expected)
    inputs, pull = (values, last.weight, last.bias), torch.randn_like(images)
    torch.testing.assert_close(torch.autograd.grad(images, inputs, pull), torch.autograd.grad(expected, inputs, pull))


def test_both_kinds_define_the_same_names_in_the_same_order() -> None:
    def names(kind: type) -> list[str]:
        return [name for name in vars(kind) if not name.startswith("__") or name == "__init__"]

    assert names(GaussianVAE) == names(GumbelVAE)


def test_gaussian_kl_and_density_equal_scipys() -> None:
    mu, log_var, prior_mu, prior_log_var = (torch.tensor([[value]]) for value in (0.7, -0.4, -0.2, 0.5))
    q = stats.norm(0.7, math.exp(-0.2))
    p = stats.norm(-0.2, math.exp(0.25))
    expected, _ = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), -12, 12)
    kl = GaussianVAE.kl((mu, log_var), (prior_mu, prior_log_var))
    assert kl.item() == pytest.approx(expected, abs=1e-6)
    model = GaussianVAE(VAEConfig((1, 2, 2), (1,), "mlp", (4,)))
    density = model.log_prob(torch.tensor([[1.5]]), (mu, log_var))
    assert density.item() == pytest.approx(q.logpdf(1.5), abs=1e-6)


def test_gumbel_kl_and_probability_equal_finite_sums() -> None:
    model = GumbelVAE(VAEConfig((1, 2, 2), (2, 3), "mlp", (4,)))
    q, p = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    codes = torch.eye(3, dtype=torch.float64)[torch.tensor(list(itertools.product(range(3), repeat=2)))]
    log_q = model.log_prob(codes, (q,))
    assert log_q.exp().sum().item() == pytest.approx(1)
    expected = (log_q.exp() * (log_q - model.log_prob(codes, (p,)))).sum().item()
    assert GumbelVAE.kl((q,), (p,)).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize("model", [GaussianVAE, GumbelVAE])
def test_pairwise_kl_equals_the_sum_over_variables(model: type[GaussianVAE] | type[GumbelVAE]) -> None:
    draws = torch.Generator().manual_seed(0)
    posterior, components = (
        tuple(torch.randn(n, 4, 3, generator=draws, dtype=torch.float64) for _ in model.parameter_names) for n in (5, 2)
    )
    one_by_one = [model.kl(posterior, tuple(each[c : c + 1] for each in components)).sum(1) for c in range(2)]
    torch.testing.assert_close(model.pairwise_kl(posterior, components), torch.stack(one_by_one, 1))


def test_mixture_kl_is_an_upper_bound() -> None:
    model = GumbelVAE(VAEConfig((1, 2, 2), (2, 3), "mlp", (4,)))
    draws = torch.Generator().manual_seed(0)
    codes = torch.eye(3, dtype=torch.float64)[torch.tensor(list(itertools.product(range(3), repeat=2)))]
    mixture = Mixture(torch.full((4,), -math.log(4)), (torch.randn(4, 2, 3, generator=draws, dtype=torch.float64),))
    some = torch.randn(1, 2, 3, generator=draws, dtype=torch.float64)
    for q in (some, 5 * some, 1000 * codes[2:3]):
        log_q = model.log_prob(codes, (q,))
        exact = (log_q.exp() * (log_q - mixture.log_prob(model, codes))).sum().item()
        bound = mixture.kl(model, (q,)).item()
        assert exact - 1e-9 <= bound <= exact + math.log(4)
    assert bound == pytest.approx(exact)  # the last posterior is a single code


def test_nearest_distribution_has_the_mean_and_the_variance_of_a_mixture() -> None:
    weights = torch.tensor([0.25, 0.75])
    mu, log_var = torch.tensor([[[3.0]], [[-1.0]]]), torch.tensor([[[4.0]], [[0.25]]]).log()
    mean, log_variance = GaussianVAE.nearest(Mixture(weights.log(), (mu, log_var)))
    assert mean.item() == pytest.approx(0)
    assert log_variance.exp().item() == pytest.approx(0.25 * (4 + 9) + 0.75 * (0.25 + 1))
    (logits,) = GumbelVAE.nearest(Mixture(weights.log(), (torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]]]).log() + 3,)))
    torch.testing.assert_close(logits.exp(), torch.tensor([[0.5, 0.5]]))


def test_importance_weighted_bound_reaches_the_exact_likelihood_of_a_tiny_model() -> None:
    torch.manual_seed(0)
    model = GumbelVAE(VAEConfig((1, 2, 2), (2, 3), "mlp", (4,))).eval()
    images = torch.bernoulli(torch.full((3, 1, 2, 2), 0.5))
    codes = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=2)))]  # all 9 codes
    with torch.inference_mode():
        prior = model.prior().log_prob(model, codes)
        decoded = model.decode(codes)
        exact = torch.stack(
            [(log_likelihood(decoded, image.expand(9, -1, -1, -1)) + prior).logsumexp(0) for image in images]
        )
        [bound] = importance_weighted_bound(model, images, 4000, generator(0, 0))
        likelihood, kl = elbo_terms(model, images.repeat(3000, 1, 1, 1), 0.0, generator(1, 0))
    torch.testing.assert_close(bound.float(), exact, atol=0.03, rtol=0)
    assert ((likelihood - kl).unflatten(0, (3000, 3)).mean(0) < exact + 0.03).all()


def test_temperature_0_gives_one_hot_codes_and_finite_gradients() -> None:
    logits = torch.randn(4, 3, 5, requires_grad=True)
    noise = GumbelVAE.noise((4, 3, 5), generator(0, 0))
    temperature = torch.tensor([0.0, 1e-40, 0.5, 2.0])
    codes = GumbelVAE.sample((logits,), noise, temperature)
    assert set(codes[:2].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(codes.argmax(-1), (logits + noise).argmax(-1))
    codes.square().sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", [GaussianVAE, GumbelVAE])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_float_temperature_equals_a_temperature_for_each_row(
    kind: type[GaussianVAE | GumbelVAE], temperature: float
) -> None:
    torch.manual_seed(0)
    parameters = tuple(torch.randn(4, 3, 5) for _ in kind.parameter_names)
    noise = kind.noise((2, 4, 3, 5), generator(0, 0))
    together = kind.sample(parameters, noise, temperature)
    for one, drawn in zip(noise, together, strict=True):
        assert torch.equal(drawn, kind.sample(parameters, one, torch.full((4,), temperature)))


@pytest.mark.parametrize("categories", [1, 3, 10, 20])
def test_relaxed_codes_are_the_softmax_over_categories(categories: int) -> None:
    logits = torch.randn(4, 3, categories)
    noise = GumbelVAE.noise((4, 3, categories), generator(0, 0))
    relaxed = GumbelVAE.sample((logits,), noise, 0.5)
    torch.testing.assert_close(relaxed, ((logits + noise) / 0.5).softmax(-1))
    found = GumbelVAE.log_prob(relaxed, (logits,))
    torch.testing.assert_close(found, (relaxed * logits.log_softmax(-1)).sum((1, 2)))


def test_noise_follows_its_distribution() -> None:
    for model, law in ((GaussianVAE, stats.norm), (GumbelVAE, stats.gumbel_r)):
        draws = model.noise((100_000,), generator(0, 0)).numpy()
        assert draws.dtype == np.float32
        assert stats.kstest(draws, law.cdf).pvalue > 0.001


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": (), "body": "conv"}, r"width must hold positive sizes, got \[\]"),
        ({"latent_shape": (3, 0)}, r"latent_shape must hold positive sizes, got \[3, 0\]"),
        ({"dense": (4,)}, "dense belongs to the convolutions"),
    ],
)
def test_impossible_configuration_is_refused(changes: dict[str, tuple[int, ...]], says: str) -> None:
    config = {"image_shape": (1, 8, 8), "latent_shape": (3,), "body": "mlp", "width": (4,)}
    with pytest.raises(ValueError, match=says):
        VAEConfig(**(config | changes))  # type: ignore[arg-type]  # each field has its own type
