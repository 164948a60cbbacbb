"""VAE with a categorical latent, trained through the Gumbel-Softmax relaxation
(Jang, Gu and Poole, 2017, https://arxiv.org/abs/1611.01144; Maddison, Mnih and Teh, 2017, https://arxiv.org/abs/1611.00712).
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from reparam.models.bodies import VAEConfig, decoder, encoder
from reparam.models.mixture import Mixture, learn_weights

Parameters = tuple[Tensor, ...]  # logits: (n, D, K)
LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny  # that relaxes codes
VECTOR = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # float32 that a CPU takes at a time
LEAST_PROBABILITY = 1e-5  # of a category


class GumbelVAE(nn.Module):
    """p(z) = D independent variables of K categories with learned logits, or a learned mixture of such, q(z | x) =
    softmax(logits(x)), p(x | z) Bernoulli in every pixel."""

    kind: ClassVar[Literal["gumbel"]] = "gumbel"
    parameter_names: ClassVar = ("logits",)
    default_temperature: ClassVar = 0.0

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if len(config.latent_shape) != 2:
            raise ValueError(f"a Gumbel latent has the shape D x K, got {list(config.latent_shape)}")
        self.config = config
        self.encoder = encoder(config, prod(config.latent_shape))
        self.decoder = decoder(config)
        self.prior_weights = nn.Parameter(torch.zeros(config.prior_components))
        shape = (config.prior_components, *config.latent_shape)
        self.prior_logits = nn.Parameter(torch.zeros(shape))

    def prior(self) -> Mixture:
        """p(z)"""
        return Mixture(self.prior_weights.log_softmax(0), (self.prior_logits,))

    @torch.no_grad()
    def learn_prior(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Follow the gradient of a loss by the prior's logits, in its probabilities: p - rate * gradient, the
        natural gradient (Amari, 1998). Of the KL term that is p(z) less the mean of q(z | x) over the images, so p(z)
        becomes a running mean of what the encoder uses, where the term is least; with VIMCO, of the codes by their
        weights; each component of a mixture that of the images it is responsible for, which is expectation
        maximization online (Cappe and Moulines, 2009). (Under its free bits a variable has no gradient, and keeps its
        prior.) Steps of the size that suits weights leave p(z) behind an encoder that turns a variable over, and the
        variable is lost.

        gradients: by the module's own parameters, in their order. rate: the share of these images in the mean, over the
        weight that the KL term had.
        """
        weights_grad, logits_grad = gradients
        weights = learn_weights(self.prior_weights, weights_grad, rate).reshape(-1, 1, 1)
        prior = _over_categories(torch.softmax, self.prior_logits) - rate / weights * logits_grad
        self.prior_logits.copy_(prior.clamp_min(LEAST_PROBABILITY).log())

    @torch.no_grad()
    def set_prior(self, prior: Mixture) -> None:
        """Let p(z) be this, of as many components."""
        self.prior_weights.copy_(prior.log_weights)
        (logits,) = prior.parameters
        self.prior_logits.copy_(logits)

    def encode(self, images: Tensor) -> Parameters:
        """Images (n, C, H, W) in [0, 1] -> logits of q(z | x), (n, D, K)."""
        return (self.encoder(images).unflatten(1, self.config.latent_shape),)

    def decode(self, latents: Tensor) -> Tensor:
        """Codes (n, D, K), one-hot or relaxed -> pixel logits (n, C, H, W)."""
        return self.decoder(latents)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    @staticmethod
    def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard Gumbel draws of this shape, -log(-log(1 - u)) in float64, where a small u keeps all its digits."""
        u = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).clamp_min(2.0**-54)
        return -torch.log(-torch.log1p(-u)).float()

    @staticmethod
    def sample(parameters: Parameters, noise: Tensor, temperature: Tensor | float) -> Tensor:
        """Draw codes: softmax((logits + noise) / temperature) over K, and its limit one_hot(argmax(logits + noise))
        at temperature 0.

        parameters and noise: (n, D, K); temperature: (n,). Or one temperature for all, and noise (..., n, D, K). The
        argmax is an exact categorical draw (Gumbel-Max).
        """
        (logits,) = parameters
        # Centred first, so that large logits leave the noise its digits. By how much changes nothing: no gradient.
        scores = logits - logits.detach().amax(-1, keepdim=True) + noise
        scores = scores - scores.detach().amax(-1, keepdim=True)
        if not isinstance(temperature, Tensor):
            return _relaxed(scores, temperature) if temperature >= LEAST_TEMPERATURE else _one_hot(scores)
        temperature = temperature.reshape(-1, 1, 1)
        relaxes = temperature >= LEAST_TEMPERATURE
        return torch.where(relaxes, _relaxed(scores, torch.where(relaxes, temperature, 1.0)), _one_hot(scores))

    @staticmethod
    def log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """log of the probability of one-hot codes in nats, (n,)."""
        (logits,) = parameters
        return (latents * _over_categories(torch.log_softmax, logits)).flatten(1).sum(1)

    @staticmethod
    def pairwise_log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """The same of each code under each of C parameters: (n, D, K), (C, D, K) -> (n, C)."""
        (logits,) = parameters
        return latents.flatten(1) @ _over_categories(torch.log_softmax, logits).flatten(1).T

    @staticmethod
    def kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL(posterior || prior) of each variable in nats, (n, D), between the categories, not their relaxations;
        log-softmax, never log(p + eps)."""
        log_q, log_p = (_over_categories(torch.log_softmax, logits) for logits in (posterior[0], prior[0]))
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    @staticmethod
    def pairwise_kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL of each posterior from each of C parameters in nats: (n, D, K), (C, D, K) -> (n, C)."""
        log_q = _over_categories(torch.log_softmax, posterior[0])
        q = log_q.exp()
        return (q * log_q).flatten(1).sum(1, keepdim=True) - GumbelVAE.pairwise_log_prob(q, prior)

    @staticmethod
    def nearest(mixture: Mixture) -> Parameters:
        """The one distribution with the mixture's probabilities of each category, its logits (D, K): of all with
        independent variables the one with the least KL(mixture || it)."""
        (logits,) = mixture.parameters
        return ((mixture.log_weights.reshape(-1, 1, 1) + logits.log_softmax(-1)).logsumexp(0),)

    @staticmethod
    def most_likely(latents: Tensor, weights: Tensor) -> Parameters:
        """The parameters under which weighted codes have the largest log_prob, had each category been seen half a time
        more (Krichevsky and Trofimov, 1981), so that none is impossible.

        latents: one-hot codes (n, D, K). weights: (n, C), at least 0. Returns logits (C, D, K), normalized.
        """
        counts = torch.einsum("nc,ndk->cdk", weights, latents) + 0.5
        return (counts.log() - counts.sum(-1, keepdim=True).log(),)


def _relaxed(scores: Tensor, temperature: Tensor | float) -> Tensor:
    return _over_categories(torch.softmax, scores / temperature)


def _one_hot(scores: Tensor) -> Tensor:
    categories = torch.arange(scores.shape[-1], device=scores.device)
    return (scores.argmax(-1, keepdim=True) == categories).to(scores.dtype)


def _over_categories(function: Callable[[Tensor, int], Tensor], logits: Tensor) -> Tensor:
    """softmax or log_softmax over the last axis. On a CPU many rows that fill no vector take three to nine times as
    long as columns."""
    if logits.shape[-1] >= VECTOR or logits.is_cuda or torch.compiler.is_exporting():
        return function(logits, -1)
    return function(logits.transpose(-1, -2).contiguous(), -2).transpose(-1, -2)
