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
ROUNDING = 1e-4  # images may exceed [0, 1] by this much; `decode` clamps images

Part = nn.Module | Callable[[Tensor], Any]


class Network(nn.Module):
    """The network of an artifact: an encoder, a decoder, and a family of latents.

    kind: "gaussian" or "gumbel".
    latent_shape: any shape for a Gaussian latent; (D, K), D variables of K categories, for a Gumbel latent.
    image_shape: (C, H, W), C 1 or 3.
    encoder: images (n, C, H, W) in [0, 1] -> mu and log_var of q(z | x), or logits for a Gumbel latent. Each is (n,
        *latent_shape) or flat; together a tuple, or one tensor concatenated along axis 1.
    decoder: latents (n, *latent_shape), for a Gumbel latent one-hot or relaxed codes -> images (n, C, H, W) in [0, 1],
        or flat.
    logits: True if the decoder returns pixel logits; images are then the sigmoid.

    Encoder and decoder are modules, or bound methods of a module. Both are put into evaluation mode.

    Raises: GateError for wrong shapes or parts.
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
        """A network around a VAE of this repository, without the VAE's learned prior."""
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
        """Parameters of q(z | x), each (n, *latent_shape).

        Raises: ValueError if the encoder returns anything else.
        """
        names, found = self.family.parameter_names, self.encoder(images)
        parameters = found.chunk(len(names), 1) if isinstance(found, Tensor) else found
        if not isinstance(parameters, tuple | list) or len(parameters) != len(names):
            raise ValueError(f"it returns {_description(found)}, not {' and '.join(names)}")
        return tuple(_to_shape(parameter, self.latent_shape) for parameter in parameters)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, C, H, W), float32 in [0, 1].

        Raises: ValueError if the decoder returns another shape.
        """
        values = self.raw_decode(latents)
        return torch.sigmoid(values) if self.logits else values.clamp(0, 1)

    def raw_decode(self, latents: Tensor) -> Tensor:
        """Output of the decoder, (n, C, H, W): images, or pixel logits."""
        return _to_shape(self.decoder(latents.contiguous()), self.image_shape)  # a decoder may use `view`

    def prior(self) -> Mixture:
        """The standard prior: N(0, I), or uniform categories."""
        parameters = tuple(torch.zeros(1, *self.latent_shape) for _ in self.family.parameter_names)
        return Mixture(torch.zeros(1), parameters)

    @torch.inference_mode()
    def check(self) -> None:
        """Run encoder and decoder on small batches, and check shapes, dtypes and the range of images.

        Raises: GateError.
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
    """Raises: GateError for an unknown kind or an impossible shape."""
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
    """The part as a module.

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
