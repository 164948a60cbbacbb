"""The variational autoencoders: networks and their distributions, in PyTorch."""

from models.bodies import VAEConfig
from models.gaussian import GaussianVAE
from models.gumbel import GumbelVAE
from models.mixture import Mixture

MODELS: dict[str, type[GaussianVAE] | type[GumbelVAE]] = {model.kind: model for model in (GaussianVAE, GumbelVAE)}

__all__ = ["MODELS", "GaussianVAE", "GumbelVAE", "Mixture", "VAEConfig"]
