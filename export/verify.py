"""`reparam verify`: the checks of an artifact without the original network, and so without torch."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reparam.export.checks import (
    REFERENCE_ROWS,
    REFERENCE_SEED,
    TOLERANCE,
    Float32,
    batch_sizes,
    compare,
    encoder_images,
    open_encoder,
    reference_words,
    run_encoder,
    run_sampler,
    temperatures,
    thinned,
    tolerance_of,
    varied_feeds,
)
from reparam.export.errors import GateError
from reparam.service.artifact.contract import ArtifactError, Contract
from reparam.service.artifact.file import ENCODER_FILE, MODEL_FILE, Artifact, load

Float64 = npt.NDArray[np.float64]


def verify(folder: Path) -> list[str]:
    """Check both files of an artifact.

    folder: one version, as artifacts/NAME/1.

    Returns: a line for each passed check.

    Raises: ArtifactError if a file breaks the contract, GateError if a check fails.
    """
    artifact = load(folder / MODEL_FILE)
    contract = artifact.contract
    *_, large = sizes = batch_sizes(contract)
    whole = varied_feeds(contract, large, seed=1)
    for temperature in temperatures(contract):
        _check_batches(artifact, whole | {"temperature": np.full(large, temperature, np.float32)}, temperature)
    _check_reference(artifact)
    _check_encoder(folder, contract)
    return [
        f"the contract holds: {contract.kind}, latent {contract.latent_shape}, image {contract.image_shape}",
        f"batches of {_list(sizes)} give the same rows, in range, at temperature {_list(temperatures(contract))}",
        f"{contract.family.latents} follow the formula within {TOLERANCE}",
        f"{REFERENCE_ROWS} rows of seed {REFERENCE_SEED} equal the rows of the original network, images within "
        f"{tolerance_of('images', contract.precision)}",
        f"the encoder gives {_list(list(contract.family.parameters))} for batches of {_list(sizes)}",
    ]


def _check_batches(artifact: Artifact, feeds: dict[str, Float32], temperature: float) -> None:
    """Check the outputs of a large batch, and that smaller batches give the same rows.

    feeds: inputs of the large batch, by name.
    temperature: temperature of all rows, for messages.

    Raises: GateError.
    """
    latents = artifact.contract.family.latents
    whole = run_sampler(artifact, feeds, f"on {len(feeds['noise'])} rows")
    where = f"at temperature {temperature:g}"
    compare(latents, whole[latents], _formula(artifact.contract, feeds), where)
    compare("images", whole["images"], whole["images"].clip(0, 1), f"{where}, out of [0, 1]", tolerance=0)
    compare("pixels", whole["pixels"], np.rint(whole["images"] * 255), where, tolerance=1)
    for rows in batch_sizes(artifact.contract):
        part = run_sampler(artifact, {name: array[:rows] for name, array in feeds.items()}, f"on {rows} rows")
        for name, array in part.items():
            tolerance = tolerance_of(name, artifact.contract.precision)
            compare(name, array, whole[name][:rows], f"{where} in a batch of {rows}", tolerance)


def _formula(contract: Contract, feeds: dict[str, Float32]) -> Float64:
    """Compute the latents for these inputs in float64.

    feeds: inputs of the sampler by name, float32 (n, ...).

    Returns: float64 (n, *latent_shape).
    """
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


def _check_reference(artifact: Artifact) -> None:
    """Compare the reference rows with the values stored by the publication.

    Raises: GateError.
    """
    contract = artifact.contract
    feeds = contract.feeds(reference_words(contract.latent_shape), contract.default_temperature)
    found = run_sampler(artifact, feeds, "on the reference rows")
    for key, name in {"latents": contract.family.latents, "images": "images"}.items():
        try:
            values = np.array(contract.reference.get(key, []), np.float64)
        except (ValueError, TypeError) as error:
            raise GateError(f"the reference rows in the metadata are not numbers: {error}") from error
        tolerance = tolerance_of(name, contract.precision)
        compare(name, thinned(found[name]), values, "in the reference rows", tolerance)


def _check_encoder(folder: Path, contract: Contract) -> None:
    """Check names and shapes of the encoder, and that every batch size gives the same rows.

    Raises: ArtifactError if encoder.onnx cannot be opened, or has other inputs or outputs. GateError if the encoder
        fails, returns another shape, or returns other rows in another batch size.
    """
    session = open_encoder(folder)
    names = [node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()]
    if names != (["images"], list(contract.family.parameters)):
        raise ArtifactError(
            f"{folder / ENCODER_FILE}: an encoder maps images to "
            f"{_list([*contract.family.parameters])}, this one {names}"
        )
    *_, large = batch_sizes(contract)
    images = encoder_images(contract, large)
    whole = run_encoder(session, images)
    for rows in batch_sizes(contract):
        for name, array, all_rows in zip(names[1], run_encoder(session, images[:rows]), whole, strict=True):
            compare(name, array, all_rows[:rows], f"in a batch of {rows} through the encoder", relative=TOLERANCE)
            if array.shape[1:] != contract.latent_shape:
                raise GateError(f"the encoder's {name} has shape {array.shape[1:]}, not {contract.latent_shape}")


def _list(values: tuple[Any, ...] | list[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
