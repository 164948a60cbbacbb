"""Inputs, tolerances and comparisons shared by `verify` and the gate. Nothing here needs torch."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from reparam.export.errors import GateError
from reparam.service.artifact import noise
from reparam.service.artifact.contract import Arrays, ArtifactError, Contract, Precision
from reparam.service.artifact.file import ENCODER_FILE, Artifact, open_session

Float32 = npt.NDArray[np.float32]

TOLERANCE = 1e-4  # largest difference between two computations of a value
# Largest differences of images in [0, 1] and of pixels in 0 .. 255, by the decoder's precision.
IMAGE_TOLERANCES: dict[Precision, dict[str, float]] = {
    "float32": {"images": TOLERANCE, "pixels": 1},
    "float16": {"images": 0.02, "pixels": 5},
}
LARGE_BATCH, MIN_LARGE_BATCH, MAX_VALUES = 64, 5, 1 << 20  # rows; fewer if the images have more values than MAX_VALUES
LARGE_TEMPERATURE = 5.0
REFERENCE_SEED, REFERENCE_ROWS, REFERENCE_VALUES = 0, 3, 64


def batch_sizes(contract: Contract) -> tuple[int, ...]:
    """Batch sizes in which the gate and `verify` run both graphs, ascending: 1, 2, 3 and a large batch."""
    return 1, 2, 3, max(MIN_LARGE_BATCH, min(LARGE_BATCH, MAX_VALUES // prod(contract.image_shape)))


def temperatures(contract: Contract) -> list[float]:
    """Temperatures for the sampler in the gate and `verify`, ascending: 0, 0.5, the default, and a large value."""
    return sorted({0.0, contract.default_temperature, 0.5, LARGE_TEMPERATURE})


def varied_feeds(contract: Contract, rows: int, seed: int) -> dict[str, Float32]:
    """Make inputs of the sampler except the temperature: noise, and parameters with different values in each row.

    rows: number of rows.
    seed: seed of all values.

    Returns: float32 (rows, *latent_shape) by name, in the order of the graph's inputs.
    """

    def words(stream: int) -> noise.Words:
        return noise.words(seed, 0, rows, contract.latent_shape, stream)

    feeds = {"noise": contract.family.noise(words(0))}
    for stream, name in enumerate(contract.family.parameters, 1):
        feeds[name] = noise.normal(words(stream))
    return feeds


def encoder_images(contract: Contract, rows: int) -> Float32:
    """Make inputs of the encoder: uniform noise in [0, 1], float32 (rows, C, H, W)."""
    return noise.uniform(noise.words(2, 0, rows, contract.image_shape)).astype(np.float32)


def reference_words(latent_shape: tuple[int, ...]) -> noise.Words:
    """Random words of the reference rows, uint64 (REFERENCE_ROWS, *latent_shape)."""
    return noise.words(REFERENCE_SEED, 0, REFERENCE_ROWS, latent_shape)


def thinned(array: Float32) -> Float32:
    """Select at most REFERENCE_VALUES evenly spaced values of an array, as float32 (values,)."""
    flat = array.reshape(-1)
    values: Float32 = flat[np.linspace(0, flat.size - 1, min(REFERENCE_VALUES, flat.size)).astype(int)]
    return values


def tolerance_of(output: str, precision: Precision) -> float:
    """Largest difference allowed in an output of the sampler.

    output: name of the output.
    precision: precision of the decoder.
    """
    return IMAGE_TOLERANCES[precision].get(output, TOLERANCE)


def compare(
    name: str,
    found: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    where: str,
    tolerance: float = TOLERANCE,
    relative: float = 0.0,
) -> None:
    """Compare two arrays of equal shape.

    name, where: name of the array, and where the values come from, for the message.
    tolerance, relative: values may differ by tolerance + relative * |expected|.

    Raises: GateError naming the worst value, also for NaN, or naming both shapes if the shapes differ.
    """
    if found.shape != expected.shape:
        raise GateError(f"{name} has shape {found.shape} instead of {expected.shape} {where}")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    if not (difference <= tolerance + relative * np.abs(expected)).all():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
        at = [int(index) for index in worst]
        raise GateError(
            f"{name} is {found[worst]} instead of {expected[worst]} at {at} {where} (tolerance {tolerance})"
        )


def run_sampler(artifact: Artifact, feeds: dict[str, Float32], where: str) -> Arrays:
    """Run the sampler in onnxruntime.

    feeds: inputs by name, float32 (n, ...).
    where: words for the message, such as "on 3 rows".

    Returns: outputs by name, (n, ...).

    Raises: GateError if the graph fails.
    """
    try:
        return artifact.run(feeds)
    except Exception as error:  # onnxruntime's errors have no other common base class
        raise GateError(f"the graph does not run {where}: {error}") from error


def open_encoder(folder: Path) -> ort.InferenceSession:
    """Load encoder.onnx.

    folder: folder of one version.

    Raises: ArtifactError naming the file.
    """
    path = folder / ENCODER_FILE
    try:
        return open_session(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def run_encoder(session: ort.InferenceSession, images: Float32) -> list[Float32]:
    """Run the encoder in onnxruntime.

    images: (n, C, H, W) in [0, 1].

    Returns: the parameters of q(z | x), each (n, *latent_shape).

    Raises: GateError if the graph fails.
    """
    try:
        return list(session.run(None, {"images": images}))
    except Exception as error:  # onnxruntime's errors have no other common base class
        raise GateError(f"the encoder does not run on {len(images)} rows: {error}") from error
