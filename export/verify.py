"""What can be asked of an artifact without the network it was made from, and so without torch."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from reparam.export.errors import GateError
from reparam.service.artifact import noise
from reparam.service.artifact.contract import Arrays, ArtifactError, Contract, Precision
from reparam.service.artifact.file import ENCODER_FILE, MODEL_FILE, Artifact, load, open_session

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

TOLERANCE = 1e-4  # largest difference of two computations of one value
# Of images, and of their levels between 0 and 255, by the precision of the decoder.
IMAGE_TOLERANCES: dict[Precision, dict[str, float]] = {
    "float32": {"images": TOLERANCE, "pixels": 1},
    "float16": {"images": 0.02, "pixels": 5},
}
LARGE_BATCH, FEWEST, MOST_VALUES = 64, 5, 1 << 20  # rows of the large one; of large images fewer, so many values
LARGE_TEMPERATURE = 5.0
REFERENCE_SEED, REFERENCE_ROWS, REFERENCE_VALUES = 0, 3, 64


def batches(contract: Contract) -> tuple[int, ...]:
    """The sizes to try: of one row, a few, and many."""
    return 1, 2, 3, max(FEWEST, min(LARGE_BATCH, MOST_VALUES // prod(contract.image_shape)))


def temperatures(contract: Contract) -> list[float]:
    return sorted({0.0, contract.default_temperature, 0.5, LARGE_TEMPERATURE})


def verify(folder: Path) -> list[str]:
    """Check both files of an artifact. Returns a line for each check that held; raises ArtifactError, GateError."""
    artifact = load(folder / MODEL_FILE)
    contract = artifact.contract
    *_, large = sizes = batches(contract)
    whole = varied_feeds(contract, large, seed=1)
    for temperature in temperatures(contract):
        _check_batches(artifact, whole | {"temperature": np.full(large, temperature, np.float32)}, temperature)
    _check_reference(artifact)
    _check_encoder(folder, contract)
    return [
        f"the contract holds: {contract.kind}, latent {contract.latent_shape}, image {contract.image_shape}",
        f"batches of {_list(sizes)} answer the same rows, in range, at {_list(temperatures(contract))} temperature",
        f"{contract.traits.latents} follow the formula within {TOLERANCE}",
        f"{REFERENCE_ROWS} rows of seed {REFERENCE_SEED} are what the exported network answered, images within "
        f"{tolerance_of('images', contract.precision)}",
        f"the encoder answers {_list(list(contract.traits.parameters))} for batches of {_list(sizes)}",
    ]


def varied_feeds(contract: Contract, rows: int, seed: int) -> dict[str, Float32]:
    """Inputs of the sampler but for the temperature: noise, and parameters that vary from row to row."""

    def words(stream: int) -> noise.Words:
        return noise.words(seed, 0, rows, contract.latent_shape, stream)

    feeds = {"noise": contract.traits.noise(words(0))}
    for stream, name in enumerate(contract.traits.parameters, 1):
        feeds[name] = noise.normal(words(stream))
    return feeds


def formula(contract: Contract, feeds: dict[str, Float32]) -> Float64:
    """The latents for these inputs, in float64."""
    inputs = {name: array.astype(np.float64) for name, array in feeds.items()}
    temperature = inputs["temperature"].reshape(-1, *[1] * len(contract.latent_shape))
    return _FORMULAS[contract.kind](inputs, temperature)


def _gaussian(inputs: dict[str, Float64], temperature: Float64) -> Float64:
    latents: Float64 = inputs["mu"] + temperature * np.exp(0.5 * inputs["log_var"]) * inputs["noise"]
    return latents


def _gumbel(inputs: dict[str, Float64], temperature: Float64) -> Float64:
    scores = inputs["logits"] + inputs["noise"]
    scores = scores - scores.max(-1, keepdims=True)
    relaxed = np.exp(scores / np.where(temperature > 0, temperature, 1))
    codes: Float64 = np.where(temperature > 0, relaxed / relaxed.sum(-1, keepdims=True), scores == 0)
    return codes


_FORMULAS = {"gaussian": _gaussian, "gumbel": _gumbel}


def tolerance_of(output: str, precision: Precision) -> float:
    return IMAGE_TOLERANCES[precision].get(output, TOLERANCE)


def compare(
    name: str,
    found: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    where: str,
    tolerance: float = TOLERANCE,
    relative: float = 0.0,
) -> None:
    """Raises GateError if any two values differ by more than the tolerance, and that times what is expected, or are not
    numbers."""
    if found.shape != expected.shape:
        raise GateError(f"{name} has shape {found.shape} instead of {expected.shape} {where}")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    if not (difference <= tolerance + relative * np.abs(expected)).all():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
        at = [int(index) for index in worst]
        raise GateError(
            f"{name} is {found[worst]} instead of {expected[worst]} at {at} {where} (tolerance {tolerance})"
        )


def run(artifact: Artifact, feeds: dict[str, Float32], where: str) -> Arrays:
    try:
        return artifact.run(feeds)
    except Exception as error:  # onnxruntime's errors have no common base but this
        raise GateError(f"the graph does not run {where}: {error}") from error


def reference(latents: Float32, images: Float32) -> dict[str, Any]:
    """A few values of the reference rows, for the metadata."""
    return {
        "seed": REFERENCE_SEED,
        "rows": REFERENCE_ROWS,
        "latents": _thinned(latents).tolist(),
        "images": _thinned(images).tolist(),
    }


def reference_feeds(contract: Contract) -> dict[str, Float32]:
    words = noise.words(REFERENCE_SEED, 0, REFERENCE_ROWS, contract.latent_shape)
    return contract.feeds(words, contract.default_temperature)


def _check_batches(artifact: Artifact, feeds: dict[str, Float32], temperature: float) -> None:
    latents = artifact.contract.traits.latents
    whole = run(artifact, feeds, f"on {len(feeds['noise'])} rows")
    where = f"at temperature {temperature:g}"
    compare(latents, whole[latents], formula(artifact.contract, feeds), where)
    compare("images", whole["images"], whole["images"].clip(0, 1), f"{where}, out of [0, 1]", tolerance=0)
    compare("pixels", whole["pixels"], np.rint(whole["images"] * 255), where, tolerance=1)
    for rows in batches(artifact.contract):
        part = run(artifact, {name: array[:rows] for name, array in feeds.items()}, f"on {rows} rows")
        for name, array in part.items():
            tolerance = tolerance_of(name, artifact.contract.precision)
            compare(name, array, whole[name][:rows], f"{where} in a batch of {rows}", tolerance)


def _check_reference(artifact: Artifact) -> None:
    expected = artifact.contract.reference
    found = run(artifact, reference_feeds(artifact.contract), "on the reference rows")
    names = {"latents": artifact.contract.traits.latents, "images": "images"}
    for key, name in names.items():
        try:
            values = np.array(expected.get(key, []), np.float64)
        except (ValueError, TypeError) as error:
            raise GateError(f"the reference rows in the metadata are no numbers: {error}") from error
        tolerance = tolerance_of(name, artifact.contract.precision)
        compare(name, _thinned(found[name]), values, "in the reference rows", tolerance)


def _check_encoder(folder: Path, contract: Contract) -> None:
    session = open_encoder(folder)
    names = [node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()]
    if names != (["images"], list(contract.traits.parameters)):
        raise ArtifactError(
            f"{folder / ENCODER_FILE}: an encoder maps images to "
            f"{_list([*contract.traits.parameters])}, this one {names}"
        )
    *_, large = batches(contract)
    images = encoder_images(contract, large)
    whole = run_encoder(session, images)
    for rows in batches(contract):
        for name, array, all_rows in zip(names[1], run_encoder(session, images[:rows]), whole, strict=True):
            compare(name, array, all_rows[:rows], f"in a batch of {rows} through the encoder", relative=TOLERANCE)
            if array.shape[1:] != contract.latent_shape:
                raise GateError(f"the encoder's {name} has shape {array.shape[1:]}, not {contract.latent_shape}")


def open_encoder(folder: Path) -> ort.InferenceSession:
    """Raises ArtifactError."""
    path = folder / ENCODER_FILE
    try:
        return open_session(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def encoder_images(contract: Contract, rows: int) -> Float32:
    return noise.uniform(noise.words(2, 0, rows, contract.image_shape)).astype(np.float32)


def run_encoder(session: ort.InferenceSession, images: Float32) -> list[Float32]:
    try:
        return list(session.run(None, {"images": images}))
    except Exception as error:  # onnxruntime's errors have no common base but this
        raise GateError(f"the encoder does not run on {len(images)} rows: {error}") from error


def _thinned(array: Float32) -> Float32:
    """At most REFERENCE_VALUES values, evenly spaced."""
    flat = array.reshape(-1)
    thinned: Float32 = flat[np.linspace(0, flat.size - 1, min(REFERENCE_VALUES, flat.size)).astype(int)]
    return thinned


def _list(values: tuple[Any, ...] | list[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
