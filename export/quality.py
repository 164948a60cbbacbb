"""Sample quality: how far the images that a prior decodes to are from real ones, in the features of a classifier, and
whether they are copies."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reparam.export.classifier import Classifier
from reparam.export.data import Dataset, load, load_npy
from reparam.export.draws import QUALITY, generator
from reparam.export.errors import RunError
from reparam.export.files import write_atomically
from reparam.export.run import Run
from reparam.models import VAE, Mixture

Float64 = npt.NDArray[np.float64]

DECODED = 1000  # rows at a time
FEWEST = 100  # images that distances are measured of
KERNEL_BLOCK = 1000  # images that are compared with as many others
NEIGHBOURS = 2000  # images whose nearest neighbours are looked for


@torch.inference_mode()
def quality(folder: Path, *, classifier: Path, samples: int, seed: int) -> dict[str, float]:
    """Compare images sampled from each prior of the run, as they are served, with the held-out images.

    Returns for the standard prior and, if there is one, for the mixture: `frechet`, `kernel` and its standard error,
    and `near_training`, which is about `training_share` where nothing is learnt by heart and 1 for copies. The first
    two also for as many training images: about what a perfect sampler would reach. Written to quality.json in the run's
    folder. Raises RunError, DataError.
    """
    run = Run(folder)
    model, draws = run.trained(), generator(seed, QUALITY)
    drawn = ((name, torch.cat([*sampled(model, prior, samples, draws)])) for name, prior in run.priors(model).items())
    result = _compare(drawn, run.data(), classifier, samples, draws)
    write_atomically(folder / "quality.json", json.dumps(result, indent=2).encode())
    return result


@torch.inference_mode()
def quality_of_images(path: Path, *, data: str, classifier: Path, seed: int) -> dict[str, float]:
    """The same of an .npy file of images, wherever they come from; data: what to compare them with, as for a training.
    Raises RunError, DataError."""
    images, real = load_npy(path), load(data)
    if images.shape[1:] != real.image_shape or len(images) < FEWEST:
        raise RunError(
            f"{path} holds {len(images)} images of {images.shape[1:]}: it should hold {FEWEST} or more of "
            f"{real.image_shape}, as those of {data}"
        )
    return _compare([("samples", torch.from_numpy(images))], real, classifier, len(images), generator(seed, QUALITY))


def _compare(
    drawn: Iterable[tuple[str, Tensor]], data: Dataset, classifier: Path, samples: int, draws: torch.Generator
) -> dict[str, float]:
    """What `quality` returns, of images by name; draws: of the training images that stand for a perfect sampler."""
    features = Classifier.load(classifier)
    if features.image_shape != data.image_shape:
        raise RunError(
            f"{classifier} was trained on images of {features.image_shape}, those of {data.name} are {data.image_shape}"
        )
    train, test = torch.from_numpy(data.train.copy()), torch.from_numpy(data.test.copy())
    if min(len(train), len(test)) < 2:
        raise RunError(f"{data.name} holds out {len(test)} of {len(train) + len(test)} images: distances need two")
    some = train[torch.randperm(len(train), generator=draws)[:samples]]
    real = features.features(test).double().numpy()
    result = dict(_distances("training", features.features(some).double().numpy(), real))
    result["training_share"] = len(train) / (len(train) + len(test))
    for name, images in drawn:
        result |= _distances(name, features.features(images).double().numpy(), real)
        result[f"{name}_near_training"] = near_training(images[:NEIGHBOURS], train, test)
    return result


def frechet(one: Float64, other: Float64) -> float:
    """Distance of the Gaussians that fit two sets of features, (n, F) and (m, F): |mu_1 - mu_2|^2 + tr(C_1 + C_2 -
    2 (C_1 C_2)^(1/2)) (Heusel et al., 2017, https://arxiv.org/abs/1706.08500, equation 6)."""
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # C_1 C_2 has the eigenvalues of a symmetric matrix that is nowhere negative; rounding may tell otherwise.
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0))
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * roots.sum())


def kernel_distance(one: Float64, other: Float64) -> tuple[float, float | None]:
    """Squared maximum mean discrepancy of two sets of features with the kernel (x y / F + 1)^3, unbiased: the mean over
    blocks of 1000 (Binkowski et al., 2018, https://arxiv.org/abs/1801.01401, section 4), and its standard error if
    there are two or more."""
    # Images may lie in an order, as MNIST's test images do by their writers, or beside those they were made of.
    random = np.random.default_rng(0)
    one, other = random.permutation(one), random.permutation(other)
    n = min(len(one), len(other))
    block = min(KERNEL_BLOCK, n)
    found = []
    for begin in range(0, n - block + 1, block):
        x, y = one[begin : begin + block], other[begin : begin + block]
        within = sum(_kernel(z, z).sum() - np.trace(_kernel(z, z)) for z in (x, y)) / (block * (block - 1))
        found.append(within - 2 * _kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None


def near_training(images: Tensor, train: Tensor, test: Tensor) -> float:
    """The share of images whose nearest neighbour among all others, by squared differences of pixels, is a training
    one: about the share of training images among them where nothing is learnt by heart, 1 for copies."""
    count = 0
    for part in images.split(DECODED):
        to_train, to_test = (
            torch.cdist(part.flatten(1).float(), real.flatten(1).float()).amin(1) for real in (train, test)
        )
        count += int((to_train < to_test).sum())
    return count / len(images)


def _distances(name: str, sampled: Float64, real: Float64) -> Iterator[tuple[str, float]]:
    kernel, error = kernel_distance(sampled, real)
    yield f"{name}_frechet", frechet(sampled, real)
    yield f"{name}_kernel", kernel
    if error is not None:
        yield f"{name}_kernel_standard_error", error


def _kernel(one: Float64, other: Float64) -> Float64:
    values: Float64 = (one @ other.T / one.shape[1] + 1) ** 3
    return values


def sampled(model: VAE, prior: Mixture, n: int, draws: torch.Generator) -> Iterator[Tensor]:
    """uint8 (<= DECODED, C, H, W), n in all: the mean of p(x | z), as it is served."""
    for begin in range(0, n, DECODED):
        parameters = prior.draw(min(DECODED, n - begin), draws)
        noise = model.noise(tuple(parameters[0].shape), draws)
        latents = model.sample(parameters, noise, model.default_temperature)
        yield (torch.sigmoid(model.decode(latents)) * 255).round().byte()
