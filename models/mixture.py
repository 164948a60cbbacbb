"""A prior that is a mixture of distributions of the model's kind."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LEAST_WEIGHT = 1e-6  # of a component


class Family(Protocol):
    """What a mixture asks of its components' family of distributions: of a GaussianVAE or a GumbelVAE."""

    def pairwise_log_prob(self, latents: Tensor, parameters: tuple[Tensor, ...], /) -> Tensor: ...

    def pairwise_kl(self, posterior: tuple[Tensor, ...], prior: tuple[Tensor, ...], /) -> Tensor: ...
    def kl(self, posterior: tuple[Tensor, ...], prior: tuple[Tensor, ...], /) -> Tensor: ...


class Mixture(NamedTuple):
    """p(z) = sum_c weight_c p(z; parameters_c).

    log_weights: (C,). parameters: each (C, *latent_shape).
    """

    log_weights: Tensor
    parameters: tuple[Tensor, ...]

    def to(self, device: torch.device) -> "Mixture":
        return Mixture(self.log_weights.to(device), tuple(parameter.to(device) for parameter in self.parameters))

    def log_joint(self, family: Family, latents: Tensor) -> Tensor:
        """log of weight_c p(z; parameters_c) in nats, (n, *latent_shape) -> (n, C)."""
        return self.log_weights + family.pairwise_log_prob(latents, self.parameters)

    def log_prob(self, family: Family, latents: Tensor) -> Tensor:
        """In nats, (n, *latent_shape) -> (n,)."""
        return self.log_joint(family, latents).logsumexp(1)

    def kl(self, family: Family, posterior: tuple[Tensor, ...]) -> Tensor:
        """KL(posterior || self) in nats for one component, and for more its upper bound
        -log sum_c weight_c exp(-KL(posterior || p_c)) (Hershey and Olsen, 2007), so that what it is taken from stays
        a lower bound on log p(x). posterior: each (n, *latent_shape) -> (n,)."""
        if len(self.log_weights) == 1:
            return family.kl(posterior, self.parameters).sum(1)
        return -(self.log_weights - family.pairwise_kl(posterior, self.parameters)).logsumexp(1)

    def draw(self, rows: int, draws: torch.Generator) -> tuple[Tensor, ...]:
        """The parameters of the component that each row is drawn from, each (rows, *latent_shape)."""
        components = torch.multinomial(self.log_weights.exp(), rows, replacement=True, generator=draws)
        return tuple(parameter[components] for parameter in self.parameters)


@torch.no_grad()
def learn_weights(logits: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Follow the gradient of a loss by the logits of a mixture's weights, in the weights themselves. Returns the
    weights, (C,)."""
    weights = (logits.softmax(0) - rate * gradient).clamp_min(LEAST_WEIGHT)
    logits.copy_(weights.log())
    return weights
