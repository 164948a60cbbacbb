"""A prior that is a mixture, of the kind of distribution that the model's own prior is."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.gaussian import GaussianVAE
from models.gumbel import GumbelVAE


class Mixture(NamedTuple):
    """p(z) = sum_c weight_c p(z; parameters_c).

    log_weights: (C,). parameters: each (C, *latent_shape).
    """

    log_weights: Tensor
    parameters: tuple[Tensor, ...]

    @classmethod
    def standard(cls, model: GaussianVAE | GumbelVAE) -> "Mixture":
        """The one component that the model was trained with."""
        prior = model.prior()
        return cls(prior[0].new_zeros(1), prior)

    def to(self, device: torch.device) -> "Mixture":
        return Mixture(self.log_weights.to(device), tuple(parameter.to(device) for parameter in self.parameters))

    def joint(self, model: GaussianVAE | GumbelVAE, latents: Tensor) -> Tensor:
        """log of weight_c p(z; parameters_c) in nats, (n, *latent_shape) -> (n, C)."""
        return self.log_weights + model.log_probs(latents, self.parameters)

    def log_prob(self, model: GaussianVAE | GumbelVAE, latents: Tensor) -> Tensor:
        """In nats, (n, *latent_shape) -> (n,)."""
        return self.joint(model, latents).logsumexp(1)
