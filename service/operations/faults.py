"""Faults of request bodies: messages with the place, the value and the way out."""

from json import JSONEncoder
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from reparam.service.errors import SHORT, InvalidRequest, clipped

MAX_FAULTS = 10  # largest number of faults in a message
Fault = tuple[tuple[int | str, ...], str, Any]  # location, message, value

_PIECEWISE = JSONEncoder()


def explain(body: bytes, request: type[BaseModel]) -> InvalidRequest:
    """Make the problem of a body that is not a valid request.

    The body is parsed again here, without its unknown fields. Otherwise pydantic would list a fault for each unknown
    field, perhaps a million.

    body: the invalid body.
    request: model of the body.

    Returns: the problem, with `errors` by field unless the body is no JSON object.
    """
    try:
        fields = from_json(body)
    except ValueError as error:
        return InvalidRequest(f"the body cannot be read as JSON in UTF-8: {error}")
    if not isinstance(fields, dict):
        return InvalidRequest(f"the body must be a JSON object, got {_short(fields)}")
    known = {name: fields[name] for name in request.model_fields if name in fields}
    message = f"unknown field; the fields are {', '.join(request.model_fields)}"
    faults: list[Fault] = [((name,), message, value) for name, value in fields.items() if name not in known]
    try:
        request.model_validate(known)
    except ValidationError as refusal:
        faults = [*faults_of(refusal), *faults]
    return invalid(faults)


def faults_of(refusal: ValidationError) -> list[Fault]:
    """List the faults in pydantic's error. If a list and an element both have faults, list only the element's fault."""
    errors = refusal.errors(include_url=False)
    above = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    return [(error["loc"], _as_json(error["msg"]), error["input"]) for error in errors if error["loc"] not in above]


def invalid(faults: list[Fault]) -> InvalidRequest:
    """Make the problem document for these faults. The member `errors` lists at most MAX_FAULTS of the faults."""
    pointed = [
        {"pointer": "".join(f"/{_pointed(part)}" for part in location), "detail": f"{message}, got {_short(value)}"}
        for location, message, value in faults[:MAX_FAULTS]
    ]
    return InvalidRequest("; ".join(f"{fault['pointer'][1:]}: {fault['detail']}" for fault in pointed), errors=pointed)


def wrong_shape(name: str, shapes: tuple[tuple[int, ...], ...], got: str) -> InvalidRequest:
    """Make the problem of an array with a wrong shape.

    name: name of the field.
    shapes: shapes allowed.
    got: shape of the array, in words.
    """
    allowed = " or ".join(str(list(shape)) for shape in shapes)
    detail = f"{name} must have the shape {allowed}, got {got}"
    return InvalidRequest(detail, errors=[{"pointer": f"/{name}", "detail": detail}])


def _as_json(message: str) -> str:
    """Say list, JSON's word, where pydantic says tuple."""
    return message.replace("tuple", "list").replace("Tuple", "List").replace(" after validation", "")


def _pointed(part: int | str) -> str:
    """Escape one part of a JSON pointer (RFC 6901, section 3)."""
    return clipped(str(part)).replace("~", "~0").replace("/", "~1")


def _short(value: Any) -> str:
    """Write the beginning of the value as JSON. The value may hold a million elements, so encoding stops early."""
    if isinstance(value, list | dict) and len(value) > SHORT:
        return f"{len(value)} elements"
    text = ""
    for part in _PIECEWISE.iterencode(value[:SHORT] if isinstance(value, str) else value):
        text += part[: SHORT + 1]
        if len(text) > SHORT:
            break
    return clipped(text)
