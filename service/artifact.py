"""The artifact: one ONNX file that says what it is, and the only code that reads and writes what it says.

A file carries its contract in ONNX metadata properties, one `reparam.<field of Contract>` each, in JSON.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from service import noise

Arrays = dict[str, npt.NDArray[Any]]
Prior = Literal["standard", "mixture"]
Precision = Literal["float32", "float16"]
Providers = Sequence[Any]  # each a name, or a name and options

MODEL_FILE, ENCODER_FILE = "model.onnx", "encoder.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VERSION = re.compile(r"[1-9][0-9]{0,17}")
KEY_PREFIX = "reparam."
IMAGE_OUTPUTS = ("images", "pixels")
TRIED = 64  # components that are run at a time when a file is loaded
WEIGHTS_TOLERANCE = 1e-6  # of the sum of a mixture's weights


class ArtifactError(Exception):
    """The file breaks the contract; the message names the file and the fault."""


@dataclass(frozen=True)
class Kind:
    """What distinguishes the kinds of model: their parameters, their latent output, and their noise."""

    parameters: tuple[str, ...]
    latents: str
    noise: Callable[[noise.Words], noise.Float32]

    @property
    def fields(self) -> tuple[str, ...]:
        """Of a request, those that only this kind has."""
        return (*self.parameters, *(("hard",) if self.latents == "codes" else ()))


KINDS = {
    "gaussian": Kind(parameters=("mu", "log_var"), latents="latents", noise=noise.normal),
    "gumbel": Kind(parameters=("logits",), latents="codes", noise=noise.gumbel),
}


class Contract(BaseModel):
    """What an artifact says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["gaussian", "gumbel"]
    latent_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]
    image_shape: tuple[Literal[1, 3], PositiveInt, PositiveInt]
    prior: dict[str, Any]  # each parameter: nested lists of latent_shape, or one number for every element
    mixture: dict[str, Any] | None = None  # a prior of C components: weights (C), each parameter (C, *latent_shape)
    precision: Precision = "float32"  # that the decoder computes in; latents are always float32
    default_temperature: Annotated[float, Field(ge=0)]
    noise_version: Literal[1]
    trained_on: dict[str, str | int]
    evaluation: dict[str, str | int | float]
    tools: dict[str, str]
    reference: dict[str, Any]  # what the network that was exported answered, for `verify`

    def to_metadata(self) -> dict[str, str]:
        return {KEY_PREFIX + key: json.dumps(value) for key, value in self.model_dump(mode="json").items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Contract":
        """Raises ArtifactError naming the key."""
        fields: dict[str, Any] = {}
        for key, field in cls.model_fields.items():
            try:
                fields[key] = json.loads(metadata[KEY_PREFIX + key])
            except KeyError:
                if field.is_required():
                    raise ArtifactError(f"the metadata has no key {KEY_PREFIX + key!r}") from None
            except (ValueError, RecursionError) as error:
                raise ArtifactError(f"metadata key {KEY_PREFIX + key!r} is not JSON: {error}") from error
        try:
            contract = cls.model_validate(fields)
            contract.prior_arrays()
            contract.mixture_arrays()
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(
                f"metadata key {KEY_PREFIX + key!r} is {first['input']!r}: {first['msg'].lower()}"
            ) from error
        return contract

    @property
    def elements(self) -> int:
        """Numbers of one row's latent."""
        return prod(self.latent_shape)

    @property
    def priors(self) -> tuple[Prior, ...]:
        """What rows can be drawn from without parameters; the first is the default."""
        return ("standard",) if self.mixture is None else ("mixture", "standard")

    @property
    def traits(self) -> Kind:
        return KINDS[self.kind]

    def prior_arrays(self) -> Arrays:
        """The parameters of the prior, float32 (*latent_shape) each. Raises ArtifactError."""
        return self._parameter_arrays("prior", self.prior, self.latent_shape)

    def mixture_arrays(self) -> tuple[noise.Float64, Arrays]:
        """The weights of the mixture's components, float64 (C,), and their parameters, float32 (C, *latent_shape)
        each; without a mixture C is 0. Raises ArtifactError."""
        if self.mixture is None:
            return np.zeros(0), {name: np.zeros((0, *self.latent_shape), np.float32) for name in self.traits.parameters}
        parameters = dict(self.mixture)
        try:
            weights = _numbers(parameters.pop("weights", ()), np.float64)
        except ValueError as error:
            raise ArtifactError(f"the weights of the mixture are no numbers: {error}") from error
        if weights.ndim != 1 or not (weights > 0).all() or not abs(weights.sum() - 1) < WEIGHTS_TOLERANCE:
            raise ArtifactError("the weights of the mixture must be a list of positive numbers that sum to 1")
        return weights, self._parameter_arrays("mixture", parameters, (len(weights), *self.latent_shape))

    def _parameter_arrays(self, what: str, parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Arrays:
        if parameters.keys() != set(self.traits.parameters):
            raise ArtifactError(
                f"the {what} has {sorted(parameters)}, a {self.kind} has {sorted(self.traits.parameters)}"
            )
        try:
            arrays = {name: np.broadcast_to(_numbers(values, np.float32), shape) for name, values in parameters.items()}
        except ValueError as error:
            raise ArtifactError(f"the {what} does not fit the shape {list(shape)}: {error}") from error
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ArtifactError(f"the {what} holds NaN or infinity")
        return arrays

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Names of the sampler's inputs, in order, and their shapes after the batch axis; all float32."""
        latent_shaped = dict.fromkeys(("noise", *self.traits.parameters), self.latent_shape)
        return {**latent_shaped, "temperature": ()}

    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names of the sampler's outputs, in order, their types and their shapes after the batch axis."""
        return {
            self.traits.latents: ("tensor(float)", self.latent_shape),
            "images": ("tensor(float)", self.image_shape),
            "pixels": ("tensor(uint8)", self.image_shape),
        }


def _numbers(values: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Nested lists as JSON has them -> an array. Raises ValueError."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":  # what does not fit into 64 bits is an object
        raise ValueError(f"it holds {array.dtype}")
    with np.errstate(over="ignore"):  # infinity is refused later
        return array.astype(dtype)


# How the operators that run another graph, as often as the data says, are named in a file: field 4 of a NodeProto and
# the length of the name come before it. Where weights happen to look like that, a graph counts as not steady.
_BRANCHES = tuple(b'"%c%b' % (len(name), name) for name in (b"If", b"Loop", b"Scan", b"SequenceMap"))


@dataclass(frozen=True)
class Artifact:
    """A sampler that is loaded and keeps its contract.

    size: bytes of the file. steady: how long a run takes depends on its rows alone, not on what is in them.
    """

    contract: Contract
    session: ort.InferenceSession
    size: int
    steady: bool

    @property
    def provider(self) -> str:
        return str(self.session.get_providers()[0])

    def run(self, feeds: Mapping[str, npt.NDArray[np.float32]]) -> Arrays:
        """Run the graph on the inputs of `contract.inputs()`, each (n, ...). Returns all its outputs by name."""
        names = list(self.contract.outputs())
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1")  # no CUDA graph: these arrays do not stay
        return dict(zip(names, self.session.run(names, dict(feeds), options), strict=True))


def load(path: Path, attempts: Sequence[Providers] = (("CPUExecutionProvider",),), threads: int = 0) -> Artifact:
    """Load a sampler and check that it keeps the contract.

    attempts: providers for onnxruntime, the first preferred; of several attempts the first that takes the graph counts.
    threads: for one run on the CPU, 0 for one a core.

    Raises ArtifactError naming the file and the fault.
    """
    try:
        content = path.read_bytes()
        session = _open_first(content, attempts, threads)
        contract = Contract.from_metadata(session.get_modelmeta().custom_metadata_map)
        _check_signature(session, contract)
        artifact = Artifact(contract, session, len(content), steady=not any(sign in content for sign in _BRANCHES))
        _check_run(artifact)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    return artifact


def _open_first(content: bytes, attempts: Sequence[Providers], threads: int) -> ort.InferenceSession:
    *others, last = attempts
    for providers in others:
        with contextlib.suppress(ArtifactError):
            return open_session(content, providers, threads)
    return open_session(content, last, threads)


def open_session(content: bytes, providers: Providers, threads: int = 0) -> ort.InferenceSession:
    """An onnxruntime session for a self-contained file. Raises ArtifactError."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what matters is raised
    # An idle server leaves the cores to others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # No folder at all: whatever other file the graph wants to read as weights, it may not.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    try:
        return ort.InferenceSession(content, options, providers=list(providers))
    except Exception as error:  # onnxruntime's errors have no common base but this
        fault = str(error).split(" : ")[-1].strip()
        if "xternal" in fault:
            raise ArtifactError(f"it keeps weights in another file; an artifact is one file ({fault})") from error
        raise ArtifactError(f"it is truncated, or no ONNX file that onnxruntime can run ({fault})") from error


def _check_signature(session: ort.InferenceSession, contract: Contract) -> None:
    inputs = {name: ("tensor(float)", shape) for name, shape in contract.inputs().items()}
    for what, nodes, expected in (
        ("input", session.get_inputs(), inputs),
        ("output", session.get_outputs(), contract.outputs()),
    ):
        found = {node.name: node for node in nodes}
        if found.keys() != expected.keys():
            raise ArtifactError(
                f"a {contract.kind} sampler has the {what}s {', '.join(expected)}; this file has {', '.join(found)}"
            )
        for name, (type_, shape) in expected.items():
            if found[name].type != type_:
                raise ArtifactError(f"{what} {name!r} is {found[name].type}, not {type_}")
            batch, *rest = found[name].shape
            if isinstance(batch, int):
                raise ArtifactError(f"{what} {name!r} has a fixed batch of {batch}; the first axis must be dynamic")
            if rest != list(shape):
                raise ArtifactError(f"{what} {name!r} has shape {rest} after the batch axis, not {list(shape)}")


def _check_run(artifact: Artifact) -> None:
    """Run it twice on the same two rows: it must run, stay finite, and draw no noise of its own."""
    contract = artifact.contract
    feeds = prior_feeds(contract, noise.words(0, 0, 2, contract.latent_shape), contract.default_temperature)
    try:
        first, second = artifact.run(feeds), artifact.run(feeds)
    except Exception as error:  # onnxruntime's errors have no common base but this
        raise ArtifactError(f"it does not run on two rows of its prior: {error}") from error
    for name, array in first.items():
        _check_finite(name, array, "the prior")
        if not np.array_equal(array, second[name]):
            raise ArtifactError(f"output {name!r} differs between two runs on the same input: the graph draws noise")

    weights, components = contract.mixture_arrays()
    for begin in range(0, len(weights), TRIED):
        parameters = {name: array[begin : begin + TRIED] for name, array in components.items()}
        words = noise.words(0, begin, min(TRIED, len(weights) - begin), contract.latent_shape)
        for name, array in artifact.run(_feeds(contract, words, parameters, contract.default_temperature)).items():
            _check_finite(name, array, "the mixture")


def _check_finite(name: str, array: npt.NDArray[Any], what: str) -> None:
    if not np.isfinite(array).all():
        raise ArtifactError(f"output {name!r} holds NaN or infinity for {what}")


def prior_feeds(contract: Contract, words: noise.Words, temperature: float) -> dict[str, npt.NDArray[np.float32]]:
    """The graph's inputs for rows of the standard prior with this noise."""
    return _feeds(contract, words, contract.prior_arrays(), temperature)


def _feeds(
    contract: Contract, words: noise.Words, parameters: Arrays, temperature: float
) -> dict[str, npt.NDArray[np.float32]]:
    """parameters: by name, of the latent shape for all rows or (n, *latent_shape)."""
    n = len(words)
    per_row = partial(np.broadcast_to, shape=(n, *contract.latent_shape))
    return {
        "noise": contract.traits.noise(words),
        **{name: np.ascontiguousarray(per_row(array)) for name, array in parameters.items()},
        "temperature": np.full(n, temperature, np.float32),
    }
