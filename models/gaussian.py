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
MIN_VARIANCE = 1e-4  # floor of each variance, because a component with few latents would shrink to a point


class GaussianVAE(nn.Module):
    """VAE with a Gaussian latent.

    p(z): N(0, I), or a learned mixture of Gaussians.
    q(z | x): N(mu(x), exp(log_var(x))), diagonal.
    p(x | z): independent Bernoulli pixels.

    config: architecture of encoder, decoder and prior.
    """

    kind: ClassVar[Literal["gaussian"]] = "gaussian"
    parameter_names: ClassVar = ("mu", "log_var")
    default_temperature: ClassVar = 1.0

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config, 2 * prod(config.latent_shape))
        self.decoder = decoder(config)
        register = nn.Parameter if config.prior_components > 1 else partial(nn.Buffer, persistent=False)
        shape = (config.prior_components, *config.latent_shape)
        self.prior_weights = register(torch.zeros(config.prior_components))
        self.prior_mu = register(torch.zeros(shape))
        self.prior_log_var = register(torch.zeros(shape))

    def prior(self) -> Mixture:
        """The prior p(z) as a mixture of `prior_components` components."""
        return Mixture(self.prior_weights.log_softmax(0), (self.prior_mu, self.prior_log_var))

    @torch.no_grad()
    def learn_prior(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Update a learned mixture by one step of online expectation maximization (Cappe and Moulines, 2009).

        The step is the natural gradient (Amari, 1998), as in GumbelVAE.learn_prior. Component c has the weight
        pi_c = softmax(prior_weights)_c, the mean mu_c and the variance s_c. g_pi, g_mu and g_log_s are the gradients of
        the loss by prior_weights, prior_mu and prior_log_var. With a_c = rate / pi_c:

            pi_c <- pi_c - rate * g_pi,   d_c = -a_c * s_c * g_mu,   mu_c <- mu_c + d_c,
            s_c  <- s_c * (1 - 2 * a_c * g_log_s) - d_c^2.

        Mean and variance of a component become running moments of the latents, weighted by the component's
        responsibility. A weight is at least MIN_WEIGHT, a variance at least MIN_VARIANCE.

        gradients: g_pi (C,), g_mu and g_log_s, each (C, *latent_shape). Empty for N(0, I): no update.
        rate: weight of this batch in the running moments, divided by the weight of the KL term.
        """
        if not gradients:
            return
        weights_grad, mu_grad, log_var_grad = gradients
        weights = learn_weights(self.prior_weights, weights_grad, rate)
        step = (rate / weights).reshape(-1, *[1] * len(self.config.latent_shape))
        variance = self.prior_log_var.exp()
        shift = -step * variance * mu_grad
        variance = variance * (1 - 2 * step * log_var_grad) - shift**2
        self.prior_mu.add_(shift)
        self.prior_log_var.copy_(variance.clamp_min(MIN_VARIANCE).log())

    @torch.no_grad()
    def set_prior(self, prior: Mixture) -> None:
        """Replace p(z) by a mixture with the same number of components and the same latent_shape."""
        self.prior_weights.copy_(prior.log_weights)
        mu, log_var = prior.parameters
        self.prior_mu.copy_(mu)
        self.prior_log_var.copy_(log_var)

    def encode(self, images: Tensor) -> Parameters:
        """Compute the parameters of q(z | x).

        images: (n, C, H, W), float32 in [0, 1].

        Returns: mu and log_var, each (n, *latent_shape).
        """
        mu, log_var = self.encoder(images).unflatten(1, (2, *self.config.latent_shape)).unbind(1)
        return mu, log_var

    def decode(self, latents: Tensor) -> Tensor:
        """Compute pixel logits: latents (n, *latent_shape) -> (n, C, H, W)."""
        return self.decoder(latents)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    @staticmethod
    def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw standard normal numbers of this shape, float32, on the generator's device."""
        return torch.randn(shape, generator=generator, device=generator.device)

    @staticmethod
    def sample(parameters: Parameters, noise: Tensor, temperature: Tensor | float) -> Tensor:
        """Draw latents by the reparameterization trick: z = mu + temperature * exp(0.5 * log_var) * noise.

        parameters: mu and log_var, each (n, *latent_shape).
        noise: (n, *latent_shape), standard normal; (..., n, *latent_shape) if temperature is a float.
        temperature: (n,), or a float for all rows. 0 gives mu.

        Returns: latents of noise's shape.
        """
        mu, log_var = parameters
        if isinstance(temperature, Tensor):
            temperature = temperature.reshape(-1, *[1] * (mu.dim() - 1))
        return mu + temperature * torch.exp(0.5 * log_var) * noise

    @staticmethod
    def log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """Log density log N(latents; mu, exp(log_var)).

        latents: (n, *latent_shape).
        parameters: mu and log_var, each (n, *latent_shape).

        Returns: (n,), in nats.
        """
        mu, log_var = parameters
        density = -0.5 * (log(2 * pi) + log_var + (latents - mu) ** 2 / log_var.exp())
        return density.flatten(1).sum(1)

    @staticmethod
    def pairwise_log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """Log density of each latent under each of C Gaussians.

        latents: (n, *latent_shape).
        parameters: mu and log_var of the C Gaussians, each (C, *latent_shape).

        Returns: (n, C), in nats.
        """
        z, mu, log_var = (tensor.flatten(1).double() for tensor in (latents, *parameters))  # squares cancel below
        precision = (-log_var).exp()
        squares = z**2 @ precision.T - 2 * z @ (precision * mu).T + (precision * mu**2).sum(1)
        return (-0.5 * (squares + (log(2 * pi) + log_var).sum(1))).to(latents.dtype)

    @staticmethod
    def kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL(posterior || prior) of each variable (Kingma and Welling, 2014, appendix B, for any two Gaussians).

        posterior: mu and log_var, each (n, *latent_shape).
        prior: mu and log_var, each (n, *latent_shape), or (1, *latent_shape) for all rows.

        Returns: (n, D), in nats, with D the number of elements of a latent.
        """
        (mu, log_var), (prior_mu, prior_log_var) = posterior, prior
        squares = (log_var.exp() + (mu - prior_mu) ** 2) / prior_log_var.exp()
        return 0.5 * (squares - 1 + prior_log_var - log_var).flatten(1)

    @staticmethod
    def pairwise_kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL(posterior || prior) of each posterior and each of C priors, summed over variables.

        posterior: mu and log_var, each (n, *latent_shape).
        prior: mu and log_var of the C priors, each (C, *latent_shape).

        Returns: (n, C), in nats.
        """
        mu, log_var = posterior
        entropy = 0.5 * (log(2 * pi) + 1 + log_var).flatten(1).sum(1, keepdim=True)
        spread = 0.5 * log_var.exp().flatten(1) @ (-prior[1]).exp().flatten(1).T
        return spread - entropy - GaussianVAE.pairwise_log_prob(mu, prior)

    @staticmethod
    def nearest(mixture: Mixture) -> Parameters:
        """The diagonal Gaussian g with the smallest KL(mixture || g): the mixture's mean and variances.

        Returns: mu and log_var, each (*latent_shape).
        """
        mu, log_var = mixture.parameters
        mean = torch.tensordot(mixture.log_weights.exp(), mu, 1)
        return mean, torch.tensordot(mixture.log_weights.exp(), log_var.exp() + (mu - mean) ** 2, 1).log()

    @staticmethod
    def most_likely(latents: Tensor, weights: Tensor) -> Parameters:
        """Maximum likelihood parameters of C Gaussians for weighted latents. A variance is at least MIN_VARIANCE.

        latents: (n, *latent_shape).
        weights: (n, C), at least 0: weight of each latent for each Gaussian.

        Returns: mu and log_var, each (C, *latent_shape).
        """
        z, weights = latents.double(), weights.double()  # float64: squares cancel below
        weights = weights / weights.sum(0)
        mu = torch.einsum("nc,n...->c...", weights, z)
        variance = torch.einsum("nc,n...->c...", weights, z**2) - mu**2
        return mu.to(latents.dtype), variance.clamp_min(MIN_VARIANCE).log().to(latents.dtype)
