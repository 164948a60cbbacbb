"""The body of `POST /sample`: what may be said, checked once at the door."""

import secrets
from functools import cache, lru_cache
from json import JSONEncoder
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from reparam.service.artifact.contract import FLOAT32_MAX, KINDS, Output, Prior
from reparam.service.errors import SHORT, InvalidRequest, TooLarge, clipped
from reparam.service.runtime.repository import Model, Repository
from reparam.service.runtime.sampler import Float32, Rows

SEEDS = 2**64
LOG_VAR_MAX = 60.0  # a standard deviation of 1e13

Count = Annotated[int, Field(strict=True, lt=SEEDS)]
Fault = tuple[tuple[int | str, ...], str, Any]  # where, what, and the value there


class SampleRequest(BaseModel):
    """What to sample. A request without parameters samples the model's prior."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    model: Annotated[str, Field(strict=True)] | None = None
    """Name of the model; default: the server's default model, else its first by name."""
    version: Annotated[Count, Field(ge=1)] | None = None
    """Version of the model; default: the latest."""
    n: Annotated[Count, Field(ge=1)] = 1
    """Number of rows."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=FLOAT32_MAX)] | None = None
    """Scale of the noise (Gaussian) or of the relaxation (Gumbel); 0 is the exact limit: the mean, or a one-hot code.
    Default: the model's."""
    hard: Annotated[bool, Field(strict=True)] = False
    """Gumbel: one-hot codes at any temperature."""
    seed: Annotated[Count, Field(ge=0)] | None = None
    """Seed of the noise; default: a fresh one, which the answer names."""
    start: Annotated[Count, Field(ge=0)] = 0
    """First row of the seed to return; rows start .. start + n - 1 do not depend on n."""
    mu: list[Any] | None = None
    """Gaussian: means, of the latent shape for every row or (n, *latent_shape). Default: the standard prior's."""
    log_var: list[Any] | None = None
    """Gaussian: log variances, shaped like mu, at most 60. Default: the standard prior's."""
    logits: list[Any] | None = None
    """Gumbel: unnormalized log probabilities (D, K) for every row or (n, D, K). Default: the standard prior's."""
    prior: Prior | None = None
    """What rows without parameters are drawn from: `standard`, one distribution for every row, or `mixture`, one of
    several, which the row and its seed decide; learned with the weights or fitted to the latents afterwards. Default:
    the mixture where the model has one. With parameters it is `standard`, for those that are not given."""
    outputs: Annotated[tuple[Output, ...], Field(min_length=1, max_length=4, fail_fast=True)] = ("images",)
    """What to return: images; latents (Gaussian); codes and indices (Gumbel)."""


def parse(body: bytes) -> SampleRequest:
    """Raises InvalidRequest. An empty body asks for one row of the default model."""
    try:
        request: SampleRequest = _REQUEST.validator.validate_json(body or b"{}")
    except ValidationError:
        raise _explained(body) from None
    return request


_REQUEST = TypeAdapter(SampleRequest)


def _explained(body: bytes) -> InvalidRequest:
    """What is wrong with it. Looked for a second time and in two steps, for a body may hold a million faults."""
    try:
        fields = from_json(body)
    except ValueError as error:
        return InvalidRequest(f"the body cannot be read as JSON in UTF-8: {error}")
    if not isinstance(fields, dict):
        return InvalidRequest(f"the body must be a JSON object, got {_short(fields)}")
    known = {name: fields[name] for name in SampleRequest.model_fields if name in fields}
    message = f"unknown field; the fields are {', '.join(SampleRequest.model_fields)}"
    faults: list[Fault] = [((name,), message, value) for name, value in fields.items() if name not in known]
    try:
        SampleRequest.model_validate(known)
    except ValidationError as refusal:
        faults = [*_faults(refusal), *faults]
    return _invalid(faults)


def resolve(request: SampleRequest, repository: Repository, max_rows: int) -> Rows:
    """The rows a request asks for. Raises UnknownModel, InvalidRequest, TooLarge."""
    model = repository.find(request.model, request.version)
    _check_outputs(model, request.outputs)
    if request.n > max_rows:
        raise TooLarge(
            f"n is {request.n}, the limit is {max_rows} rows: ask for them in parts, each from its own `start`",
            limit=max_rows,
            got=request.n,
        )
    if request.start + request.n > SEEDS:
        raise _invalid([(("start",), f"start + n must be at most 2**64 = {SEEDS}", request.start)])
    parameters: dict[str, Float32] = {}
    prior = model.contract.priors[0]
    if not request.model_fields_set <= _OF_EVERY_REQUEST:
        _check_kind(request, model)
        given = {name: getattr(request, name) for name in model.contract.traits.parameters}
        parameters = {
            name: _parameter(name, values, request.n, model) for name, values in given.items() if values is not None
        }
        prior = _prior(request, model, parameters)
    return Rows(
        model=model,
        # Below 2**53, so that any reader of JSON can hand it back.
        seed=secrets.randbelow(2**53) if request.seed is None else request.seed,
        start=request.start,
        n=request.n,
        prior=prior,
        parameters=parameters,
        temperature=model.contract.default_temperature if request.temperature is None else request.temperature,
        hard=request.hard,
        outputs=request.outputs,
    )


_OF_ONE_KIND = [name for kind in KINDS.values() for name in kind.fields]
_OF_EVERY_REQUEST = SampleRequest.model_fields.keys() - _OF_ONE_KIND - {"prior"}


def _check_kind(request: SampleRequest, model: Model) -> None:
    """Refuse what only the other kind of model has."""
    known = model.contract.traits.fields
    for name in _OF_ONE_KIND:
        value = getattr(request, name)
        if name not in known and value is not None and value is not False:
            kind, has = model.contract.kind, ", ".join(known)
            problem = f"model {model.name!r} is {kind} and has no {name}; of its own it has: {has}"
            raise _invalid([((name,), problem, value)])


def _prior(request: SampleRequest, model: Model, parameters: dict[str, Float32]) -> Prior:
    has = model.contract.priors
    if request.prior is None:
        return "standard" if parameters else has[0]
    if request.prior not in has:
        problem = f"model {model.name!r} has no such prior; it has: {', '.join(has)}"
        raise _invalid([(("prior",), problem, request.prior)])
    if parameters and request.prior == "mixture":
        problem = f"with {' and '.join(parameters)} given no component is drawn: leave out one or the other"
        raise _invalid([(("prior",), problem, request.prior)])
    return request.prior


@lru_cache(1024)
def _check_outputs(model: Model, outputs: tuple[Output, ...]) -> None:
    for index, output in enumerate(outputs):
        if output not in model.contract.traits.outputs:
            kind, has = model.contract.kind, ", ".join(model.contract.traits.outputs)
            problem = f"model {model.name!r} is {kind} and has no {output}; it has: {has}"
            raise _invalid([(("outputs", index), problem, output)])
    if len(set(outputs)) < len(outputs):
        raise _invalid([(("outputs",), "an output is named twice", outputs)])


def _parameter(name: str, values: list[Any], n: int, model: Model) -> Float32:
    shape = model.contract.latent_shape
    shapes = (shape, (n, *shape))
    depth = _depth(values)
    if depth not in (len(shape), len(shape) + 1):
        raise _wrong_shape(name, shapes, f"{depth} nested lists")
    if len(values) != shapes[depth - len(shape)][0]:
        raise _wrong_shape(name, shapes, f"a list of {len(values)}")
    try:
        checked = _nested(depth, LOG_VAR_MAX if name == "log_var" else FLOAT32_MAX).validate_python(values)
    except ValidationError as refusal:
        raise _invalid([((name, *location), message, value) for location, message, value in _faults(refusal)]) from None
    try:
        array = np.array(checked, np.float32)
    except ValueError:
        raise _wrong_shape(name, shapes, "lists of different lengths") from None
    if array.shape not in shapes:
        raise _wrong_shape(name, shapes, f"shape {list(array.shape)}")
    return array


def _depth(values: Any) -> int:
    depth = 0
    while isinstance(values, list):
        depth, values = depth + 1, values[0] if values else None
    return depth


@cache
def _nested(depth: int, at_most: float) -> TypeAdapter[Any]:
    """A validator of numbers in `depth` nested lists."""
    adapter: Any = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-FLOAT32_MAX, le=at_most)]
    for _ in range(depth):
        adapter = Annotated[list[adapter], Field(fail_fast=True)]
    return TypeAdapter(adapter)


def _wrong_shape(name: str, shapes: tuple[tuple[int, ...], ...], got: str) -> InvalidRequest:
    allowed = " or ".join(str(list(shape)) for shape in shapes)
    detail = f"{name} must have the shape {allowed}, got {got}"
    return InvalidRequest(detail, errors=[{"pointer": f"/{name}", "detail": detail}])


def _faults(refusal: ValidationError) -> list[Fault]:
    """Of a list and an element of it, the fault of the element; and what Python calls a tuple is a list in JSON."""
    errors = refusal.errors(include_url=False)
    above = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    return [(error["loc"], _as_json(error["msg"]), error["input"]) for error in errors if error["loc"] not in above]


def _as_json(message: str) -> str:
    return message.replace("tuple", "list").replace("Tuple", "List").replace(" after validation", "")


def _invalid(errors: list[Fault]) -> InvalidRequest:
    pointed = [
        {"pointer": "".join(f"/{_pointed(part)}" for part in location), "detail": f"{message}, got {_short(value)}"}
        for location, message, value in errors[:10]
    ]
    return InvalidRequest("; ".join(f"{error['pointer'][1:]}: {error['detail']}" for error in pointed), errors=pointed)


def _pointed(part: int | str) -> str:
    """A part of a JSON pointer (RFC 6901, 3)."""
    return clipped(str(part)).replace("~", "~0").replace("/", "~1")


def _short(value: Any) -> str:
    """The value as JSON, of which no more is written than a message repeats: it may hold a million others."""
    if isinstance(value, list | dict) and len(value) > SHORT:
        return f"{len(value)} elements"
    text = ""
    for part in _PIECEWISE.iterencode(value[:SHORT] if isinstance(value, str) else value):
        text += part[: SHORT + 1]
        if len(text) > SHORT:
            break
    return clipped(text)


_PIECEWISE = JSONEncoder()
