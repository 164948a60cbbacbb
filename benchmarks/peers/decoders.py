"""Networks for the timing of decoders on a device: the demo models, and a very large decoder."""

from collections.abc import Iterator

from torch import Tensor, nn

from reparam.export import recipes
from reparam.export.config import TrainConfig
from reparam.export.network import Network
from reparam.export.run import RunConfig
from reparam.models.bodies import to_float16

DEMOS = ("gaussian-best", "gumbel-best", "gaussian-fashion")
CHANNELS = (512, 512, 256, 128)  # each level after the first doubles the image
GROUPS = 32  # groups of a normalization


def demo(name: str) -> Network:
    """The untrained network of a recipe. Weights have no effect on the speed."""
    train = TrainConfig(**recipes.recipe(name))
    return Network.of(RunConfig(train=train, data_name="", data_sha256="", image_shape=(1, 28, 28)).build())


def autoencoder() -> Network:
    """A decoder of the size of Stable Diffusion's (AutoencoderKL; Rombach et al., 2022), without an encoder.

    Latents (4, 64, 64), images (3, 512, 512), 49 million random weights in float16.
    """
    return Network(
        "gaussian",
        latent_shape=(4, 64, 64),
        image_shape=(3, 512, 512),
        encoder=nn.Identity(),
        decoder=to_float16(nn.Sequential(*_layers(CHANNELS))),
        logits=True,
    )


def _layers(channels: tuple[int, ...]) -> Iterator[nn.Module]:
    top, last = channels[0], channels[-1]
    yield nn.Conv2d(4, top, 3, padding=1)
    yield from (_Residual(top, top), _Attention(top), _Residual(top, top))
    before = top
    for level, width in enumerate(channels):
        yield from (_Residual(before, width), _Residual(width, width), _Residual(width, width))
        if level < len(channels) - 1:
            yield nn.Upsample(scale_factor=2)
            yield nn.Conv2d(width, width, 3, padding=1)
        before = width
    yield from (nn.GroupNorm(GROUPS, last), nn.SiLU(), nn.Conv2d(last, 3, 3, padding=1))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.GroupNorm(GROUPS, before),
            nn.SiLU(),
            nn.Conv2d(before, after, 3, padding=1),
            nn.GroupNorm(GROUPS, after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.pass_on = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, images: Tensor) -> Tensor:
        changed: Tensor = self.pass_on(images) + self.change(images)
        return changed


class _Attention(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        places = self.norm(images).flatten(2).transpose(1, 2).unsqueeze(1)
        query, key, value = self.query_key_value(places).chunk(3, -1)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        changed: Tensor = images + self.out(seen).squeeze(1).transpose(1, 2).reshape(images.shape)
        return changed
