"""What a call can raise: there was no answer, or the answer was an error.

ReparamError
    ConnectionFailed        no answer, or only a part of one
    TimedOut                no answer in time
    StatusError             an answer; one subclass for each status that the service uses
"""

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx


class ReparamError(Exception):
    """Any failure of a call. A wrong argument that shows before anything is sent is a ValueError or a TypeError
    instead."""


class ConnectionFailed(ReparamError):
    """Nothing answered, or the connection broke before the answer was whole."""


class TimedOut(ReparamError):
    """No answer within the client's `timeout`."""


class StatusError(ReparamError):
    """The service, or a proxy in front of it, answered with an error.

    status: the HTTP status. type, title, detail: of the problem document (RFC 9457). request_id: under which the
    service's log has the request. problem: the whole document, with members such as `available` or `limit`.
    retry_after: seconds to wait before another try, where the answer says so.
    """

    def __init__(
        self,
        status: int,
        problem: Mapping[str, Any],
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, problem, request_id, retry_after)
        self.status = status
        self.problem = dict(problem)
        self.type = str(problem.get("type", "about:blank"))
        self.title = str(problem.get("title", ""))
        self.detail = str(problem.get("detail", ""))
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        request = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.status} {self.title}: {self.detail}{request}"


class BadRequest(StatusError):
    """400: what arrived was no HTTP request, or its head was too long or too slow."""


class Unauthorized(StatusError):
    """401: the API key is missing or wrong."""


class NotFound(StatusError):
    """404: no such model, version or path; problem["available"] lists the models or versions."""


class MethodNotAllowed(StatusError):
    """405: base_url leads to something that is not the service, or to a wrong path of it."""


class NotAcceptable(StatusError):
    """406: the service cannot answer in this format."""


class TooLarge(StatusError):
    """413: more rows or bytes than the service allows; problem["limit"] and problem["got"] say how many."""


class UnsupportedMediaType(StatusError):
    """415: the body was not declared as JSON."""


class Invalid(StatusError):
    """422: a field has a wrong value or shape, problem["errors"] points at each; or the parameters overflow."""


class Overloaded(StatusError):
    """429: too many rows wait already, or too many bytes are held, and retrying did not help."""


class ServerError(StatusError):
    """500: the service failed; its log has the cause under the request id."""


class Unavailable(StatusError):
    """503: the service is starting or draining, and retrying did not help."""


class DeadlineExceeded(StatusError):
    """504: the time ran out on the server; problem["stage"] says where."""


CLASSES: dict[int, type[StatusError]] = {
    400: BadRequest,
    401: Unauthorized,
    404: NotFound,
    405: MethodNotAllowed,
    406: NotAcceptable,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: Invalid,
    429: Overloaded,
    500: ServerError,
    503: Unavailable,
    504: DeadlineExceeded,
}

LONGEST = 1e8  # seconds, three years, that anything is waited for; no socket or sleep takes much more

# 502 is a proxy that found no service behind it. 504 is not here: what took too long once would do so again.
RETRIED = {429, 502, 503}


def worth_retrying(error: ReparamError) -> bool:
    return error.status in RETRIED if isinstance(error, StatusError) else True


def no_answer(cause: httpx.RequestError, timeout: float | None) -> ConnectionFailed | TimedOut:
    """The error to raise where httpx had none to return an answer from."""
    error: ConnectionFailed | TimedOut
    if isinstance(cause, httpx.TimeoutException):
        error = timed_out(cause.request, timeout)
    else:
        why = str(cause) or type(cause).__name__
        error = ConnectionFailed(f"no answer from {_shown(cause.request)}: {why}; is the service running there?")
    error.__cause__ = cause
    return error


def timed_out(request: httpx.Request, timeout: float | None) -> TimedOut:
    within = "in time" if timeout is None else f"in {timeout:g} s"
    return TimedOut(f"no answer from {_shown(request)} {within}; give a longer timeout or ask for fewer rows")


def status_error(response: httpx.Response, body: bytes | bytearray) -> StatusError:
    """The error that an answer other than 2xx stands for."""
    problem = _problem(response, body)
    request_id = response.headers.get("X-Request-ID") or str(problem.get("instance", "")).removeprefix("urn:request:")
    cls = CLASSES.get(response.status_code, StatusError)
    return cls(response.status_code, problem, request_id or None, _retry_after(response.headers.get("Retry-After")))


def unexpected_answer(response: httpx.Response, what: str) -> StatusError:
    """The error for an answer that is no error and yet cannot be used."""
    detail = f"{_shown(response.request)} {what}; is base_url that of a Reparam service?"
    return StatusError(
        response.status_code,
        {"type": "about:blank", "title": "Unexpected answer", "status": response.status_code, "detail": detail},
        response.headers.get("X-Request-ID"),
    )


def _problem(response: httpx.Response, body: bytes | bytearray) -> dict[str, Any]:
    """The problem document of an answer, or one made up for a proxy that sent something else."""
    media_type = media_type_of(response)
    if media_type == "application/problem+json":
        try:
            return dict(json.loads(body))
        except (RecursionError, TypeError, ValueError):
            pass
    if "Location" in response.headers:
        said = f"redirects to {response.headers['Location']}; use that as base_url"
    else:
        said = f"answered with {media_type} and no problem document, so it was likely a proxy and not the service"
    return {
        "type": "about:blank",
        "title": response.reason_phrase,
        "status": response.status_code,
        "detail": f"{_shown(response.request)} {said}",
    }


def media_type_of(response: httpx.Response) -> str:
    return str(response.headers.get("Content-Type", "no content type")).partition(";")[0]


def _shown(request: httpx.Request) -> httpx.URL:
    """The address without user name and password, fit for a log."""
    return request.url.copy_with(userinfo=b"")


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of Retry-After: seconds or a date."""
    if value is None:
        return None
    if value.isdecimal():
        return min(float(value), LONGEST)
    try:
        return min(max(0.0, parsedate_to_datetime(value).timestamp() - time.time()), LONGEST)
    except (ValueError, OverflowError):
        return None
