"""The contract of an artifact. No other module reads or writes the contract.

An ONNX file stores each field of Contract as JSON in the metadata property `reparam.<field>`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from reparam.service.artifact import noise
from reparam.service.artifact.outputs import OUTPUTS, OutputName
from reparam.service.errors import clipped

Arrays = dict[str, npt.NDArray[Any]]
Prior = Literal["standard", "mixture"]
Precision = Literal["float32", "float16"]

KEY_PREFIX = "reparam."
IMAGE_OUTPUTS = ("images", "pixels")
FLOAT32_MAX = float(np.finfo(np.float32).max)
LOG_VAR_MAX = 60.0  # a standard deviation of 1e13; exp(log_var) stays finite in float32
WEIGHTS_TOLERANCE = 1e-6  # largest difference between the sum of a mixture's weights and 1


class ArtifactError(Exception):
    """An artifact breaks the contract. The message names the fault; `load` puts the path of the file in front."""


@dataclass(frozen=True)
class Family:
    """The differences between Gaussian and Gumbel models.

    parameters: largest value allowed in a request, by name of the distribution's parameter.
    latents: name of the graph's latent output.
    noise: maps random words, uint64 (...), to the noise of the reparameterization, float32 of the same shape.
    outputs: names of the outputs available to requests.
    flags: names of request fields of this kind alone, besides the parameters.
    """

    parameters: Mapping[str, float]
    latents: str
    noise: Callable[[noise.Words], noise.Float32]
    outputs: tuple[OutputName, ...]
    flags: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the request fields of this kind alone: parameters and flags."""
        return (*self.parameters, *self.flags)


FAMILIES = {
    "gaussian": Family(
        parameters={"mu": FLOAT32_MAX, "log_var": LOG_VAR_MAX},
        latents="latents",
        noise=noise.normal,
        outputs=("images", "latents"),
    ),
    "gumbel": Family(
        parameters={"logits": FLOAT32_MAX},
        latents="codes",
        noise=noise.gumbel,
        outputs=("images", "codes", "indices"),
        flags=("hard",),
    ),
}


class Contract(BaseModel):
    """The contract of an artifact, a field for each metadata key.

    kind: a key of FAMILIES.
    latent_shape: shape of one row's latent; (variables, categories) for Gumbel.
    image_shape: (channels, height, width).
    prior: the standard prior. Each parameter is nested lists of latent_shape, or one number for every element.
    mixture: a prior of C components: `weights` (C), and each parameter (C, *latent_shape). None without a mixture.
    precision: precision of the decoder; latents are always float32.
    default_temperature: temperature of requests without `temperature`; at least 0.
    noise_version: version of the noise contract in `noise`.
    trained_on, evaluation: names and values for `/models`.
    tools: versions of the exporting packages.
    reference: outputs of the exported network on fixed inputs, for `reparam verify`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["gaussian", "gumbel"]
    latent_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]
    image_shape: tuple[Literal[1, 3], PositiveInt, PositiveInt]
    prior: dict[str, Any]
    mixture: dict[str, Any] | None = None
    precision: Precision = "float32"
    default_temperature: Annotated[float, Field(ge=0, le=FLOAT32_MAX)]
    noise_version: Literal[1]
    trained_on: dict[str, str | int | float]
    evaluation: dict[str, str | int | float]
    tools: dict[str, str]
    reference: dict[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """Write the contract as metadata properties: key to JSON."""
        return {KEY_PREFIX + key: json.dumps(value) for key, value in self.model_dump(mode="json").items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Contract":
        """Read the contract from metadata properties, and check each field.

        metadata: key to JSON. Keys without the prefix `reparam.` are ignored.

        Raises: ArtifactError naming the key, without the path of the file.
        """
        fields: dict[str, Any] = {}
        for key, value in metadata.items():
            if not key.startswith(KEY_PREFIX):
                continue
            try:
                fields[key.removeprefix(KEY_PREFIX)] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ArtifactError(f"metadata key {key!r} is not JSON: {error}") from error
        try:
            contract = cls.model_validate(fields)
            contract.prior_arrays()
            contract.mixture_arrays()
        except ValidationError as error:
            first = error.errors()[0]
            key = KEY_PREFIX + ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise ArtifactError(f"the metadata has no key {key!r}") from error
            if first["type"] == "extra_forbidden":
                raise ArtifactError(
                    f"metadata key {key!r} is unknown; {KEY_PREFIX}* are: {', '.join(cls.model_fields)}"
                ) from error
            raise ArtifactError(
                f"metadata key {key!r} is {clipped(repr(first['input']))}: {first['msg'].lower()}"
            ) from error
        return contract

    @property
    def elements(self) -> int:
        """Number of elements in one row's latent."""
        return prod(self.latent_shape)

    @property
    def priors(self) -> tuple[Prior, ...]:
        """Names of the priors for rows without parameters; the first is the default."""
        return ("standard",) if self.mixture is None else ("mixture", "standard")

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each output available to requests, by name."""
        return {name: OUTPUTS[name].row_shape(self.latent_shape, self.image_shape) for name in self.family.outputs}

    @property
    def family(self) -> Family:
        """The family of this kind."""
        return FAMILIES[self.kind]

    def prior_arrays(self) -> Arrays:
        """Read the parameters of the standard prior.

        Returns: parameters by name, float32 (*latent_shape).

        Raises: ArtifactError for wrong names, shapes or numbers; never after `from_metadata`.
        """
        return self._parameter_arrays("prior", self.prior, self.latent_shape)

    def mixture_arrays(self) -> tuple[noise.Float64, Arrays]:
        """Read the mixture's weights and the parameters of its components.

        Returns: weights, float64 (C,), and parameters by name, float32 (C, *latent_shape); C is 0 without a mixture.

        Raises: ArtifactError for wrong names, shapes or numbers; never after `from_metadata`.
        """
        if self.mixture is None:
            return np.zeros(0), {name: np.zeros((0, *self.latent_shape), np.float32) for name in self.family.parameters}
        parameters = dict(self.mixture)
        try:
            weights = _numbers(parameters.pop("weights", ()), np.float64)
        except ValueError as error:
            raise ArtifactError(f"the weights of reparam.mixture are no numbers: {error}") from error
        if weights.ndim != 1 or not (weights > 0).all() or not abs(weights.sum() - 1) < WEIGHTS_TOLERANCE:
            raise ArtifactError("the weights of reparam.mixture must be a list of positive numbers that sum to 1")
        return weights, self._parameter_arrays("mixture", parameters, (len(weights), *self.latent_shape))

    def _parameter_arrays(self, what: str, parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Arrays:
        if parameters.keys() != set(self.family.parameters):
            raise ArtifactError(
                f"reparam.{what} has {sorted(parameters)}, a {self.kind} has {sorted(self.family.parameters)}"
            )
        try:
            stored = {name: _numbers(values, np.float32) for name, values in parameters.items()}
            arrays = {name: np.broadcast_to(array, shape) for name, array in stored.items()}
        except ValueError as error:
            raise ArtifactError(f"reparam.{what} does not fit the shape {list(shape)}: {error}") from error
        if not all(np.isfinite(array).all() for array in stored.values()):
            raise ArtifactError(f"reparam.{what} holds NaN or infinity")
        return arrays

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """List the sampler's inputs in order, all float32.

        Returns: shape without the batch axis, by name.
        """
        latent_shaped = dict.fromkeys(("noise", *self.family.parameters), self.latent_shape)
        return {**latent_shaped, "temperature": ()}

    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """List the sampler's outputs in order.

        Returns: ONNX type and shape without the batch axis, by name.
        """
        return {
            self.family.latents: ("tensor(float)", self.latent_shape),
            "images": ("tensor(float)", self.image_shape),
            "pixels": ("tensor(uint8)", self.image_shape),
        }

    def feeds(self, words: noise.Words, temperature: float, parameters: Arrays | None = None) -> Arrays:
        """Make the sampler's inputs for n rows.

        words: uint64 (n, *latent_shape), random words.
        temperature: temperature of every row.
        parameters: parameters by name, (*latent_shape) or (n, *latent_shape); default: the standard prior.

        Returns: inputs by name, float32 (n, ...).
        """
        shape = (len(words), *self.latent_shape)
        parameters = self.prior_arrays() if parameters is None else parameters
        return {
            "noise": self.family.noise(words),
            **{name: np.ascontiguousarray(np.broadcast_to(array, shape)) for name, array in parameters.items()},
            "temperature": np.full(len(words), temperature, np.float32),
        }


def _numbers(values: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Convert nested lists of JSON to an array of a dtype.

    Raises: ValueError for values other than numbers, and for lists of different lengths.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":  # a number of more than 64 bits makes an array of objects
        raise ValueError(f"it holds {array.dtype}")
    with np.errstate(over="ignore"):  # the caller refuses infinity
        return array.astype(dtype)
