"""A trained network before publication, from this repository or from elsewhere."""

from collections.abc import Callable
from inspect import ismethod
from math import isfinite
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from reparam.export.errors import GateError
from reparam.models import MODELS, VAE, Mixture

ROWS = (2, 3)  # batch sizes of the trial runs
CHANNELS = (1, 3)
ROUNDING = 1e-4  # the decoder's raw images may exceed [0, 1] by this much; `decode` then clamps the images

Part = nn.Module | Callable[[Tensor], Any]


class Network(nn.Module):
    """The network of an artifact: an encoder, a decoder, and a family of latents.

    kind: "gaussian" or "gumbel".
    latent_shape: any shape for a Gaussian latent; (D, K), D variables of K categories, for a Gumbel latent.
    image_shape: (C, H, W), C 1 or 3.
    encoder: maps images, (n, C, H, W) in [0, 1], to the parameters of q(z | x). For a Gaussian latent a tuple of mu and
        log_var, or both concatenated along axis 1. For a Gumbel latent logits, alone or in a tuple. Each parameter is
        (n, *latent_shape) or flat.
    decoder: maps latents, (n, *latent_shape), to images in [0, 1], (n, C, H, W) or flat. Latents of a Gumbel network
        are one-hot or relaxed codes.
    logits: True if the decoder returns pixel logits; images are then the sigmoid.

    Encoder and decoder are modules, or bound methods of a module. Both are put into evaluation mode.

    Raises: GateError for an unknown kind, an impossible shape, or a part that is neither a module nor a method of a
        module. The constructor does not run the network; `check` does.
    """

    def __init__(
        self,
        kind: Literal["gaussian", "gumbel"],
        *,
        latent_shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        encoder: Part,
        decoder: Part,
        logits: bool = False,
    ) -> None:
        super().__init__()
        _check_shapes(kind, latent_shape, image_shape)
        self.kind, self.family = kind, MODELS[kind]
        self.latent_shape, self.image_shape, self.logits = latent_shape, image_shape, logits
        self.encoder, self.decoder = _module("encoder", encoder), _module("decoder", decoder)
        self.eval()

    @classmethod
    def of(cls, vae: VAE) -> Self:
        """Make a network around a VAE of this repository, without the VAE's learned prior."""
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
        """Compute the parameters of q(z | x).

        images: float32 (n, C, H, W) in [0, 1].

        Returns: a tensor (n, *latent_shape) for each of `family.parameter_names`.

        Raises: ValueError if the encoder returns another number of parameters or another shape.
        """
        names, found = self.family.parameter_names, self.encoder(images)
        parameters = found.chunk(len(names), 1) if isinstance(found, Tensor) else found
        if not isinstance(parameters, tuple | list) or len(parameters) != len(names):
            raise ValueError(f"it returns {_description(found)}, not {' and '.join(names)}")
        return tuple(_to_shape(parameter, self.latent_shape) for parameter in parameters)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents.

        latents: float32 (n, *latent_shape).

        Returns: images, float32 (n, C, H, W) in [0, 1].

        Raises: ValueError if the decoder returns another shape.
        """
        values = self.raw_decode(latents)
        return torch.sigmoid(values) if self.logits else values.clamp(0, 1)

    def raw_decode(self, latents: Tensor) -> Tensor:
        """Return the output of the decoder, (n, C, H, W): images, or pixel logits.

        Raises: ValueError if the decoder returns another shape.
        """
        return _to_shape(self.decoder(latents.contiguous()), self.image_shape)  # a decoder may use `view`

    def prior(self) -> Mixture:
        """Make the standard prior: N(0, I), or uniform categories; a mixture with a single component."""
        parameters = tuple(torch.zeros(1, *self.latent_shape) for _ in self.family.parameter_names)
        return Mixture(torch.zeros(1), parameters)

    @torch.inference_mode()
    def check(self) -> None:
        """Run encoder and decoder on small batches, and check shapes, dtypes and the range of images.

        Raises: GateError for weights without values, or not float32 on the CPU. GateError also for a part that fails or
            returns another shape or dtype, and for images that are not finite, or not in [0, 1].
        """
        self.eval()
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if isinstance(tensor, UninitializedParameter):
                raise GateError(f"{name} has no values yet: run the network once, or load its weights")
            if tensor.is_floating_point() and (tensor.dtype, tensor.device.type) != (torch.float32, "cpu"):
                raise GateError(
                    f"{name} is {tensor.dtype} on {tensor.device}: call .float().cpu() on the network "
                    '(precision="float16" rounds the decoder)'
                )
        draws = torch.Generator().manual_seed(0)
        for rows in ROWS:
            _try("encoder", self.encode, torch.rand(rows, *self.image_shape, generator=draws))
            parameters = self.prior().draw(rows, draws)
            noise = self.family.noise((rows, *self.latent_shape), draws)
            latents = self.family.sample(parameters, noise, self.family.default_temperature)
            self._check_range(_try("decoder", self.raw_decode, latents))

    def _check_range(self, values: Tensor) -> None:
        low, high = values.min().item(), values.max().item()
        if not isfinite(high - low):
            raise GateError("the decoder returns NaN or infinity for latents of the prior")
        are_images = low >= -ROUNDING and high <= 1 + ROUNDING
        if are_images and self.logits:
            raise GateError(f"the decoder returns {low:.3g} .. {high:.3g}: images, not logits; leave out logits=True")
        if not are_images and not self.logits:
            way_out = "scale the images to [0, 1], or pass logits=True if the decoder returns pixel logits"
            raise GateError(f"the decoder returns {low:.3g} .. {high:.3g}: {way_out}")


class Method(nn.Module):
    """A bound method of a module as a module, for example in nn.Sequential(nn.Flatten(), Method(vae.encode)).

    Raises: GateError if `method` is not a bound method of a module.
    """

    def __init__(self, method: Callable[[Tensor], Any]) -> None:
        super().__init__()
        if not ismethod(method) or not isinstance(method.__self__, nn.Module):
            raise GateError(f"{method!r} is not a method of a torch.nn.Module")
        self.module, self.name = method.__self__, method.__name__

    def forward(self, values: Tensor) -> Any:
        return getattr(self.module, self.name)(values)


def _check_shapes(kind: str, latent_shape: tuple[int, ...], image_shape: tuple[int, ...]) -> None:
    """Check the kind of latent and both shapes.

    Raises: GateError for a kind without an entry in MODELS, a shape that is not a tuple of positive integers, an
        image_shape other than (C, H, W) with C 1 or 3, or a Gumbel latent_shape other than (D, K).
    """
    if kind not in list(MODELS):
        raise GateError(f"unknown kind {kind!r}; there are: {', '.join(MODELS)}")
    for name, shape in (("latent_shape", latent_shape), ("image_shape", image_shape)):
        if not isinstance(shape, tuple) or not shape or not all(isinstance(size, int) and size > 0 for size in shape):
            raise GateError(f"{name} must be a tuple of positive sizes, got {shape!r}")
    if len(image_shape) != 3 or image_shape[0] not in CHANNELS:
        raise GateError(f"image_shape must be (C, H, W) with C 1 or 3, got {image_shape!r}")
    if kind == "gumbel" and len(latent_shape) != 2:
        raise GateError(f"the latent_shape of a gumbel network is (D, K), got {latent_shape!r}")


def _module(name: str, part: Part) -> nn.Module:
    """Turn the part into a module.

    name: "encoder" or "decoder", for the message.

    Raises: GateError if the part is neither a module nor a bound method of a module.
    """
    if isinstance(part, nn.Module):
        return part
    try:
        return Method(part)
    except GateError as error:
        raise GateError(f"the {name} must be a torch.nn.Module, or a method of one, got {part!r}") from error


def _try(part: str, call: Callable[[Tensor], Any], values: Tensor) -> Any:
    """Call an encoder or a decoder on one batch.

    part: "encoder" or "decoder", for the message.

    Returns: the result of `call`.

    Raises: GateError for any exception of the network, another batch size or another dtype.
    """
    try:
        found = call(values)
        for tensor in found if isinstance(found, tuple) else (found,):
            if len(tensor) != len(values) or tensor.dtype != torch.float32:
                raise ValueError(f"it returns {_description(tensor)}, not float32 of {len(values)} rows")
    except Exception as error:  # the network may raise any exception
        fault = str(error).partition("\n")[0] or repr(error)
        raise GateError(f"the {part} does not work on float32{list(values.shape)}: {fault}") from error
    return found


def _to_shape(values: Any, shape: tuple[int, ...]) -> Tensor:
    """Reshape (n, ...) to (n, *shape), from flat values or from the same shape apart from axes of size 1.

    Raises: ValueError for other shapes.
    """
    if not isinstance(values, Tensor) or values.dim() < 2:
        raise ValueError(f"it returns {_description(values)}, not a tensor {_rows_of(shape)}")
    if values.shape[1:] == shape:
        return values
    if values.dim() == 2 or _without_ones(values.shape[1:]) == _without_ones(shape):
        shaped: Tensor = values.flatten(1).unflatten(1, shape)
        return shaped
    raise ValueError(f"it returns {_description(values)}, not {_rows_of(shape)}")


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _description(found: object) -> str:
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
    if isinstance(found, tuple | list):
        return f"{len(found)} values"
    return f"a {type(found).__name__}"


def _rows_of(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, ('n', *shape)))})"
