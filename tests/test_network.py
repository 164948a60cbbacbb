"""Networks that were trained elsewhere, from torch to HTTP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.errors import ExportError, GateError
from export.network import Network
from export.prior import fit_mixture
from export.publish import publish
from export.verify import verify
from models import GaussianVAE
from reparam import Client
from service import noise
from service.artifact import load
from service.contract import ArtifactError
from tests.conftest import Running


class Flat(nn.Module):
    """As tutorials write one: methods, and images as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.mu, self.log_var = nn.Linear(64, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.back, self.out = nn.Linear(3, 8), nn.Linear(8, 64)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.hidden(images.view(-1, 64)))
        return self.mu(hidden), self.log_var(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(self.out(torch.relu(self.back(latents))))


class Method(nn.Module):
    """One method of a network."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, values: Tensor) -> Any:
        return getattr(self.network, self.name)(values)


class Call(nn.Module):
    """A function between layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)


def flat(**parts: nn.Module) -> Network:
    """A `Flat`, with other parts."""
    vae = Flat()
    encoder, decoder = parts.get("encoder", Method(vae, "encode")), parts.get("decoder", Method(vae, "decode"))
    return Network("gaussian", latent_shape=(3,), image_shape=(1, 8, 8), encoder=encoder, decoder=decoder)


def normalized() -> Network:
    """Convolutions with batch normalization that has seen data, a latent that is a picture itself, pixel logits."""
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))
    decoder = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Dropout(),
        nn.SiLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 3, 1),
    )
    for images, part in ((torch.rand(64, 3, 8, 8), encoder), (torch.randn(64, 2, 4, 4), decoder)):
        part(images)
    return Network(
        "gaussian", latent_shape=(2, 4, 4), image_shape=(3, 8, 8), encoder=encoder, decoder=decoder, logits=True
    )


def categorical() -> Network:
    return Network(
        "gumbel",
        latent_shape=(4, 5),
        image_shape=(1, 8, 8),
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 20)),
        decoder=nn.Sequential(nn.Flatten(), nn.Linear(20, 64), nn.Sigmoid()),
    )


@pytest.mark.parametrize("make", [flat, normalized, categorical])
def test_any_network_is_served_as_it_computes(
    make: Callable[[], Network], serve: Callable[..., Running], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = make()
    folder = publish(network, "mine", tmp_path, trained_on={"data": "rings"}, evaluation={"elbo": -9.5})
    assert len(verify(folder)) == 5
    latents = "codes" if network.kind == "gumbel" else "latents"
    with Client(serve(artifacts=tmp_path, default_model="mine").url) as client:
        samples = client.sample(64, seed=3, outputs=("images", latents))
        model = client.model("mine")
    assert model.trained_on == {"data": "rings"}
    assert model.evaluation == {"elbo": -9.5}
    drawn = getattr(samples, latents)
    words = noise.words(3, 0, 64, network.latent_shape)
    expected = noise.normal(words) if network.kind == "gaussian" else np.eye(5)[noise.gumbel(words).argmax(-1)]
    np.testing.assert_allclose(drawn, expected, atol=1e-6)
    with torch.inference_mode():
        images = network.decode(torch.from_numpy(drawn)).numpy()
    assert np.abs(samples.images - images * 255).max() < 0.51
    assert images.std() > 0.01


def test_the_decoder_may_be_rounded_to_float16(tmp_path: Path) -> None:
    assert load(publish(normalized(), "mine", tmp_path, "float16") / "model.onnx").contract.precision == "float16"


def test_it_may_have_a_mixture(tmp_path: Path) -> None:
    network = flat()
    with torch.inference_mode():
        mu, _ = network.encode(torch.rand(100, 1, 8, 8))
    mixture = fit_mixture(GaussianVAE, mu, 4, seed=0)
    weights, components = load(
        publish(network, "mine", tmp_path, mixture=mixture) / "model.onnx"
    ).contract.mixture_arrays()
    np.testing.assert_allclose(weights, mixture.log_weights.exp(), rtol=1e-6)
    np.testing.assert_array_equal(components["mu"], mixture.parameters[0])


def fixed_batch(latents: Tensor) -> Tensor:
    return latents.repeat(1, 22)[:, :64].sigmoid().view(2, 64)


def branching(latents: Tensor) -> Tensor:
    return latents.repeat(1, 22)[:, :64].sigmoid() if latents.sum() > 0 else latents.repeat(1, 22)[:, :64].exp()


def unbounded(latents: Tensor) -> Tensor:
    return latents.repeat(1, 22)[:, :64]


def drawing(latents: Tensor) -> Tensor:
    values = latents.repeat(1, 22)[:, :64]
    return torch.sigmoid(values + torch.rand_like(values))


def over_the_batch(latents: Tensor) -> Tensor:
    return torch.sigmoid((latents - latents.mean(0)).repeat(1, 22)[:, :64])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"decoder": nn.Linear(3, 63)},
            r"the decoder does not fit a gaussian latent \[3\] and images \[1, 8, 8\] of",
        ),
        ({"decoder": nn.Linear(4, 64)}, r"the decoder does not fit .*cannot be multiplied"),
        ({"encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 5))}, "the encoder does not fit"),
        ({"encoder": Call(lambda images: (images,))}, "the encoder does not fit .*: 1 parameters, not mu and log_var"),  # type: ignore[arg-type,return-value]
        ({"decoder": Call(fixed_batch)}, r"the decoder does not fit .* of 3 rows: shape '\[2, 64\]' is invalid"),
        ({"decoder": Call(branching)}, "torch cannot export the sampler: "),
        ({"decoder": Call(unbounded)}, r"out of \[0, 1\]"),
        ({"decoder": Call(drawing)}, "the graph draws noise"),
        ({"decoder": Call(over_the_batch)}, "images is .* in a batch of 1"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    parts: dict[str, nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises((GateError, ArtifactError), match=message):
        publish(flat(**parts), "mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_named() -> None:
    kind: Literal["gaussian"] = "vq"  # type: ignore[assignment]
    with pytest.raises(ExportError, match="unknown kind 'vq'; there are: gaussian, gumbel"):
        Network(kind, latent_shape=(3,), image_shape=(1, 8, 8), encoder=nn.Identity(), decoder=nn.Identity())
