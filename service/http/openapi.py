"""What /docs and /openapi.json say of each route: of `/sample` the OpenAPI operation itself, for it reads and writes
raw bytes, with the schema of the model that validates it; of the others arguments of FastAPI's decorators."""

from typing import Any, Literal

from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from reparam.service.errors import MEDIA_TYPE, PROBLEMS
from reparam.service.http.encoders import JSON, NPY, NPZ, PNG
from reparam.service.operations.sample import SampleRequest

Arguments = dict[str, Any]


class SampleAnswer(BaseModel):
    """The JSON answer. seed, start and n with the same parameters return the same rows again."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    version: int
    seed: int
    start: int
    n: int
    temperature: float
    hard: bool
    prior: str
    noise_version: int
    images: list[str] | None = None
    """One base64 PNG a row."""
    latents: list[Any] | None = None
    """(n, *latent_shape)"""
    codes: list[list[list[float]]] | None = None
    """(n, D, K), one-hot or relaxed."""
    indices: list[list[int]] | None = None
    """(n, D), the category of each variable."""


class ModelDescription(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    version: int
    versions: list[int]
    kind: str
    latent_shape: list[int]
    image_shape: list[int]
    default_temperature: float
    precision: str
    """That the decoder computes in; latents are always float32."""
    noise_version: int
    parameters: list[str]
    priors: list[str]
    """What rows without parameters can be drawn from; the first is the default."""
    outputs: list[str]
    trained_on: dict[str, Any]
    evaluation: dict[str, Any]
    provider: str
    bytes: int


class ModelList(BaseModel):
    default: str | None
    models: list[ModelDescription]


class Liveness(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    status: Literal["alive", "failed"]
    failure: str | None = None
    """What has ended that should not."""


class Readiness(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    status: str
    """`ready`, or why it cannot answer."""
    models: dict[str, list[int]]
    """The versions of each model that is served."""
    refused: dict[str, str]
    """What is not served, each with its fault."""


class ProblemDocument(BaseModel):
    """RFC 9457; `type` is a path of this server that explains it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str


def _problems(*statuses: int) -> dict[int | str, Arguments]:
    content = {MEDIA_TYPE: {"schema": _ref(ProblemDocument)}}
    said: dict[int | str, Arguments] = {
        status: {
            "description": " ".join(problem.meaning for problem in PROBLEMS.values() if problem.status == status),
            "headers": _headers(REQUEST_ID, *([RETRY_AFTER] if status in (429, 503) else [])),
            "content": content,
        }
        for status in statuses
    }
    # With a default, FastAPI does not add a 422 of its own.
    return {**said, "default": {"description": "Another problem.", "content": content}}


def _ref(model: type[BaseModel]) -> Arguments:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _components(*models: type[BaseModel]) -> Arguments:
    """The schemas of models that FastAPI does not see."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    return dict(schemas["$defs"])


Header = tuple[str, str, str]  # name, type, meaning

REQUEST_ID = ("X-Request-ID", "string", "The request's own, or a fresh one; the log has it.")
RETRY_AFTER = ("Retry-After", "integer", "Seconds to wait before another try.")
ROWS = [
    ("Model-Name", "string", "The model that answered."),
    ("Model-Version", "integer", "Its version."),
    ("Sample-Seed", "integer", "The seed, given or fresh."),
    ("Sample-Start", "integer", "The first row."),
    ("Noise-Version", "integer", "Of the way from seed and row to noise."),
    ("Server-Timing", "string", "Milliseconds in queue, infer and encode."),
]


def _headers(*headers: Header) -> Arguments:
    return {name: {"schema": {"type": type_}, "description": meaning} for name, type_, meaning in headers}


_BINARY = {"schema": {"type": "string", "format": "binary"}}

SAMPLE: Arguments = {
    "operationId": "sample",
    "summary": "Sample a model",
    "description": "Draw rows start .. start + n - 1 of a seed and decode them. The media type of the answer follows "
    "`Accept`; the same request with the same seed gets the same rows, however it is batched.",
    "tags": ["sampling"],
    "parameters": [
        {
            "name": "Request-Timeout",
            "in": "header",
            "schema": {"type": "number", "exclusiveMinimum": 0},
            "description": "Seconds that the request may take, or a stream until its first rows.",
        },
        {
            "name": "X-Request-ID",
            "in": "header",
            "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
            "description": "Comes back with the answer and stands in the log; one that does not fit is replaced.",
        },
    ],
    "requestBody": {"content": {JSON: {"schema": _ref(SampleRequest)}}},
    "responses": {
        "200": {
            "description": "The rows",
            "headers": _headers(REQUEST_ID, *ROWS),
            "content": {
                JSON: {"schema": _ref(SampleAnswer)},
                PNG: _BINARY,
                NPY: _BINARY,
                NPZ: _BINARY,
            },
        },
        **{str(status): said for status, said in _problems(401, 404, 406, 413, 415, 422, 429, 500, 503, 504).items()},
    },
}
MODELS: Arguments = {
    "summary": "The models served",
    "tags": ["models"],
    "responses": {200: {"model": ModelList}, **_problems(401, 503)},
}
MODEL: Arguments = {
    "summary": "The latest version of a model",
    "tags": ["models"],
    "responses": {200: {"model": ModelDescription}, **_problems(401, 404, 503)},
}
MODEL_VERSION: Arguments = {**MODEL, "summary": "One version of a model"}
LIVEZ: Arguments = {
    "summary": "Is every process of the service alive?",
    "tags": ["health"],
    "responses": {
        200: {"model": Liveness},
        503: {"model": Liveness, "description": "Something inside has ended that should not; restart it"},
    },
}
READYZ: Arguments = {
    "summary": "Can it answer? Lists the models served, and the files refused with their faults",
    "tags": ["health"],
    "responses": {
        200: {"model": Readiness},
        503: {"model": Readiness, "description": "Starting, draining, failed, or without a model"},
    },
}
METRICS: Arguments = {
    "summary": "Prometheus metrics",
    "tags": ["health"],
    "response_class": PlainTextResponse,
    "responses": _problems(503),
}
PROBLEM: Arguments = {
    "summary": "What a problem type means",
    "tags": ["problems"],
    "response_class": PlainTextResponse,
    "responses": _problems(404),
}
SCHEMAS: Arguments = _components(SampleRequest, SampleAnswer, ProblemDocument)
KEY: Arguments = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
WITH_KEY: Arguments = {"security": [{"key": []}]}
