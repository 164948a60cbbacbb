"""What training maximizes and evaluation reports: bounds on log p(x) in nats, and the schedules of their weights."""

from math import cos, exp, log, pi

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from models import GaussianVAE, GumbelVAE

VAE = GaussianVAE | GumbelVAE


def elbo_terms(model: VAE, images: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The two terms of the evidence lower bound, E_q log p(x | z) by one sample and KL(q || p) in closed form.

    images: (n, C, H, W) in [0, 1]. temperature: of the latent sample. Returns two (n,) in nats; their difference is
    the ELBO (Kingma and Welling, 2014, equation 3).
    """
    posterior = model.encode(images)
    latents = _draw(model, posterior, temperature, generator)
    return log_likelihood(model.decode(latents), images), model.kl(posterior, model.prior())


def importance_weighted_bound(model: VAE, images: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """log 1/m sum_i p(x, z_i) / q(z_i | x) with m samples from q, (n,) float64 in nats (Burda, Grosse and
    Salakhutdinov, 2016, equation 8). Gumbel codes are one-hot."""
    posterior = model.encode(images)
    prior = model.prior()
    weights = []
    for _ in range(samples):
        latents = _draw(model, posterior, model.default_temperature, generator)
        weight = log_likelihood(model.decode(latents), images)
        weights.append((weight + model.log_prob(latents, prior) - model.log_prob(latents, posterior)).double())
    return torch.stack(weights).logsumexp(0) - log(samples)


def log_likelihood(pixel_logits: Tensor, images: Tensor) -> Tensor:
    """Bernoulli log p(x | z) summed over pixels, (n,) in nats."""
    return -binary_cross_entropy_with_logits(pixel_logits, images, reduction="none").flatten(1).sum(1)


def gumbel_temperature(step: int, start: float, minimum: float, rate: float, every: int) -> float:
    """max(minimum, start * exp(-rate * t)), t the global step rounded down to a multiple of `every` (Jang, Gu and
    Poole, 2017, section 4). A closed form of the step: nothing compounds, and a resumed run goes on where it was."""
    return max(minimum, start * exp(-rate * (step - step % every)))


def warm_up(step: int, steps: int) -> float:
    """Weight of the KL term: from 0 to 1 over the first `steps` steps (Bowman et al., 2016)."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def cosine_decay(step: int, steps: int) -> float:
    """Factor of the learning rate: from 1 to 0 over `steps` steps (Loshchilov and Hutter, 2017)."""
    return 0.5 * (1 + cos(pi * step / steps))


def _draw(model: VAE, posterior: tuple[Tensor, ...], temperature: float, generator: torch.Generator) -> Tensor:
    noise = model.noise(tuple(posterior[0].shape), generator)
    return model.sample(posterior, noise, torch.full((len(noise),), temperature, device=noise.device))
