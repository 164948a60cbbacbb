"""The body of `POST /sample`: what may be said, checked once at the door."""

import json
import secrets
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from service.errors import InvalidRequest, TooLarge
from service.repository import Model, Repository
from service.rows import Float32, Rows

SEEDS = 2**64
FLOAT32_MAX = float(np.finfo(np.float32).max)
SHORT = 80  # characters of a value that a message repeats
LOG_VAR_MAX = 60.0  # a standard deviation of 1e13

Output = Literal["images", "latents", "codes", "indices"]
Count = Annotated[int, Field(strict=True, lt=SEEDS)]
Fault = tuple[tuple[int | str, ...], str, Any]  # where, what, and the value there


class SampleRequest(BaseModel):
    """What to sample. A request without parameters samples the model's prior."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    model: Annotated[str, Field(strict=True)] | None = None
    """Name of the model; default: the server's default model, else its first by name."""
    version: Count | None = None
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
    """Gaussian: means, of the latent shape for every row or (n, *latent_shape). Default: the prior's."""
    log_var: list[Any] | None = None
    """Gaussian: log variances, shaped like mu, at most 60. Default: the prior's."""
    logits: list[Any] | None = None
    """Gumbel: unnormalized log probabilities (D, K) for every row or (n, D, K). Default: the prior's."""
    outputs: Annotated[list[Output], Field(min_length=1, max_length=4, fail_fast=True)] = ["images"]
    """What to return: images; latents (Gaussian); codes and indices (Gumbel)."""


def parse(body: bytes) -> SampleRequest:
    """Raises InvalidRequest. An empty body asks for one row of the default model."""
    try:
        fields = from_json(body or b"{}")
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {_short(fields)}")
    known = {name: fields[name] for name in SampleRequest.model_fields if name in fields}
    message = f"unknown field; the fields are {', '.join(SampleRequest.model_fields)}"
    unknown: list[Fault] = [((name,), message, value) for name, value in fields.items() if name not in known]
    try:
        request = SampleRequest.model_validate(known)
    except ValidationError as refusal:
        raise _invalid([*_faults(refusal), *unknown]) from None
    if unknown:
        raise _invalid(unknown)
    return request


def resolve(request: SampleRequest, repository: Repository, max_rows: int) -> Rows:
    """The rows a request asks for. Raises UnknownModel, InvalidRequest, TooLarge."""
    model = repository.find(request.model, request.version)
    _check_kind(request, model)
    if request.n > max_rows:
        raise TooLarge(f"n is {request.n}, the limit is {max_rows} rows", limit=max_rows, got=request.n)
    if request.start + request.n > SEEDS:
        raise _invalid([(("start",), f"start + n must be at most 2**64 = {SEEDS}", request.start)])
    given = {name: _parameter(request, model, name) for name in model.contract.traits.parameters}
    temperature = model.contract.default_temperature if request.temperature is None else request.temperature
    return Rows(
        model=model,
        # Below 2**53, so that any reader of JSON can hand it back.
        seed=secrets.randbelow(2**53) if request.seed is None else request.seed,
        start=request.start,
        n=request.n,
        parameters={name: model.prior[name] if array is None else array for name, array in given.items()},
        temperature=temperature,
        hard=request.hard,
        given=request.temperature is not None or any(array is not None for array in given.values()),
    )


def _check_kind(request: SampleRequest, model: Model) -> None:
    """Refuse what only the other kind of model has."""
    contract = model.contract
    known = {"hard"} if contract.kind == "gumbel" else set()
    known |= set(contract.traits.parameters)
    for name in ("hard", "mu", "log_var", "logits"):
        if name not in known and getattr(request, name) not in (None, False):
            problem = f"model {model.name!r} is {contract.kind} and has no {name}; it has: {', '.join(sorted(known))}"
            raise _invalid([((name,), problem, getattr(request, name))])
    for index, output in enumerate(request.outputs):
        if output not in model.outputs:
            problem = f"model {model.name!r} is {contract.kind} and has no {output}; it has: {', '.join(model.outputs)}"
            raise _invalid([(("outputs", index), problem, output)])
    if len(set(request.outputs)) < len(request.outputs):
        raise _invalid([(("outputs",), "an output is named twice", request.outputs)])


def _parameter(request: SampleRequest, model: Model, name: str) -> Float32 | None:
    values: list[Any] | None = getattr(request, name)
    if values is None:
        return None
    shape = model.contract.latent_shape
    shapes = (shape, (request.n, *shape))
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
    return [(error["loc"], error["msg"], error["input"]) for error in refusal.errors(include_url=False)]


def _invalid(errors: list[Fault]) -> InvalidRequest:
    pointed = [
        {"pointer": "".join(f"/{part}" for part in location), "detail": f"{message}, got {_short(value)}"}
        for location, message, value in errors[:10]
    ]
    return InvalidRequest("; ".join(f"{error['pointer'][1:]}: {error['detail']}" for error in pointed), errors=pointed)


def _short(value: Any) -> str:
    """The value as JSON, whatever its size at no cost."""
    if isinstance(value, list | dict) and len(value) > SHORT:
        return f"{len(value)} elements"
    text = json.dumps(value[:SHORT] if isinstance(value, str) else value)
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


def row_bytes(model: Model, outputs: Sequence[Output]) -> int:
    """What one row of a buffered answer counts for: its raw bytes, but at least 1 KiB, for encoding it costs time."""
    latent, image = prod(model.contract.latent_shape), prod(model.contract.image_shape)
    sizes = {"images": image, "latents": 4 * latent, "codes": 4 * latent, "indices": 4 * latent}
    return max(1024, sum(sizes[output] for output in outputs))
