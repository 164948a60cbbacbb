"""Encoder and decoder bodies: the layers between images and the parameters of a distribution."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import fold

Activation = Literal["relu", "tanh"]
_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
MIN_MEAN = 1e-3  # pixel means are clamped to [MIN_MEAN, 1 - MIN_MEAN], so that their logits are finite


@dataclass(frozen=True)
class VAEConfig:
    """The architecture of one VAE. All sizes run from the image towards the latent; the decoder mirrors the encoder.

    image_shape: (C, H, W).
    latent_shape: any shape for a Gaussian latent; (D, K), D variables of K categories, for a Gumbel latent.
    body: "mlp" or "conv".
    width: hidden layer sizes of an MLP (may be empty), or channels of the convolutions. Each convolution halves the
        image.
    dense: hidden layer sizes between the convolutions and the latent.
    activation: function after each layer except the last.
    decoder_width: hidden layer sizes of an MLP's decoder; None: same as width.
    prior_components: mixture components of the prior. A mixture of 2 or more components is learned. A single component
        is N(0, I) for a Gaussian latent, and learned for a Gumbel latent.

    Raises: ValueError for sizes or combinations that no network has.
    """

    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, ...]
    body: Literal["mlp", "conv"]
    width: tuple[int, ...]
    dense: tuple[int, ...] = ()
    activation: Activation = "relu"
    decoder_width: tuple[int, ...] | None = None
    prior_components: int = 1

    def __post_init__(self) -> None:
        for name in ("image_shape", "latent_shape", "width", "decoder_width"):
            sizes = getattr(self, name) or ()
            may_be_empty = (name.endswith("width") and self.body == "mlp") or name == "decoder_width"
            if not (sizes or may_be_empty) or min(sizes, default=1) < 1:
                raise ValueError(f"{name} must hold positive sizes, got {list(sizes)}")
        if self.prior_components < 1:
            raise ValueError(f"prior_components must be at least 1, got {self.prior_components}")
        if self.dense and self.body == "mlp":
            raise ValueError("dense belongs to the convolutions; an MLP has all its layers in width")
        if self.decoder_width is not None and self.body == "conv":
            raise ValueError("decoder_width belongs to an MLP; the decoder of a conv body mirrors the encoder")


def encoder(config: VAEConfig, features: int) -> nn.Sequential:
    """Build an encoder with initial weights: images (n, C, H, W) in [0, 1] -> (n, features), unbounded."""
    network = _mlp_encoder(config, features) if config.body == "mlp" else _conv_encoder(config, features)
    return _initialized(network, config.activation)


def decoder(config: VAEConfig) -> nn.Sequential:
    """Build a decoder with initial weights: latents (n, *latent_shape) -> pixel logits (n, C, H, W)."""
    network = _mlp_decoder(config) if config.body == "mlp" else _conv_decoder(config)
    return _initialized(network, config.activation)


@torch.no_grad()
def set_initial_bias(decoder: nn.Sequential, mean: Tensor) -> None:
    """Set the last bias of a fresh decoder to the logits of the mean image.

    Training then starts with dark pixels dark, instead of learning them first (Burda, Grosse and Salakhutdinov, 2016,
    appendix C). Convolutions have one bias a channel, so the mean is taken over each channel.

    mean: (C, H, W), float32 in [0, 1].
    """
    *_, last = (layer for layer in decoder if isinstance(layer, nn.Linear | nn.ConvTranspose2d))
    mean = mean if isinstance(last, nn.Linear) else mean.mean((1, 2))
    assert last.bias is not None  # noqa: S101  # every layer here has a bias
    last.bias.copy_(torch.logit(mean.clamp(MIN_MEAN, 1 - MIN_MEAN)).flatten())


def to_float16(decoder: nn.Module) -> nn.Sequential:
    """Round a decoder's weights to float16, in place.

    Returns: the decoder between two casts, so that inputs and outputs stay float32.
    """
    return nn.Sequential(_Cast(torch.float16), decoder.half(), _Cast(torch.float32))


class _Cast(nn.Module):
    """A layer converting values to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


def _mlp_encoder(config: VAEConfig, features: int) -> nn.Sequential:
    sizes = (prod(config.image_shape), *config.width)
    return nn.Sequential(nn.Flatten(), *_dense(sizes, config), nn.Linear(sizes[-1], features))


def _mlp_decoder(config: VAEConfig) -> nn.Sequential:
    width = config.width if config.decoder_width is None else config.decoder_width
    sizes = (prod(config.latent_shape), *reversed(width))
    pixels = prod(config.image_shape)
    return nn.Sequential(
        nn.Flatten(), *_dense(sizes, config), nn.Linear(sizes[-1], pixels), nn.Unflatten(1, config.image_shape)
    )


def _dense(sizes: tuple[int, ...], config: VAEConfig) -> Iterator[nn.Module]:
    for before, after in pairwise(sizes):
        yield nn.Linear(before, after)
        yield _ACTIVATIONS[config.activation]()


def _conv_encoder(config: VAEConfig, features: int) -> nn.Sequential:
    channels, sizes = _pyramid(config)
    layers: list[nn.Module] = []
    for (before, after), size in zip(pairwise(channels), sizes, strict=False):
        layers += [nn.Conv2d(before, after, _kernel(size), stride=2, padding=1), _ACTIVATIONS[config.activation]()]
    dense = (channels[-1] * prod(sizes[-1]), *config.dense)
    return nn.Sequential(*layers, nn.Flatten(), *_dense(dense, config), nn.Linear(dense[-1], features))


def _conv_decoder(config: VAEConfig) -> nn.Sequential:
    channels, sizes = _pyramid(config)
    top = (channels[-1], *sizes[-1])
    dense = (prod(config.latent_shape), *reversed(config.dense))
    layers: list[nn.Module] = [nn.Flatten(), *_dense(dense, config)]
    layers += [nn.Linear(dense[-1], prod(top)), nn.Unflatten(1, top)]
    for (after, before), size in reversed(list(zip(pairwise(channels), sizes, strict=False))):
        layers += [_ACTIVATIONS[config.activation]()]
        transposed = _OneChannelConvTranspose2d if after == 1 else nn.ConvTranspose2d
        layers += [transposed(before, after, _kernel(size), stride=2, padding=1)]
    return nn.Sequential(*layers)


class _OneChannelConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution to one channel, computed as a matrix product on a CPU.

    oneDNN's kernels are made for many channels and take two to five times as long for one channel.
    """

    def forward(self, values: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or values.is_cuda or torch.compiler.is_exporting():
            return super().forward(values, output_size)
        columns = torch.bmm(self.weight.flatten(1).T.expand(len(values), -1, -1), values.flatten(2))
        size = tuple(2 * size - 4 + kernel for size, kernel in zip(values.shape[2:], self.kernel_size, strict=True))
        folded = fold(columns, size, self.kernel_size, padding=1, stride=2)
        assert self.bias is not None  # noqa: S101  # every layer here has a bias
        return folded + self.bias.reshape(-1, 1, 1)


def _initialized(network: nn.Sequential, activation: Activation) -> nn.Sequential:
    """Draw the initial weights (He et al., 2015, https://arxiv.org/abs/1502.01852), scaled by the activation's gain.

    Biases begin at 0.

    The scale of activations stays constant through the layers. PyTorch's default shrinks activations layer by layer,
    and deep bodies then never learn to use the latent.
    """
    gain = nn.init.calculate_gain(activation)
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity=activation)
        elif isinstance(layer, nn.ConvTranspose2d):
            inputs = (
                layer.in_channels * prod(layer.kernel_size) / prod(layer.stride)
            )  # products summed for each output value, on average
            nn.init.normal_(layer.weight, std=gain / sqrt(inputs))
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network


def _pyramid(config: VAEConfig) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Channels, and image sizes (height, width), of each level from the image to the latent.

    Each size is half of the size before, rounded up.
    """
    sizes = [config.image_shape[1:]]
    for _ in config.width:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return (config.image_shape[0], *config.width), sizes


def _kernel(size: tuple[int, int]) -> tuple[int, int]:
    """Kernel size for an image size: 4 for even, 3 for odd.

    With stride 2 and padding 1 a convolution then halves the size exactly and a transposed convolution restores the
    size. Output padding is not needed; exporters and runtimes disagree about output padding.
    """
    height, width = size
    return 4 - height % 2, 4 - width % 2
