"""`POST /sample`: draw rows of a seed from a model's prior, or from given parameters, and decode the rows."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from reparam.service.artifact.contract import FAMILIES, FLOAT32_MAX, Prior
from reparam.service.artifact.noise import NOISE_VERSION
from reparam.service.artifact.outputs import OUTPUTS, Output, OutputName
from reparam.service.errors import NonFiniteSample, Problem, TooLarge
from reparam.service.operations.arrays import parameter
from reparam.service.operations.faults import invalid
from reparam.service.operations.operation import Operation, response_model
from reparam.service.runtime.graphs import Graph
from reparam.service.runtime.repository import Model, Repository
from reparam.service.runtime.sampler import SamplerInputs

SEEDS = 2**64
FRESH_SEEDS = 2**53  # fresh seeds are smaller, because some JSON readers round larger integers

Count = Annotated[int, Field(strict=True, lt=SEEDS)]
Float32 = npt.NDArray[np.float32]


class SampleRequest(BaseModel):
    """A request for samples. Without parameters the request samples the model's prior."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    model: Annotated[str, Field(strict=True)] | None = None
    """Name of the model; default: the server's default model, else the server's first model by name."""
    version: Annotated[Count, Field(ge=1)] | None = None
    """Version of the model; default: the latest."""
    n: Annotated[Count, Field(ge=1)] = 1
    """Number of rows."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=FLOAT32_MAX)] | None = None
    """Scale of the noise (Gaussian) or of the relaxation (Gumbel); 0 is the exact limit: the mean, or a one-hot code.
    Default: the default temperature of the model."""
    hard: Annotated[bool, Field(strict=True)] = False
    """Gumbel: one-hot codes at any temperature."""
    seed: Annotated[Count, Field(ge=0)] | None = None
    """Seed of the noise; default: a fresh seed, named in the response."""
    start: Annotated[Count, Field(ge=0)] = 0
    """First row of the seed to return; rows start .. start + n - 1 do not depend on n."""
    mu: list[Any] | None = None
    """Gaussian: means, (*latent_shape) for every row or (n, *latent_shape). Default: means of the standard prior."""
    log_var: list[Any] | None = None
    """Gaussian: log variances, shaped like mu, at most 60. Default: log variances of the standard prior."""
    logits: list[Any] | None = None
    """Gumbel: unnormalized log probabilities, (D, K) for every row or (n, D, K). Default: logits of the standard
    prior."""
    prior: Prior | None = None
    """Distribution of rows without parameters: `standard`, the same distribution for every row, or `mixture`, one of
    several components, chosen by the seed and the row. Default: the mixture if the model has a mixture. With parameters
    the prior is `standard`, for the missing parameters."""
    outputs: Annotated[tuple[OutputName, ...], Field(min_length=1, max_length=4, fail_fast=True)] = ("images",)
    """Arrays to return: images; latents (Gaussian); codes and indices (Gumbel)."""


@dataclass(slots=True, eq=False)
class SampleRows:
    """The work of `/sample`: rows start .. start + n - 1 of a seed, with parameters.

    model: model of the rows.
    seed: 0 .. 2**64 - 1.
    start, n: first row and number of rows; start + n is at most 2**64.
    prior: distribution of the parameters missing from the request.
    parameters: parameters in the request by name, float32 (*latent_shape) for all rows or (n, *latent_shape).
    temperature: temperature of all rows.
    hard: draw at temperature 0, so that Gumbel codes are one-hot.
    outputs: arrays to return.
    graph: graph of the model's sampler.
    """

    model: Model
    seed: int
    start: int
    n: int
    prior: Prior
    parameters: Mapping[str, Float32]
    temperature: float
    hard: bool
    outputs: tuple[Output, ...]
    graph: Graph

    def fill(self, inputs: SamplerInputs, lo: int, hi: int, at: int) -> None:
        """Write rows lo .. hi - 1 of the work into the sampler's inputs, starting at input row `at`."""
        n = hi - lo
        inputs.draw(at, n, self.seed, self.start + lo, 0.0 if self.hard else self.temperature, self.prior)
        for name, values in self.parameters.items():
            is_per_row = values.ndim > len(self.model.contract.latent_shape)
            inputs.give(name, at, n, values[lo:hi] if is_per_row else values)

    def facts(self) -> dict[str, Any]:
        """Return the values of SAMPLE_FACTS, by name."""
        return {
            "model": self.graph.model,
            "version": self.graph.version,
            "seed": self.seed,
            "start": self.start,
            "n": self.n,
            "temperature": self.temperature,
            "hard": self.hard,
            "prior": self.prior,
            "noise_version": NOISE_VERSION,
        }

    def describe(self, lo: int, hi: int) -> str:
        """Describe rows lo .. hi - 1 for a message."""
        return (
            f"rows {self.start + lo} .. {self.start + hi - 1} of seed {self.seed} of model {self.graph.model!r} "
            f"version {self.graph.version}"
        )

    def log_fields(self, lo: int, hi: int) -> dict[str, Any]:
        """Describe rows lo .. hi - 1 as fields of a log line."""
        return {
            "model": self.graph.model,
            "version": self.graph.version,
            "seed": self.seed,
            "start": self.start + lo,
            "n": hi - lo,
        }

    def with_defaults(self) -> "SampleRows":
        """Return the same rows at the default temperature and without parameters."""
        return replace(self, parameters={}, temperature=self.model.contract.default_temperature)

    def overflow(self) -> Problem:
        """Return the problem of rows that are finite with defaults but not with the client's values."""
        contract = self.model.contract
        names = (*(("temperature",) if self.temperature else ()), *contract.family.parameters)
        return NonFiniteSample(
            f"the parameters given overflow {contract.precision} at temperature {self.temperature:g}: lower "
            f"{' or '.join(names)}"
        )


def resolve(request: SampleRequest, repository: Repository, max_rows: int) -> SampleRows:
    """Turn a request into the rows to compute, with defaults filled in and a fresh seed if the request has no seed.

    max_rows: largest number of rows in one request.

    Raises: Unavailable if no model is served; UnknownModel; InvalidRequest for fields that do not fit the model;
        TooLarge for more rows than max_rows.
    """
    name = request.model, request.version
    model = repository.found.get(name) or repository.find(*name)
    defaults = _defaults(model, request.outputs)
    n, start = request.n, request.start
    if n > max_rows:
        raise TooLarge(
            f"n is {n}, the limit is {max_rows} rows: ask for them in parts, each from its own `start`",
            limit=max_rows,
            got=n,
        )
    if start + n > SEEDS:
        raise invalid([(("start",), f"start + n must be at most 2**64 = {SEEDS}", start)])
    parameters: dict[str, Float32] = {}
    prior = defaults.prior
    if not request.model_fields_set <= _FIELDS_OF_EVERY_MODEL:
        _check_kind(request, model)
        given = {name: getattr(request, name) for name in model.contract.family.parameters}
        parameters = {
            name: parameter(name, values, n, model.contract) for name, values in given.items() if values is not None
        }
        prior = _prior(request, model, parameters)
    return SampleRows(
        model=model,
        seed=secrets.randbelow(FRESH_SEEDS) if request.seed is None else request.seed,
        start=start,
        n=n,
        prior=prior,
        parameters=parameters,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        hard=request.hard,
        outputs=defaults.outputs,
        graph=model.sampler,
    )


SAMPLE_FACTS = ("model", "version", "seed", "start", "n", "temperature", "hard", "prior", "noise_version")
SAMPLE = Operation(
    path="/sample",
    summary="Sample a model",
    description="Draw rows start .. start + n - 1 of a seed and decode them. The media type of the response follows "
    "`Accept`; the same request with the same seed gets the same rows, however it is batched.",
    request=SampleRequest,
    response=response_model(
        "SampleResponse",
        SAMPLE_FACTS,
        tuple(OUTPUTS),
        "The JSON response. seed, start and n with the same parameters return the same rows again.",
    ),
    resolve=resolve,
    facts=SAMPLE_FACTS,
)

_FIELDS_OF_ONE_KIND = [name for kind in FAMILIES.values() for name in kind.fields]
_FIELDS_OF_EVERY_MODEL = SampleRequest.model_fields.keys() - _FIELDS_OF_ONE_KIND - {"prior"}


@dataclass(frozen=True)
class _Defaults:
    """Defaults of a model, and the outputs of a request."""

    prior: Prior
    temperature: float
    outputs: tuple[Output, ...]


@lru_cache(1024)
def _defaults(model: Model, outputs: tuple[OutputName, ...]) -> _Defaults:
    """Look up the model's defaults, and check the outputs of a request. Raises: InvalidRequest."""
    contract = model.contract
    for index, output in enumerate(outputs):
        if output not in contract.family.outputs:
            has = ", ".join(contract.family.outputs)
            problem = f"model {model.name!r} is {contract.kind} and has no {output}; it has: {has}"
            raise invalid([(("outputs", index), problem, output)])
    if len(set(outputs)) < len(outputs):
        raise invalid([(("outputs",), "an output is named twice", outputs)])
    return _Defaults(contract.priors[0], contract.default_temperature, tuple(OUTPUTS[name] for name in outputs))


def _check_kind(request: SampleRequest, model: Model) -> None:
    """Refuse fields of another kind of model. Raises: InvalidRequest."""
    known = model.contract.family.fields
    for name in _FIELDS_OF_ONE_KIND:
        value = getattr(request, name)
        if name not in known and value is not None and value is not False:
            kind, has = model.contract.kind, ", ".join(known)
            problem = f"model {model.name!r} is {kind} and has no {name}; of its own it has: {has}"
            raise invalid([((name,), problem, value)])


def _prior(request: SampleRequest, model: Model, parameters: Mapping[str, Float32]) -> Prior:
    """Choose the prior of rows without parameters.

    parameters: parameters in the request, by name.

    Raises: InvalidRequest for a prior that the model lacks, and for a mixture together with parameters.
    """
    has = model.contract.priors
    if request.prior is None:
        return "standard" if parameters else has[0]
    if request.prior not in has:
        problem = f"model {model.name!r} has no such prior; it has: {', '.join(has)}"
        raise invalid([(("prior",), problem, request.prior)])
    if parameters and request.prior == "mixture":
        problem = f"with {' and '.join(parameters)} given no component is drawn: leave out one or the other"
        raise invalid([(("prior",), problem, request.prior)])
    return request.prior
