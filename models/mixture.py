"""A mixture prior: components are distributions of the model's kind."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MIN_WEIGHT = 1e-6  # floor of a component's weight in a learned prior


class Family(Protocol):
    """The family of a mixture's components: GaussianVAE or GumbelVAE. Shapes and units are documented there."""

    def pairwise_log_prob(self, latents: Tensor, parameters: tuple[Tensor, ...], /) -> Tensor: ...

    def pairwise_kl(self, posterior: tuple[Tensor, ...], prior: tuple[Tensor, ...], /) -> Tensor: ...
    def kl(self, posterior: tuple[Tensor, ...], prior: tuple[Tensor, ...], /) -> Tensor: ...


class Mixture(NamedTuple):
    """p(z) = sum_c weight_c p(z; parameters_c).

    log_weights: (C,), logarithms of weights that sum to 1.
    parameters: one tensor (C, *latent_shape) for each parameter of the family.
    """

    log_weights: Tensor
    parameters: tuple[Tensor, ...]

    def to(self, device: torch.device) -> "Mixture":
        """Copy the mixture to the device."""
        return Mixture(self.log_weights.to(device), tuple(parameter.to(device) for parameter in self.parameters))

    def log_joint(self, family: Family, latents: Tensor) -> Tensor:
        """Log of weight_c p(z; parameters_c) for each component: latents (n, *latent_shape) -> (n, C), in nats."""
        return self.log_weights + family.pairwise_log_prob(latents, self.parameters)

    def log_prob(self, family: Family, latents: Tensor) -> Tensor:
        """Log density: latents (n, *latent_shape) -> (n,), in nats."""
        return self.log_joint(family, latents).logsumexp(1)

    def kl(self, family: Family, posterior: tuple[Tensor, ...]) -> Tensor:
        """KL(posterior || self) for one component, an upper bound of the KL for more components.

        The bound is -log sum_c weight_c exp(-KL(posterior || p_c)) (Hershey and Olsen, 2007). An ELBO with this KL term
        is still a lower bound on log p(x).

        posterior: parameters of q(z | x), as from `encode`, each (n, *latent_shape).

        Returns: (n,), in nats.
        """
        if len(self.log_weights) == 1:
            return family.kl(posterior, self.parameters).sum(1)
        return -(self.log_weights - family.pairwise_kl(posterior, self.parameters)).logsumexp(1)

    def draw(self, rows: int, draws: torch.Generator) -> tuple[Tensor, ...]:
        """Draw a component for each row.

        rows: number of rows.
        draws: generator of the choices.

        Returns: the components' parameters, each (rows, *latent_shape).
        """
        components = torch.multinomial(self.log_weights.exp(), rows, replacement=True, generator=draws)
        return tuple(parameter[components] for parameter in self.parameters)


@torch.no_grad()
def learn_weights(logits: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Update the weights of a mixture: weights <- max(weights - rate * gradient, MIN_WEIGHT).

    logits: (C,); softmax gives the weights. Replaced in place by the logarithms of the new weights.
    gradient: (C,), gradient of the loss by the logits.
    rate: step size.

    Returns: the new weights, (C,).
    """
    weights = (logits.softmax(0) - rate * gradient).clamp_min(MIN_WEIGHT)
    logits.copy_(weights.log())
    return weights
