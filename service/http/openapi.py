"""The OpenAPI description. Operations are described from models and tables, other routes by arguments of FastAPI's
decorators.
"""

from collections.abc import Sequence
from typing import Any, Literal

from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from reparam.service.errors import MEDIA_TYPE, PROBLEMS
from reparam.service.http.encoders import JSON, NPY, NPZ, PNG
from reparam.service.http.middleware import OPEN_PATHS
from reparam.service.operations.operation import FACTS, Operation

Arguments = dict[str, Any]


class ModelDescription(BaseModel):
    """One version of a model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    version: int
    versions: list[int]
    kind: str
    latent_shape: list[int]
    image_shape: list[int]
    default_temperature: float
    precision: str
    """Precision of the decoder; latents are always float32."""
    noise_version: int
    parameters: list[str]
    priors: list[str]
    """Distributions of rows without parameters; the first is the default."""
    outputs: list[str]
    trained_on: dict[str, Any]
    evaluation: dict[str, Any]
    provider: str
    bytes: int


class ModelList(BaseModel):
    """The models served, and the name of the default model."""

    default: str | None
    models: list[ModelDescription]


class Liveness(BaseModel):
    """The state of the service for supervisors."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    status: Literal["alive", "failed"]
    failure: str | None = None
    """The reason for a restart; null if all is well."""


class Readiness(BaseModel):
    """The state of the service for load balancers."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    status: str
    """`ready`, or the reason why the service cannot answer."""
    models: dict[str, list[int]]
    """Versions of each model served, by name."""
    refused: dict[str, str]
    """The fault of each refused file or setting."""


class ProblemDocument(BaseModel):
    """A problem (RFC 9457); `type` is a path of this server that explains the problem."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str


def _problems(*statuses: int) -> dict[int | str, Arguments]:
    content = {MEDIA_TYPE: {"schema": _ref(ProblemDocument)}}
    described: dict[int | str, Arguments] = {
        status: {
            "description": " ".join(problem.meaning for problem in PROBLEMS.values() if problem.status == status),
            "headers": _headers(REQUEST_ID, *([RETRY_AFTER] if status in (429, 503) else [])),
            "content": content,
        }
        for status in statuses
    }
    # With a `default` response, FastAPI does not add its own 422 response.
    return {**described, "default": {"description": "Another problem.", "content": content}}


def _ref(model: type[BaseModel]) -> Arguments:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _components(*models: type[BaseModel]) -> Arguments:
    """Make the schemas of models that FastAPI does not see.

    Returns: JSON schemas by name of the model.
    """
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    return dict(schemas["$defs"])


Header = tuple[str, str, str]  # name, type, meaning

REQUEST_ID = ("X-Request-ID", "string", "The request's own, or a fresh one; the log has it.")
RETRY_AFTER = ("Retry-After", "integer", "Seconds to wait before another try.")
SERVER_TIMING = ("Server-Timing", "string", "Milliseconds in queue, infer and encode.")
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _headers(*headers: Header) -> Arguments:
    return {name: {"schema": {"type": type_}, "description": meaning} for name, type_, meaning in headers}


_BINARY = {"schema": {"type": "string", "format": "binary"}}

_REQUEST_HEADERS: list[Arguments] = [
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
        "description": "Comes back with the response and stands in the log; one that does not fit is replaced.",
    },
]


def add_operations(schema: Arguments, operations: Sequence[Operation], with_key: bool) -> None:
    """Add the operations to the application's OpenAPI schema.

    schema: the schema made by FastAPI; changed in place.
    operations: the operations to describe.
    with_key: the service requires an API key.
    """
    schema["paths"] |= {operation.path: {"post": _described(operation)} for operation in operations}
    models = [model for operation in operations for model in (operation.request, operation.response)]
    schema["components"]["schemas"] |= _components(*models, ProblemDocument)
    if with_key:
        schema["components"] |= {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        for path, methods in schema["paths"].items():
            if not path.startswith(OPEN_PATHS):
                methods |= {method: {**described, "security": [{"key": []}]} for method, described in methods.items()}


def _described(operation: Operation) -> Arguments:
    facts = [FACTS[name] for name in operation.facts]
    headers = [(fact.header, _JSON_TYPES[fact.type], fact.meaning) for fact in facts if fact.header is not None]
    return {
        "operationId": operation.name,
        "summary": operation.summary,
        "description": operation.description,
        "tags": ["sampling"],
        "parameters": _REQUEST_HEADERS,
        "requestBody": {"content": {JSON: {"schema": _ref(operation.request)}}},
        "responses": {
            "200": {
                "description": "The rows",
                "headers": _headers(REQUEST_ID, *headers, SERVER_TIMING),
                "content": {
                    JSON: {"schema": _ref(operation.response)},
                    PNG: _BINARY,
                    NPY: _BINARY,
                    NPZ: _BINARY,
                },
            },
            **{
                str(status): problem
                for status, problem in _problems(401, 404, 406, 413, 415, 422, 429, 500, 503, 504).items()
            },
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
