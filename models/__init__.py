"""Variational autoencoders in PyTorch: networks and their distributions."""

from reparam.models.bodies import VAEConfig
from reparam.models.gaussian import GaussianVAE
from reparam.models.gumbel import GumbelVAE
from reparam.models.mixture import Mixture

VAE = GaussianVAE | GumbelVAE
MODELS: dict[str, type[VAE]] = {model.kind: model for model in (GaussianVAE, GumbelVAE)}

__all__ = ["MODELS", "VAE", "GaussianVAE", "GumbelVAE", "Mixture", "VAEConfig"]
