"""A trained network as it is published, ours or another's."""

from itertools import product
from typing import Literal, Self

import torch
from torch import Tensor, nn

from export.errors import GateError
from export.objectives import VAE
from models import MODELS, Mixture

ROWS = (2, 3)  # to try


class Network(nn.Module):
    """What an artifact is made of: an encoder, a decoder, and how latents are drawn between them.

    kind: "gaussian" or "gumbel".
    latent_shape: any shape for a Gaussian latent; (D, K), D variables of K categories, for a Gumbel one.
    image_shape: (C, H, W), C 1 or 3.
    encoder: images (n, C, H, W) in [0, 1] -> mu and log_var of q(z | x), or its logits: each (n, *latent_shape) or
        flat, in a tuple or one after the other along axis 1.
    decoder: latents (n, *latent_shape), codes of a Gumbel VAE one-hot or relaxed -> images (n, C, H, W) in [0, 1], or
        flat.
    logits: the decoder answers pixel logits instead, whose sigmoid the images are.

    Both are put into evaluation mode. Raises GateError for another kind.
    """

    def __init__(
        self,
        kind: Literal["gaussian", "gumbel"],
        *,
        latent_shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        encoder: nn.Module,
        decoder: nn.Module,
        logits: bool = False,
    ) -> None:
        super().__init__()
        if kind not in MODELS:
            raise GateError(f"unknown kind {kind!r}; there are: {', '.join(MODELS)}")
        self.kind, self.family = kind, MODELS[kind]
        self.latent_shape, self.image_shape, self.logits = latent_shape, image_shape, logits
        self.encoder, self.decoder = encoder, decoder
        self.eval()

    @classmethod
    def of(cls, vae: VAE) -> Self:
        config = vae.config
        return cls(
            vae.kind,
            latent_shape=config.latent_shape,
            image_shape=config.image_shape,
            encoder=vae.encoder,
            decoder=vae.decoder,
            logits=True,
        )

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """The parameters of q(z | x), each (n, *latent_shape)."""
        names, found = self.family.parameter_names, self.encoder(images)
        parameters = found.chunk(len(names), 1) if isinstance(found, Tensor) else found
        if len(parameters) != len(names):
            raise ValueError(f"{len(parameters)} parameters, not {' and '.join(names)}")
        return tuple(_shaped(parameter, self.latent_shape) for parameter in parameters)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, C, H, W) in [0, 1]."""
        found = _shaped(self.decoder(latents), self.image_shape)
        return torch.sigmoid(found) if self.logits else found

    def prior(self) -> Mixture:
        """N(0, I), or categories that are equally likely."""
        parameters = tuple(torch.zeros(1, *self.latent_shape) for _ in self.family.parameter_names)
        return Mixture(torch.zeros(1), parameters)

    @torch.inference_mode()
    def check(self) -> None:
        """That each part takes and answers what it should, of any number of rows. Raises GateError."""
        parts = {"encoder": (self.encode, self.image_shape), "decoder": (self.decode, self.latent_shape)}
        for (part, (call, shape)), rows in product(parts.items(), ROWS):
            try:
                call(torch.zeros(rows, *shape))
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # as torch's layers raise them
                shapes = f"a {self.kind} latent {list(self.latent_shape)} and images {list(self.image_shape)}"
                fault = str(error).partition("\n")[0]
                raise GateError(f"the {part} does not fit {shapes} of {rows} rows: {fault}") from error


def _shaped(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values if values.shape[1:] == shape else values.flatten(1).unflatten(1, shape)
