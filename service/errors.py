"""Problems: errors of requests. Each problem type (RFC 9457) is one class, documented by its `meaning`."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

MEDIA_TYPE = "application/problem+json"
SHORT = 80  # largest number of characters of a client's value in a message


def clipped(text: str) -> str:
    """Cut text from a client to SHORT characters, for a message."""
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


class Problem(Exception):
    """An error that becomes a problem document (RFC 9457) as the response.

    slug: name of the problem type; `type` is /problems/<slug>.
    status: HTTP status of the response.
    meaning: one sentence, for OpenAPI and /problems.
    detail: message with the offending value and the way out.
    headers: headers of the response. The member `retry_after`, in seconds, also becomes the header Retry-After.
    members: further members of the document.
    """

    slug: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    meaning: ClassVar[str] = "The service failed; the log has the cause under the request id."

    def __init__(self, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members
        self.headers = dict(headers or {})
        if "retry_after" in members:
            self.headers["Retry-After"] = str(members["retry_after"])

    def document(self, request_id: str) -> dict[str, Any]:
        """Make the problem document for the request with this id.

        Returns: `type`, `title`, `status`, `detail`, `instance`, and the members of this problem.
        """
        return {
            "type": f"/problems/{self.slug}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "instance": f"urn:request:{request_id}",
            **self.members,
        }


class InvalidRequest(Problem):
    slug = "invalid-request"
    status = 422
    meaning = (
        "The body is not JSON in UTF-8, a field has a wrong name, type, value or shape (`errors` points at each), "
        "or the header `Request-Timeout` is wrong."
    )


class NonFiniteSample(Problem):
    slug = "non-finite-sample"
    status = 422
    meaning = (
        "The parameters given overflow float32, or the float16 of a decoder: the sample would hold NaN or infinity."
    )


class MalformedRequest(Problem):
    slug = "malformed-request"
    status = 400
    meaning = (
        "What came is no HTTP request, its head is too long or too slow, or a trailer or a chunk's size is too long; "
        "the connection is closed."
    )


class Unauthorized(Problem):
    slug = "unauthorized"
    status = 401
    meaning = "The service asks for its API key: `Authorization: Bearer <key>`."


class UnknownModel(Problem):
    slug = "unknown-model"
    status = 404
    meaning = "No such model or version; `available` lists those served."


class UnknownPath(Problem):
    slug = "unknown-path"
    status = 404
    meaning = "Nothing lies at this path."


class MethodNotAllowed(Problem):
    slug = "method-not-allowed"
    status = 405
    meaning = "The path does not answer this method; `Allow` lists those it answers."


class NotAcceptable(Problem):
    slug = "not-acceptable"
    status = 406
    meaning = "None of the media types in `Accept` can be sent; `available` lists those that can."


class TooLarge(Problem):
    slug = "too-large"
    status = 413
    meaning = "The body or the response would exceed a limit; `limit` and `got` say by how much."


class UnsupportedMediaType(Problem):
    slug = "unsupported-media-type"
    status = 415
    meaning = "The body is not declared as `application/json`, or is compressed."


class QueueFull(Problem):
    slug = "queue-full"
    status = 429
    meaning = "Too many rows wait, or too many bytes are held; try again after `Retry-After` seconds."


class ModelFailed(Problem):
    slug = "model-failed"
    status = 500
    meaning = (
        "The model failed on these rows, or they are NaN or infinity also without parameters; the log has it under "
        "seed and rows."
    )


class Unavailable(Problem):
    slug = "unavailable"
    status = 503
    meaning = (
        "The service is starting, draining, or has no model or memory to serve; try again after `Retry-After` seconds."
    )


class DeadlineExceeded(Problem):
    slug = "deadline-exceeded"
    status = 504
    meaning = "The deadline passed before the rows were ready; `stage` says where."


class ClientLeft(Exception):
    """The client has disconnected, so the request needs no response."""


def cut_off() -> Unavailable:
    """Make the problem of a request that is unanswered at the end of the shutdown."""
    return Unavailable("the service ends before the response is there: ask another replica, or again", retry_after=1)


_ALL: list[type[Problem]] = [Problem, *Problem.__subclasses__()]
PROBLEMS = {problem.slug: problem for problem in _ALL}
