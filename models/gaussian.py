"""VAE with a Gaussian latent (Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114)."""

from collections.abc import Sequence
from functools import partial
from math import log, pi, prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from reparam.models.bodies import VAEConfig, decoder, encoder
from reparam.models.mixture import Mixture, learn_weights

Parameters = tuple[Tensor, ...]  # mu, log_var: each (n, *latent_shape)
LEAST_VARIANCE = 1e-4  # of a component that few latents are near


class GaussianVAE(nn.Module):
    """p(z) = N(0, I) or a learned mixture of Gaussians, q(z | x) = N(mu(x), sigma(x)^2), p(x | z) Bernoulli in every
    pixel."""

    kind: ClassVar[Literal["gaussian"]] = "gaussian"
    parameter_names: ClassVar = ("mu", "log_var")
    default_temperature: ClassVar = 1.0

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config, 2 * prod(config.latent_shape))
        self.decoder = decoder(config)
        hold = nn.Parameter if config.prior_components > 1 else partial(nn.Buffer, persistent=False)
        shape = (config.prior_components, *config.latent_shape)
        self.prior_weights = hold(torch.zeros(config.prior_components))
        self.prior_mu = hold(torch.zeros(shape))
        self.prior_log_var = hold(torch.zeros(shape))

    def prior(self) -> Mixture:
        """p(z)"""
        return Mixture(self.prior_weights.log_softmax(0), (self.prior_mu, self.prior_log_var))

    @torch.no_grad()
    def learn_prior(self, gradients: Sequence[Tensor], rate: float) -> None:
        """As GumbelVAE.learn_prior: each component's mean and variance become running ones of the latents that it is
        responsible for, which is expectation maximization online. N(0, I), which has no gradients, stays as it is."""
        if not gradients:
            return
        weights_grad, mu_grad, log_var_grad = gradients
        weights = learn_weights(self.prior_weights, weights_grad, rate)
        step = (rate / weights).reshape(-1, *[1] * len(self.config.latent_shape))
        variance = self.prior_log_var.exp()
        shift = -step * variance * mu_grad
        variance = variance * (1 - 2 * step * log_var_grad) - shift**2
        self.prior_mu.add_(shift)
        self.prior_log_var.copy_(variance.clamp_min(LEAST_VARIANCE).log())

    @torch.no_grad()
    def set_prior(self, prior: Mixture) -> None:
        """Let p(z) be this, of as many components."""
        self.prior_weights.copy_(prior.log_weights)
        mu, log_var = prior.parameters
        self.prior_mu.copy_(mu)
        self.prior_log_var.copy_(log_var)

    def encode(self, images: Tensor) -> Parameters:
        """Images (n, C, H, W) in [0, 1] -> mu and log_var of q(z | x), each (n, *latent_shape)."""
        mu, log_var = self.encoder(images).unflatten(1, (2, *self.config.latent_shape)).unbind(1)
        return mu, log_var

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) -> pixel logits (n, C, H, W)."""
        return self.decoder(latents)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    @staticmethod
    def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal draws of this shape."""
        return torch.randn(shape, generator=generator, device=generator.device)

    @staticmethod
    def sample(parameters: Parameters, noise: Tensor, temperature: Tensor | float) -> Tensor:
        """Draw latents by the reparameterization trick, z = mu + temperature * exp(0.5 * log_var) * noise.

        parameters and noise: (n, *latent_shape); temperature: (n,), 0 gives mu. Or one temperature for all, and noise
        (..., n, *latent_shape).
        """
        mu, log_var = parameters
        if isinstance(temperature, Tensor):
            temperature = temperature.reshape(-1, *[1] * (mu.dim() - 1))
        return mu + temperature * torch.exp(0.5 * log_var) * noise

    @staticmethod
    def log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """log N(latents; mu, exp(log_var)) in nats, (n,)."""
        mu, log_var = parameters
        density = -0.5 * (log(2 * pi) + log_var + (latents - mu) ** 2 / log_var.exp())
        return density.flatten(1).sum(1)

    @staticmethod
    def pairwise_log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """The same of each latent under each of C parameters: (n, *latent_shape), (C, *latent_shape) -> (n, C)."""
        z, mu, log_var = (tensor.flatten(1).double() for tensor in (latents, *parameters))  # squares cancel below
        precision = (-log_var).exp()
        squares = z**2 @ precision.T - 2 * z @ (precision * mu).T + (precision * mu**2).sum(1)
        return (-0.5 * (squares + (log(2 * pi) + log_var).sum(1))).to(latents.dtype)

    @staticmethod
    def kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL(posterior || prior) of each variable in nats, (n, D); Kingma and Welling, appendix B, for any two
        Gaussians."""
        (mu, log_var), (prior_mu, prior_log_var) = posterior, prior
        squares = (log_var.exp() + (mu - prior_mu) ** 2) / prior_log_var.exp()
        return 0.5 * (squares - 1 + prior_log_var - log_var).flatten(1)

    @staticmethod
    def pairwise_kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL of each posterior from each of C parameters in nats: (n, *latent_shape), (C, *latent_shape) -> (n, C)."""
        mu, log_var = posterior
        entropy = 0.5 * (log(2 * pi) + 1 + log_var).flatten(1).sum(1, keepdim=True)
        spread = 0.5 * log_var.exp().flatten(1) @ (-prior[1]).exp().flatten(1).T
        return spread - entropy - GaussianVAE.pairwise_log_prob(mu, prior)

    @staticmethod
    def nearest(mixture: Mixture) -> Parameters:
        """The one Gaussian with the mixture's mean and variances, each (*latent_shape): of all with a diagonal
        covariance the one with the least KL(mixture || it)."""
        mu, log_var = mixture.parameters
        mean = torch.tensordot(mixture.log_weights.exp(), mu, 1)
        return mean, torch.tensordot(mixture.log_weights.exp(), log_var.exp() + (mu - mean) ** 2, 1).log()

    @staticmethod
    def most_likely(latents: Tensor, weights: Tensor) -> Parameters:
        """The parameters under which weighted latents have the largest log_prob.

        latents: (n, *latent_shape). weights: (n, C), at least 0. Returns mu and log_var, each (C, *latent_shape).
        """
        z, weights = latents.double(), weights.double()  # squares cancel below
        weights = weights / weights.sum(0)
        mu = torch.einsum("nc,n...->c...", weights, z)
        variance = torch.einsum("nc,n...->c...", weights, z**2) - mu**2
        return mu.to(latents.dtype), variance.clamp_min(LEAST_VARIANCE).log().to(latents.dtype)
