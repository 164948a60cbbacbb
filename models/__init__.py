"""The variational autoencoders: networks and their distributions, in PyTorch."""

from models.bodies import VAEConfig
from models.gaussian import GaussianVAE
from models.gumbel import GumbelVAE
from models.mixture import Mixture

VAE = GaussianVAE | GumbelVAE
MODELS: dict[str, type[VAE]] = {model.kind: model for model in (GaussianVAE, GumbelVAE)}

__all__ = ["MODELS", "VAE", "GaussianVAE", "GumbelVAE", "Mixture", "VAEConfig"]
