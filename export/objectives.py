"""What training maximizes and evaluation reports: bounds on log p(x) in nats, and the schedules of their weights."""

from collections.abc import Callable, Sequence
from math import cos, exp, inf, log, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from reparam.models import VAE, Mixture

Count = Callable[[int], None]


class Terms(NamedTuple):
    """What a step of training minimizes, a scalar, and what it saw, each (n,) in nats and detached: E_q log p(x | z)
    and KL(q || p), whose difference is the ELBO (Kingma and Welling, 2014, equation 3). From a mixture it is the upper
    bound of Mixture.kl, and the difference no more than the ELBO."""

    loss: Tensor
    likelihood: Tensor
    kl: Tensor


def negative_elbo(
    model: VAE,
    images: Tensor,
    draws: torch.Generator,
    *,
    temperature: float,
    samples: int = 1,
    kl_weight: float = 1.0,
    free_bits: float = 0.0,
    straight_through: bool = False,
) -> Terms:
    """kl_weight * KL(q || p) - E_q log p(x | z), the first in the closed form of Mixture.kl, the second by the mean of
    `samples`.

    images: (n, C, H, W) in [0, 1]. temperature: of the latent samples.
    free_bits: nats that each variable may carry, in the mean over the images, at no cost (Kingma et al., 2016,
        appendix C.8: sum over variables of max(free_bits, KL)).
    straight_through: decode one-hot codes, but pass the gradient of the relaxed ones (Jang, Gu and Poole, 2017,
        section 2.2).
    """
    posterior = model.encode(images)
    latents = _draw(model, posterior, samples, temperature, draws)
    if straight_through:
        nearest = one_hot(latents.argmax(-1), latents.shape[-1])
        latents = nearest + latents - latents.detach()
    likelihood = _log_likelihoods(model, latents, images).mean(0)
    prior = model.prior()
    if free_bits:
        kls = model.kl(posterior, prior.parameters)
        kl, cost = kls.sum(1), kls.mean(0).clamp_min(free_bits).sum()
    else:
        kl = prior.kl(model, posterior)
        cost = kl.mean()
    return Terms(kl_weight * cost - likelihood.mean(), likelihood.detach(), kl.detach())


def negative_iwae(
    model: VAE,
    images: Tensor,
    draws: torch.Generator,
    *,
    samples: int,
    kl_weight: float = 1.0,
    doubly: bool = False,
    resampled: int = 0,
) -> Terms:
    """-log 1/k sum_i w_i with k = `samples` and w_i = p(x, z_i) / q(z_i | x) (Burda, Grosse and Salakhutdinov, 2016,
    equation 8); for a latent with a density.

    kl_weight: of log q - log p in log w_i.
    doubly: let the encoder follow the doubly reparameterized gradient, whose signal does not drown in noise as k grows
        (Tucker et al., 2019, equation 8): sum_i s_i^2  d log w_i / d z_i  d z_i / d phi with s_i = w_i / sum_j w_j,
        and with a kl_weight of b, (1 - b) s_i + b s_i^2 in place of s_i^2: the score is in w_i b times.
    resampled: follow only so many of the samples backwards, drawn by their s_i, for the others have little weight: the
        same gradient in the mean, in the memory of these few. 0: all of them.
    """
    posterior = model.encode(images)
    density = tuple(parameter.detach() for parameter in posterior) if doubly else posterior
    noise, prior = model.noise((samples, *posterior[0].shape), draws), model.prior()

    def weigh(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents = model.sample(posterior, noise, model.default_temperature)
        parts = [_log_likelihoods(model, part, images) for part in latents.split(resampled or samples)]
        likelihoods = torch.cat(parts)
        kls = _log_q(model, latents, density) - _log_p(model, latents, prior)
        return latents, likelihoods, likelihoods - kl_weight * kls

    if resampled:
        with torch.no_grad():
            _, likelihoods, log_weights = weigh(noise)
        normalized = log_weights.softmax(0)
        chosen = systematic(normalized, resampled, draws)
        normalized = normalized.take_along_dim(chosen, 0)
        latents, _, log_weights = weigh(noise.take_along_dim(_broadcast_to(chosen, noise), 0))
        loss = -log_weights.mean()
    else:
        latents, likelihoods, log_weights = weigh(noise)
        normalized = log_weights.detach().softmax(0)
        loss = -(normalized * log_weights).sum(0).mean() if doubly else log(samples) - log_weights.logsumexp(0).mean()
    if doubly:
        # Each sample's gradient comes multiplied by its s_i. The decoder keeps that; what goes on to the encoder is
        # multiplied once more.
        again = _broadcast_to(1 - kl_weight + kl_weight * normalized, latents)
        latents.register_hook(lambda gradient: gradient * again)
    return Terms(loss, likelihoods.detach().mean(0), prior.kl(model, posterior).detach())


def systematic(weights: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Draw `count` of each column's rows by weights that sum to 1, (samples, n) -> (count, n): one of weight w is drawn
    count w times, rounded up or down at random so that the mean is right (systematic resampling; Kitagawa, 1996)."""
    starts = torch.rand(weights.shape[1], generator=draws, device=weights.device, dtype=torch.float64)
    marks = (starts.unsqueeze(1) + torch.arange(count, device=weights.device)) / count
    drawn = torch.searchsorted(weights.double().cumsum(0).T.contiguous(), marks, right=True).T
    return drawn.clamp_max(len(weights) - 1)


def negative_vimco(
    model: VAE, images: Tensor, draws: torch.Generator, *, samples: int, kl_weight: float = 1.0
) -> Terms:
    """As negative_iwae, for codes that are one-hot: no relaxation, and no bias. The encoder follows the score function,
    each sample judged against the others (VIMCO; Mnih and Rezende, 2016, equations 9 and 10): with
    L = log 1/k sum_i w_i and L_i the same with w_i replaced by the geometric mean of the others,

        sum_i (L - L_i)  d log q(z_i | x) / d phi  +  sum_i w_i / sum_j w_j  d log w_i / d phi.
    """
    posterior = model.encode(images)
    latents = _draw(model, tuple(parameter.detach() for parameter in posterior), samples, 0.0, draws)
    likelihoods = _log_likelihoods(model, latents, images)
    prior, log_q = model.prior(), _log_q(model, latents, posterior)
    log_weights = likelihoods - kl_weight * (log_q - _log_p(model, latents, prior))
    bound = log_weights.logsumexp(0) - log(samples)
    loss = -(bound + (gains(log_weights.detach()) * log_q).sum(0)).mean()
    return Terms(loss, likelihoods.detach().mean(0), prior.kl(model, posterior).detach())


def gains(log_weights: Tensor) -> Tensor:
    """What each sample adds to the bound, L - L_i of negative_vimco; log_weights: log w, (samples, n)."""
    others = (log_weights.sum(0) - log_weights) / (len(log_weights) - 1)
    itself = torch.eye(len(log_weights), dtype=torch.bool, device=log_weights.device).unsqueeze(-1)
    without = torch.where(itself, others.unsqueeze(1), log_weights).logsumexp(1)  # of the matrix (i, j, n), over j
    return log_weights.logsumexp(0) - without


def elbo_terms(model: VAE, images: Tensor, temperature: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """The two terms of the evidence lower bound, E_q log p(x | z) by one sample and KL(q || p), (n,) each in nats."""
    terms = negative_elbo(model, images, draws, temperature=temperature)
    return terms.likelihood, terms.kl


def importance_weighted_bound(
    model: VAE,
    images: Tensor,
    samples: int,
    draws: torch.Generator,
    at_a_time: int = 1,
    priors: Sequence[Mixture] | None = None,
    count: Count = lambda latents: None,
) -> Tensor:
    """log 1/m sum_i p(x, z_i) / q(z_i | x) with m samples from q in nats (Burda, Grosse and Salakhutdinov, 2016,
    equation 8), for each prior p(z), (priors, n) float64. Gumbel codes are one-hot. The sum runs in float64 as samples
    come.

    at_a_time: samples that are decoded together. priors: default: the model's own alone. count: is told of latents as
        they are decoded.
    """
    posterior, priors = model.encode(images), priors or [model.prior()]
    total = torch.full((len(priors), len(images)), -inf, dtype=torch.float64, device=images.device)
    for begin in range(0, samples, at_a_time):
        latents = _draw(model, posterior, min(at_a_time, samples - begin), model.default_temperature, draws)
        without_prior = _log_likelihoods(model, latents, images) - _log_q(model, latents, posterior)
        log_weights = torch.stack([without_prior + _log_p(model, latents, prior) for prior in priors])
        total = torch.logaddexp(total, log_weights.double().logsumexp(1))
        count(without_prior.numel())
    return total - log(samples)


def log_likelihood(pixel_logits: Tensor, images: Tensor) -> Tensor:
    """Bernoulli log p(x | z) in nats, the sum over pixels x and their logits l of x l - log(1 + e^l);
    (..., C, H, W) -> (...)."""
    logits = pixel_logits.flatten(-3)
    white: Tensor = torch.linalg.vecdot(images.flatten(-3).expand_as(logits), logits)
    return white - softplus(logits).sum(-1)


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


def _draw(
    model: VAE, posterior: tuple[Tensor, ...], samples: int, temperature: float, draws: torch.Generator
) -> Tensor:
    """(samples, n, *latent_shape)"""
    return model.sample(posterior, model.noise((samples, *posterior[0].shape), draws), temperature)


def _log_q(model: VAE, latents: Tensor, posterior: tuple[Tensor, ...]) -> Tensor:
    """log q(z | x), (samples, n)."""
    log_densities: Tensor = torch.vmap(model.log_prob, (0, None))(latents, posterior)
    return log_densities


def _log_p(model: VAE, latents: Tensor, prior: Mixture) -> Tensor:
    """log p(z), (samples, n)."""
    log_densities: Tensor = prior.log_prob(model, latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    return log_densities


def _log_likelihoods(model: VAE, latents: Tensor, images: Tensor) -> Tensor:
    """log p(x | z), (samples, n)."""
    pixel_logits: Tensor = model.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    return log_likelihood(pixel_logits, images)


def _broadcast_to(rows: Tensor, latents: Tensor) -> Tensor:
    """Append axes of 1, so that (samples, n) broadcasts against latents (samples, n, *latent_shape)."""
    return rows.reshape(*rows.shape, *[1] * (latents.dim() - 2))
