"""A training loop as in tutorials and VAE collections (https://github.com/pytorch/examples/tree/main/vae,
https://github.com/AntixK/PyTorch-VAE), with the network, optimizer and batches of one of our recipes.

python -m benchmarks.peers.plain_training RECIPE DATA SAMPLES WORKERS THREADS prints images per second: of the ELBO
for one sample, of the importance-weighted bound for more samples.
"""

import sys
import time
from functools import partial
from math import log

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import binary_cross_entropy, gumbel_softmax
from torch.utils.data import DataLoader, Dataset

from reparam.export.config import TrainConfig
from reparam.export.data import load
from reparam.export.draws import is_binary
from reparam.export.recipes import recipe
from reparam.export.run import RunConfig
from reparam.models import VAE


class Images(Dataset[Tensor]):
    """Images as from torchvision's MNIST with ToTensor, with a draw of each pixel unless all are black or white."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = torch.from_numpy(pixels.copy())
        self.binary = is_binary(self.pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> Tensor:
        picture = Image.fromarray(self.pixels[row, 0].numpy(), mode="L")
        grey = torch.from_numpy(np.array(picture, np.uint8, copy=True)).unsqueeze(0).float().div(255)
        return grey if self.binary else torch.bernoulli(grey)


def negative_elbo(model: VAE, images: Tensor) -> Tensor:
    posterior = model.encode(images)
    if model.kind == "gaussian":
        mu, log_var = posterior
        latents = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
        kl = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
    else:
        (logits,) = posterior
        latents = gumbel_softmax(logits, tau=1.0)
        q, log_p = logits.softmax(-1), model.prior().parameters[0].log_softmax(-1)
        kl = torch.sum(q * (torch.log(q + 1e-7) - log_p))
    decoded = torch.sigmoid(model.decode(latents))
    return binary_cross_entropy(decoded, images, reduction="sum") + kl


def negative_iwae(model: VAE, images: Tensor, samples: int) -> Tensor:
    mu, log_var = model.encode(images)
    q = Normal(mu, torch.exp(0.5 * log_var))
    latents = q.rsample((samples,))
    decoded = torch.sigmoid(model.decode(latents.flatten(0, 1))).unflatten(0, latents.shape[:2])
    errors = binary_cross_entropy(decoded, images.expand_as(decoded), reduction="none").flatten(2).sum(-1)
    weights = Normal(0, 1).log_prob(latents).sum(-1) - q.log_prob(latents).sum(-1) - errors
    return -(torch.logsumexp(weights, 0) - log(samples)).sum()


def epoch(model: VAE, optimizer: torch.optim.Optimizer, loader: DataLoader[Tensor], samples: int) -> float:
    model.train()
    total = 0.0
    for images in loader:
        optimizer.zero_grad()
        loss = negative_elbo(model, images) if samples == 1 else negative_iwae(model, images, samples)
        (loss / len(images)).backward()
        optimizer.step()
        total += loss.item()
    return total


def main() -> None:
    name, source = sys.argv[1:3]
    samples, workers, threads = map(int, sys.argv[3:])
    torch.set_num_threads(threads or torch.get_num_threads())
    config = TrainConfig(**{**recipe(name), "data": source})
    data = load(source)
    model = RunConfig.of(config, data).build()
    for layer in model.decoder:
        if isinstance(layer, nn.ConvTranspose2d):
            layer.forward = partial(nn.ConvTranspose2d.forward, layer)  # type: ignore[method-assign]  # use torch's convolution
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    dataset = Images(data.train)
    loader = DataLoader(
        dataset, batch_size=config.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    epoch(model, optimizer, loader, samples)  # warm up
    started = time.perf_counter()
    epoch(model, optimizer, loader, samples)
    print(len(dataset) / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
