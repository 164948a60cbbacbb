"""What /docs and /openapi.json say of each route: of `/sample` the OpenAPI operation itself, for it reads and writes
raw bytes, with the schema of the model that validates it; of the others arguments of FastAPI's decorators."""

from typing import Any

from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from service.errors import MEDIA_TYPE, PROBLEMS
from service.requests import SampleRequest
from service.responses import JSON, NPY, NPZ, PNG

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


class ProblemDocument(BaseModel):
    """RFC 9457; `type` is a path of this server that explains it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str


def _problems(*statuses: int) -> dict[int | str, Arguments]:
    content = {MEDIA_TYPE: {"schema": ProblemDocument.model_json_schema()}}
    said: dict[int | str, Arguments] = {
        status: {
            "description": " ".join(problem.meaning for problem in PROBLEMS.values() if problem.status == status),
            "content": content,
        }
        for status in statuses
    }
    # With a default, FastAPI does not add a 422 of its own.
    return {**said, "default": {"description": "Another problem.", "content": content}}


_BINARY = {"schema": {"type": "string", "format": "binary"}}

SAMPLE: Arguments = {
    "operationId": "sample",
    "summary": "Sample a model",
    "description": "Draw rows start .. start + n - 1 of a seed and decode them. The media type of the answer follows "
    "`Accept`; the same request with the same seed gets the same rows, however it is batched.",
    "tags": ["sampling"],
    "requestBody": {"content": {JSON: {"schema": SampleRequest.model_json_schema()}}},
    "responses": {
        "200": {
            "description": "The rows",
            "content": {
                JSON: {"schema": SampleAnswer.model_json_schema()},
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
    "summary": "One model",
    "tags": ["models"],
    "responses": {200: {"model": ModelDescription}, **_problems(401, 404, 503)},
}
LIVEZ: Arguments = {
    "summary": "Is every process of the service alive?",
    "tags": ["health"],
    "responses": {503: {"description": "Something inside has ended that should not; restart it"}},
}
READYZ: Arguments = {
    "summary": "Can it answer? Lists the models served, and the files refused with their faults",
    "tags": ["health"],
    "responses": {503: {"description": "Starting, draining, failed, or without a model"}},
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
KEY: Arguments = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
WITH_KEY: Arguments = {"security": [{"key": []}]}
