"""Networks trained elsewhere: published, served, refused."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reparam import Client
from reparam.export.errors import GateError
from reparam.export.network import Method, Network
from reparam.export.prior import fit_mixture
from reparam.export.publication import publish
from reparam.export.verify import verify
from reparam.models import GaussianVAE, Mixture
from reparam.service.artifact import noise
from reparam.service.artifact.file import load
from tests.conftest import Running


class Flat(nn.Module):
    """A VAE as in tutorials: `encode` and `decode` methods, images as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.mu, self.log_var = nn.Linear(64, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.back, self.out = nn.Linear(3, 8), nn.Linear(8, 64)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.hidden(images))
        return self.mu(hidden), self.log_var(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(self.out(torch.relu(self.back(latents))))


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Any:
        return self.function(values)


def flat(**parts: Any) -> Network:
    """A network around `Flat`, with some arguments replaced."""
    vae = Flat()
    wanted: dict[str, Any] = {
        "kind": "gaussian",
        "latent_shape": (3,),
        "image_shape": (1, 8, 8),
        "encoder": nn.Sequential(nn.Flatten(), Method(vae.encode)),
        "decoder": vae.decode,
    }
    return Network(**wanted | parts)


def normalized() -> Network:
    """Convolutions with trained batch normalization, a latent with channels, height and width, and pixel logits."""
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))
    activation = (nn.BatchNorm2d(8), nn.Dropout(), nn.SiLU())
    decoder = nn.Sequential(nn.Conv2d(2, 8, 1), *activation, nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1))
    for images, part in ((torch.rand(64, 3, 8, 8), encoder), (torch.randn(64, 2, 4, 4), decoder)):
        part(images)
    return Network(
        "gaussian", latent_shape=(2, 4, 4), image_shape=(3, 8, 8), encoder=encoder, decoder=decoder, logits=True
    )


def saturated() -> Network:
    """Images (n, 8, 8) without a channel axis, by a tanh of large values.

    onnxruntime's tanh can be slightly below -1.
    """
    layers = (nn.Linear(3, 64), Call(lambda values: torch.tanh(20 * values).view(-1, 8, 8) / 2 + 0.5))
    return flat(decoder=nn.Sequential(*layers))


def categorical() -> Network:
    """A decoder with `view`: codes must be contiguous."""
    decoder = (Call(lambda codes: codes.view(-1, 20)), nn.Linear(20, 64), nn.Sigmoid())
    return Network(
        "gumbel",
        latent_shape=(4, 5),
        image_shape=(1, 8, 8),
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 20)),
        decoder=nn.Sequential(*decoder),
    )


NETWORKS = {make.__name__: make for make in (flat, normalized, saturated, categorical)}


@dataclass
class Published:
    """A model repository, its networks by model name, and their states before the publication."""

    repository: Path
    networks: dict[str, Network]
    states: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """All of NETWORKS, published in training mode."""
    repository = tmp_path_factory.mktemp("artifacts")
    networks, states = {}, {}
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        networks[name] = make()
        states[name] = copy.deepcopy(networks[name].state_dict())
        facts: dict[str, Any] = {"trained_on": {"data": "rings", "rate": 0.1}, "evaluation": {"elbo": -9.5}}
        publish(networks[name].train(), name, repository, **facts)
    return Published(repository, networks, states)


@pytest.mark.parametrize("name", NETWORKS)
def test_publication_does_not_change_the_network(published: Published, name: str) -> None:
    state = published.networks[name].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in published.states[name].items())


@pytest.mark.parametrize("name", NETWORKS)
def test_published_network_verifies(published: Published, name: str) -> None:
    verify(published.repository / name / "1")


@pytest.fixture(scope="module")
def client(serve: Callable[..., Running], published: Published) -> Iterator[Client]:
    with Client(serve(artifacts=published.repository, default_model="flat").url) as client:
        yield client


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_served_as_torch_computes(client: Client, published: Published, name: str) -> None:
    network = published.networks[name]
    latents = "codes" if network.kind == "gumbel" else "latents"
    samples = client.sample(64, model=name, seed=3, outputs=("images", latents))
    model = client.model(name)
    assert model.trained_on == {"data": "rings", "rate": 0.1}
    assert model.evaluation == {"elbo": -9.5}
    drawn = getattr(samples, latents)
    words = noise.words(3, 0, 64, network.latent_shape)
    expected = noise.normal(words) if network.kind == "gaussian" else np.eye(5)[noise.gumbel(words).argmax(-1)]
    np.testing.assert_allclose(drawn, expected, atol=1e-6)
    with torch.inference_mode():
        images = network.decode(torch.from_numpy(drawn)).numpy()
    assert np.abs(samples.images - images * 255).max() < 0.51
    assert images.std() > 0.01


@pytest.mark.parametrize("make", [flat, normalized])
def test_decoder_can_be_published_in_float16(make: Callable[[], Network], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = make()
    half = load(publish(network, "mine", tmp_path, "float16") / "model.onnx")
    feeds = half.contract.feeds(noise.words(1, 0, 8, network.latent_shape), 1.0)
    with torch.inference_mode():
        images = network.decode(torch.from_numpy(feeds["noise"])).numpy()
    assert 0 < np.abs(half.run(feeds)["images"] - images).max() < 0.02


def test_network_can_have_a_mixture(tmp_path: Path) -> None:
    network = flat()
    mu, _ = network.encode(torch.rand(100, 1, 8, 8))
    mixture = fit_mixture(GaussianVAE, mu, 4, seed=0)
    contract = load(publish(network, "mine", tmp_path, mixture=mixture) / "model.onnx").contract
    weights, components = contract.mixture_arrays()
    np.testing.assert_allclose(weights, mixture.log_weights.exp(), rtol=1e-6)
    np.testing.assert_array_equal(components["mu"], mixture.parameters[0])


def test_example_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("docs/artifact.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    architecture, rest = example.split("vae.load_state_dict")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {}
    exec(compile(architecture, "docs/artifact.md", "exec"), names)  # an example from this repository
    torch.save(names["vae"].state_dict(), tmp_path / "vae.pt")
    exec(compile("vae.load_state_dict" + rest, "docs/artifact.md", "exec"), names)
    assert load(tmp_path / "artifacts" / "mine" / "1" / "model.onnx").contract.trained_on == {"data": "my digits"}


def wide(latents: Tensor) -> Tensor:
    """(n, 3) -> (n, 64)"""
    return latents.repeat(1, 22)[:, :64]


def branching(latents: Tensor) -> Tensor:
    return wide(latents).sigmoid() if latents.sum() > 0 else wide(latents).tanh() / 2 + 0.5


def drawing(latents: Tensor) -> Tensor:
    return torch.sigmoid(wide(latents) + torch.rand_like(wide(latents)))


MIXTURE = Mixture(torch.zeros(2), (torch.zeros(2, 3), torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"kind": "vq"}, "unknown kind 'vq'; there are: gaussian, gumbel"),
        ({"latent_shape": 3}, "latent_shape must be a tuple of positive sizes, got 3"),
        ({"image_shape": (2, 8, 8)}, r"image_shape must be \(C, H, W\) with C 1 or 3, got \(2, 8, 8\)"),
        ({"kind": "gumbel"}, r"the latent_shape of a gumbel network is \(D, K\), got \(3,\)"),
        ({"decoder": wide}, "the decoder must be a torch.nn.Module, or a method of one, got <function wide"),
        ({"decoder": nn.Linear(3, 63)}, r"the decoder does not work on float32\[2, 3\]: .*\[1, 8, 8\].*63"),
        ({"decoder": nn.Linear(4, 64)}, r"the decoder does not work on float32\[2, 3\]: .*cannot be multiplied"),
        ({"decoder": Call(lambda z: wide(z).view(-1, 4, 16))}, r"returns float32\[2, 4, 16\], not \(n, 1, 8, 8\)"),
        ({"decoder": Call(lambda z: {"sample": z})}, r"it returns a dict, not a tensor \(n, 1, 8, 8\)"),
        ({"decoder": Call(lambda z: wide(z).sigmoid().view(2, 64))}, r"float32\[3, 3\]: shape '\[2, 64\]' is invalid"),
        ({"decoder": Call(lambda z: wide(z).sigmoid()[:1])}, r"returns float32\[1, 1, 8, 8\], not float32 of 2 rows"),
        ({"decoder": Call(lambda z: wide(z).sigmoid().double())}, r"returns float64\[2, 1, 8, 8\], not float32"),
        ({"decoder": nn.Linear(3, 64).double()}, r"decoder\.weight is torch.float64 on cpu: call \.float\(\)\.cpu\(\)"),
        ({"decoder": nn.LazyLinear(64)}, r"decoder\.weight has no values yet: run the network once"),
        ({"decoder": Call(wide)}, r"returns -\S+ \.\. \S+: scale the images to \[0, 1\], or pass logits=True"),
        ({"decoder": Call(lambda z: wide(z) / 0)}, "the decoder returns NaN or infinity for latents of the prior"),
        ({"logits": True}, "images, not logits; leave out logits=True"),
        ({"encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 5))}, "the encoder does not work on"),
        ({"encoder": Call(lambda images: (images,))}, "it returns 1 values, not mu and log_var"),
        ({"decoder": Call(branching)}, "torch cannot export the sampler: "),
        ({"decoder": Call(drawing)}, "^model.onnx: output 'images' differs .* the graph draws noise"),
        ({"decoder": Call(lambda z: wide(z - z.mean(0)).sigmoid())}, "images is .* in a batch of 1"),
    ],
)
def test_impossible_network_is_refused_and_nothing_is_written(
    parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match=message):
        publish(flat(**parts), "mine", tmp_path / "new" / "artifacts")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "../mine"}, r"'\.\./mine' cannot be a model's name"),
        ({"precision": "float64"}, "precision cannot be 'float64': input should be 'float32' or 'float16'"),
        ({"trained_on": {"data": ["a"]}}, r"trained_on\.data cannot be \['a'\]: values must be text or finite"),
        ({"evaluation": {"elbo": np.nan}}, r"evaluation\.elbo cannot be nan"),
        ({"mixture": MIXTURE._replace(parameters=(torch.zeros(2, 3),))}, "has 1 parameters, not mu and log_var"),
        ({"mixture": MIXTURE._replace(parameters=(torch.zeros(2, 4),) * 2)}, r"does not fit the shape \[2, 3\]"),
        ({"mixture": MIXTURE._replace(log_weights=torch.full((2,), torch.nan))}, "must be a list of positive numbers"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"name": "mine", "repository": tmp_path} | arguments
    with pytest.raises(GateError, match=message):
        publish(flat(), **wanted)
    assert list(tmp_path.iterdir()) == []
