"""Bounds on log p(x) in nats, for training and evaluation, and the schedules of a training."""

from collections.abc import Callable, Sequence
from math import cos, exp, inf, log, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from reparam.models import VAE, Mixture

Count = Callable[[int], None]


class Terms(NamedTuple):
    """Result of an objective. The difference likelihood - kl is the ELBO (Kingma and Welling, 2014, equation 3).

    loss: scalar to minimize.
    likelihood: E_q log p(x | z), (n,) in nats, detached.
    kl: KL(q || p), (n,) in nats, detached; for a mixture prior the upper bound of Mixture.kl.
    """

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
    """Negative ELBO, kl_weight * KL(q || p) - E_q log p(x | z), with the KL in closed form (Mixture.kl).

    images: (n, C, H, W) in [0, 1].
    draws: generator of the noise.
    temperature: temperature of the latent samples.
    samples: latents per image for the expectation.
    kl_weight: weight of the KL term.
    free_bits: nats of KL that each variable may carry at no cost, in the mean over the images (Kingma et al., 2016,
        appendix C.8: sum over variables of max(free_bits, KL)).
    straight_through: decode one-hot codes, with the gradient of the relaxed codes (Jang, Gu and Poole, 2017, section
        2.2).

    Returns: the terms; the loss is the mean over the images.
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
    """Negative importance-weighted bound -log 1/k sum_i w_i, with k = `samples` and w_i = p(x, z_i) / q(z_i | x).

    Needs a Gaussian latent. Source: Burda, Grosse and Salakhutdinov, 2016, equation 8.

    images: (n, C, H, W) in [0, 1].
    draws: generator of the noise, and of the resampling.
    samples: latents per image.
    kl_weight: weight of log q - log p in log w_i.
    doubly: use the doubly reparameterized gradient for the encoder, whose signal-to-noise ratio does not fall with k
        (Tucker et al., 2019, equation 8): sum_i s_i^2  d log w_i / d z_i  d z_i / d phi with s_i = w_i / sum_j w_j. For
        a kl_weight b, (1 - b) s_i + b s_i^2 replaces s_i^2, because log w_i contains the score b times.
    resampled: number of samples with a gradient, drawn by weight s_i: the same gradient on average, with less memory
        and time, as few samples have most of the weight. 0: all samples.

    Returns: the terms; the loss is the mean over the images. With `doubly` or `resampled`, only the gradient of the
        loss is meant, not its value.
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
        # The loss gives the gradient of each sample the factor s_i, and the decoder's gradient keeps this factor. The
        # encoder's gradient passes through the latents and gets a further factor, (1 - b) + b s_i with b = kl_weight.
        again = _broadcast_to(1 - kl_weight + kl_weight * normalized, latents)
        latents.register_hook(lambda gradient: gradient * again)
    return Terms(loss, likelihoods.detach().mean(0), prior.kl(model, posterior).detach())


def systematic(weights: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Draw `count` rows of each column by weight (systematic resampling; Kitagawa, 1996).

    A row of weight w is drawn count * w times, rounded up or down at random with the right mean.

    weights: (samples, n), columns sum to 1.
    count: number of rows to draw.
    draws: generator of one uniform number for each column.

    Returns: row indices, int64 (count, n).
    """
    starts = torch.rand(weights.shape[1], generator=draws, device=weights.device, dtype=torch.float64)
    marks = (starts.unsqueeze(1) + torch.arange(count, device=weights.device)) / count
    drawn = torch.searchsorted(weights.double().cumsum(0).T.contiguous(), marks, right=True).T
    return drawn.clamp_max(len(weights) - 1)


def negative_vimco(
    model: VAE, images: Tensor, draws: torch.Generator, *, samples: int, kl_weight: float = 1.0
) -> Terms:
    """Negative importance-weighted bound for one-hot codes, with an unbiased gradient and no relaxation.

    The encoder follows the score function; the baseline of each sample comes from the other samples (VIMCO; Mnih and
    Rezende, 2016, equations 9 and 10). L is log 1/k sum_i w_i. In L_i, the geometric mean of the other weights replaces
    w_i. The gradient is

        sum_i (L - L_i)  d log q(z_i | x) / d phi  +  sum_i w_i / sum_j w_j  d log w_i / d phi.

    Arguments and result as in `negative_iwae`.
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
    """Gain L - L_i of each sample in `negative_vimco`: how much the sample raises the bound.

    log_weights: log w, (samples, n).

    Returns: (samples, n).
    """
    others = (log_weights.sum(0) - log_weights) / (len(log_weights) - 1)
    itself = torch.eye(len(log_weights), dtype=torch.bool, device=log_weights.device).unsqueeze(-1)
    without = torch.where(itself, others.unsqueeze(1), log_weights).logsumexp(1)  # sum over j of (i, j, n)
    return log_weights.logsumexp(0) - without


def elbo_terms(model: VAE, images: Tensor, temperature: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compute the two terms of the ELBO.

    images: (n, C, H, W) in [0, 1].
    temperature: temperature of the latents.

    Returns: E_q log p(x | z) from one latent per image, and KL(q || p), each (n,) in nats.
    """
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
    """Importance-weighted bound log 1/m sum_i p(x, z_i) / q(z_i | x), with one-hot codes for a Gumbel model.

    The sum runs in float64, so any number of samples fits in memory. Source: Burda, Grosse and Salakhutdinov, 2016,
    equation 8.

    images: (n, C, H, W) in [0, 1].
    samples: m, latents per image.
    at_a_time: samples per image in one call of the decoder.
    priors: priors p(z) to evaluate with the same latents; default: the model's prior.
    count: function called with the number of latents after each call of the decoder.

    Returns: (priors, n) float64, in nats.
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
    """Bernoulli log p(x | z) in nats: the sum over pixels x with logits l of x l - log(1 + e^l).

    pixel_logits, images: (..., C, H, W).

    Returns: (...).
    """
    logits = pixel_logits.flatten(-3)
    white: Tensor = torch.linalg.vecdot(images.flatten(-3).expand_as(logits), logits)
    return white - softplus(logits).sum(-1)


def gumbel_temperature(step: int, start: float, minimum: float, rate: float, every: int) -> float:
    """Temperature max(minimum, start * exp(-rate * t)) of a step (Jang, Gu and Poole, 2017, section 4).

    t is `step` rounded down to a multiple of `every`. The formula needs no earlier step, so a resumed run continues
    exactly.
    """
    return max(minimum, start * exp(-rate * (step - step % every)))


def warm_up(step: int, steps: int) -> float:
    """Weight of the KL term: rises from 0 to 1 over the first `steps` steps (Bowman et al., 2016)."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def cosine_decay(step: int, steps: int) -> float:
    """Factor of the learning rate: falls from 1 to 0 over `steps` steps (Loshchilov and Hutter, 2017)."""
    return 0.5 * (1 + cos(pi * step / steps))


def _draw(
    model: VAE, posterior: tuple[Tensor, ...], samples: int, temperature: float, draws: torch.Generator
) -> Tensor:
    """Draw `samples` latents for each image from the posterior: (samples, n, *latent_shape)."""
    return model.sample(posterior, model.noise((samples, *posterior[0].shape), draws), temperature)


def _log_q(model: VAE, latents: Tensor, posterior: tuple[Tensor, ...]) -> Tensor:
    """Log q(z | x), (samples, n)."""
    log_densities: Tensor = torch.vmap(model.log_prob, (0, None))(latents, posterior)
    return log_densities


def _log_p(model: VAE, latents: Tensor, prior: Mixture) -> Tensor:
    """Log p(z), (samples, n)."""
    log_densities: Tensor = prior.log_prob(model, latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    return log_densities


def _log_likelihoods(model: VAE, latents: Tensor, images: Tensor) -> Tensor:
    """Log p(x | z), (samples, n)."""
    pixel_logits: Tensor = model.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    return log_likelihood(pixel_logits, images)


def _broadcast_to(rows: Tensor, latents: Tensor) -> Tensor:
    """Append axes of size 1 to (samples, n) for broadcasting with (samples, n, *latent_shape)."""
    return rows.reshape(*rows.shape, *[1] * (latents.dim() - 2))
