"""Sample quality: the distance between decoded samples and real images in a classifier's features, and copies."""

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

BATCH = 1000  # rows per call of the decoder
MIN_IMAGES = 100  # fewest images in a file for `quality_of_images`
KERNEL_BLOCK = 1000  # images of each set in a block of the kernel distance
NEIGHBOURS = 2000  # largest number of sampled images whose nearest neighbours are searched


@torch.inference_mode()
def quality(folder: Path, *, classifier: Path, samples: int, seed: int) -> dict[str, float]:
    """Compare images sampled from each prior of the run, as the service decodes them, with the held-out images.

    The result is written to quality.json in the run's folder.

    classifier: folder of a trained classifier.
    samples: images drawn from each prior.
    seed: seed of the draws.

    Returns: values by key `<set>_<measure>`. The sets are `standard`, `mixture` if the run has a mixture, and
        `training`: up to `samples` training images, whose values are about the values of a perfect sampler. The
        measures are `frechet`, `kernel`, `kernel_standard_error` (from two full blocks on), and, except for `training`,
        `near_training`. `training_share` is the share of training images among all real images. Without memorization
        `near_training` is about `training_share`; for copies `near_training` is 1.

    Raises: RunError if the run has not finished, or the folder holds no classifier for images of this shape; DataError.
    """
    run = Run(folder)
    model, draws = run.trained(), generator(seed, QUALITY)
    drawn = (
        (name, torch.cat([*sample_images(model, prior, samples, draws)])) for name, prior in run.priors(model).items()
    )
    result = _compare(drawn, run.data(), classifier, samples, draws)
    write_atomically(folder / "quality.json", json.dumps(result, indent=2).encode())
    return result


@torch.inference_mode()
def quality_of_images(path: Path, *, data: str, classifier: Path, seed: int) -> dict[str, float]:
    """Compare the images in an .npy file, from any sampler, with the held-out images of a data set.

    path: file of at least MIN_IMAGES images, in a dtype and shape of `load_npy`.
    data: source of the real images, as for a training.
    classifier: folder of a trained classifier.
    seed: seed of the choice of training images.

    Returns: values by key, as from `quality`, for the sets `samples` and `training`.

    Raises: RunError for too few images, images of another shape, or no classifier for this shape; DataError; OSError.
    """
    images, real = load_npy(path), load(data)
    if images.shape[1:] != real.image_shape or len(images) < MIN_IMAGES:
        raise RunError(
            f"{path} holds {len(images)} images of {images.shape[1:]}: at least {MIN_IMAGES} images of "
            f"{real.image_shape} are needed, as in {data}"
        )
    return _compare([("samples", torch.from_numpy(images))], real, classifier, len(images), generator(seed, QUALITY))


def _compare(
    drawn: Iterable[tuple[str, Tensor]], data: Dataset, classifier: Path, samples: int, draws: torch.Generator
) -> dict[str, float]:
    """Measure each named set of images.

    drawn: name of each set, and its images, uint8 (n, C, H, W).
    data: the real images.
    classifier: folder of a trained classifier.
    samples: number of training images to measure in comparison.
    draws: generator for the choice of training images.

    Returns: values by key, as described in `quality`.

    Raises: RunError.
    """
    features = Classifier.load(classifier)
    if features.image_shape != data.image_shape:
        raise RunError(
            f"{classifier} was trained on images of {features.image_shape}, "
            f"{data.name} has images of {data.image_shape}"
        )
    train, test = torch.from_numpy(data.train.copy()), torch.from_numpy(data.test.copy())
    if min(len(train), len(test)) < 2:
        raise RunError(
            f"{data.name} holds out {len(test)} of {len(train) + len(test)} images: distances need two of each"
        )
    some = train[torch.randperm(len(train), generator=draws)[:samples]]
    real = features.features(test).double().numpy()
    result = dict(_distances("training", features.features(some).double().numpy(), real))
    result["training_share"] = len(train) / (len(train) + len(test))
    for name, images in drawn:
        result |= _distances(name, features.features(images).double().numpy(), real)
        result[f"{name}_near_training"] = near_training(images[:NEIGHBOURS], train, test)
    return result


def frechet(one: Float64, other: Float64) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features.

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) (Heusel et al., 2017, https://arxiv.org/abs/1706.08500,
    equation 6).

    one, other: float64 (n, F) and (m, F).

    Returns: the squared distance, as is usual.
    """
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # The eigenvalues of C_1 C_2 are real and not negative, except for rounding.
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0))
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * roots.sum())


def kernel_distance(one: Float64, other: Float64) -> tuple[float, float | None]:
    """Squared maximum mean discrepancy of two sets of features with the kernel (x y / F + 1)^3, unbiased.

    The sets are shuffled and cut into blocks of KERNEL_BLOCK images, or of all images of a smaller set. The result is
    the mean over blocks (Binkowski et al., 2018, https://arxiv.org/abs/1801.01401, section 4). Images beyond the last
    full block are dropped.

    one, other: float64 (n, F) and (m, F).

    Returns: the squared distance, perhaps below 0; and the standard error over blocks, None for a single block.
    """
    # The order of images may carry information: MNIST's test images are sorted by writer.
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
    """Share of images whose nearest neighbour, by squared pixel differences, is a training image rather than a test
    image.

    Without memorization, the result is about the share of training images among the real images. For copies of training
    images, the result is 1.

    images, train, test: uint8 (n, C, H, W).
    """
    count = 0
    for part in images.split(BATCH):
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


def sample_images(model: VAE, prior: Mixture, n: int, draws: torch.Generator) -> Iterator[Tensor]:
    """Sample images from a prior: the mean of p(x | z), as the service decodes.

    n: number of images in all.
    draws: generator of components and noise.

    Returns: an iterator of batches, uint8 (up to BATCH, C, H, W).
    """
    for begin in range(0, n, BATCH):
        parameters = prior.draw(min(BATCH, n - begin), draws)
        noise = model.noise(tuple(parameters[0].shape), draws)
        latents = model.sample(parameters, noise, model.default_temperature)
        yield (torch.sigmoid(model.decode(latents)) * 255).round().byte()
