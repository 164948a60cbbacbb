"""Errors of a call.

ReparamError
    ConnectionFailed        no response, or an incomplete response
    TimedOut                no response in time
    StatusError             an error response; one subclass for each status of the service
"""

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from reparam._http import httpx


class ReparamError(Exception):
    """Any failure of a call. Impossible arguments raise ValueError or TypeError instead, before a request is sent."""


class ConnectionFailed(ReparamError):
    """No response, or the connection broke before the response was complete."""


class TimedOut(ReparamError):
    """No response within the client's `timeout`."""


class StatusError(ReparamError):
    """An error response of the service, or of a proxy in front of the service.

    status: the HTTP status.
    type, title, detail: members of the problem document (RFC 9457).
    problem: the whole problem document, with members such as `available` or `limit`.
    request_id: id of the request in the log of the service; None if the response has no id.
    retry_after: seconds to wait before the next attempt; None without the header Retry-After.
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
    """400: the service received no valid HTTP request, or headers that were too long or too slow."""


class Unauthorized(StatusError):
    """401: the API key is missing or wrong."""


class NotFound(StatusError):
    """404: no such model, version or path. `problem["available"]` lists the models or versions."""


class MethodNotAllowed(StatusError):
    """405: base_url leads to another server, or to a wrong path of the service."""


class NotAcceptable(StatusError):
    """406: the service cannot send the outputs in the requested format."""


class TooLarge(StatusError):
    """413: more rows or bytes than the service allows. `problem["limit"]` and `problem["got"]` say how many."""


class UnsupportedMediaType(StatusError):
    """415: the body was not declared as JSON."""


class Invalid(StatusError):
    """422: a field has a wrong value or shape, or the parameters overflow. `problem["errors"]` lists the fields."""


class Overloaded(StatusError):
    """429: the queue of the service is full, in rows or in bytes, and retries did not help."""


class ServerError(StatusError):
    """500: the service failed. The service's log has the cause under the request id."""


class Unavailable(StatusError):
    """503: the service is starting, draining, without a model or without memory, and retries did not help."""


class DeadlineExceeded(StatusError):
    """504: the request's deadline passed in the service. `problem["stage"]` names the stage."""


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

for _error in (ReparamError, ConnectionFailed, TimedOut, StatusError, *CLASSES.values()):
    _error.__module__ = "reparam"  # tracebacks show the name to catch: reparam.NotFound

LONGEST = 1e8  # seconds, three years: the longest wait, because sockets and time.sleep refuse much longer waits

# A proxy without a service behind responds 502. 504 is missing, because the same request would take too long again.
RETRIED = {429, 502, 503}


def worth_retrying(error: ReparamError) -> bool:
    """Return True if the same request may succeed later: for no or an incomplete response, and a status in RETRIED."""
    return error.status in RETRIED if isinstance(error, StatusError) else True


def no_response(cause: httpx.RequestError, timeout: float | None) -> ConnectionFailed | TimedOut:
    """Make the error for a request without a response.

    cause: error of the HTTP library.
    timeout: timeout of the call in seconds, for the message.
    """
    error: ConnectionFailed | TimedOut
    if isinstance(cause, httpx.TimeoutException):
        error = timed_out(cause.request, timeout)
    else:
        why = str(cause) or type(cause).__name__
        error = ConnectionFailed(f"no response from {_shown(cause.request)}: {why}; is the service running there?")
    error.__cause__ = cause
    return error


def timed_out(request: httpx.Request, timeout: float | None) -> TimedOut:
    """Make the error for a call that exceeds `timeout` seconds."""
    within = "in time" if timeout is None else f"in {timeout:g} s"
    return TimedOut(f"no response from {_shown(request)} {within}; give a longer timeout or ask for fewer rows")


def status_error(response: httpx.Response, body: bytes | bytearray) -> StatusError:
    """Make the error for a response whose status is not 2xx.

    body: the whole body of the response.

    Returns: an error of the class for the status.
    """
    problem = _problem(response, body)
    request_id = response.headers.get("X-Request-ID") or str(problem.get("instance", "")).removeprefix("urn:request:")
    cls = CLASSES.get(response.status_code, StatusError)
    return cls(response.status_code, problem, request_id or None, _retry_after(response.headers.get("Retry-After")))


def unexpected_response(response: httpx.Response, problem: str) -> StatusError:
    """Make the error for a response with status 2xx and unusable content.

    problem: the fault of the response, as the end of a sentence whose subject is the address.
    """
    detail = f"{_shown(response.request)} {problem}; is base_url that of a Reparam service?"
    return StatusError(
        response.status_code,
        {"type": "about:blank", "title": "Unexpected response", "status": response.status_code, "detail": detail},
        response.headers.get("X-Request-ID"),
    )


def _problem(response: httpx.Response, body: bytes | bytearray) -> dict[str, Any]:
    """Return the problem document of a response.

    A response without a document, as from a proxy, gets a new document with `type`, `title`, `status` and `detail`.
    """
    media_type = media_type_of(response)
    if media_type == "application/problem+json":
        try:
            return dict(json.loads(body))
        except (RecursionError, TypeError, ValueError):
            pass
    if "Location" in response.headers:
        detail = f"redirects to {response.headers['Location']}; use that as base_url"
    else:
        detail = f"answered with {media_type} and no problem document, so it was likely a proxy and not the service"
    return {
        "type": "about:blank",
        "title": response.reason_phrase,
        "status": response.status_code,
        "detail": f"{_shown(response.request)} {detail}",
    }


def media_type_of(response: httpx.Response) -> str:
    """Return the media type of a response, without parameters."""
    return str(response.headers.get("Content-Type", "no content type")).partition(";")[0]


def _shown(request: httpx.Request) -> httpx.URL:
    """Return the address without user name and password, for messages and logs."""
    return request.url.copy_with(userinfo=b"")


def _retry_after(value: str | None) -> float | None:
    """Parse the header Retry-After, seconds or a date (RFC 9110, section 10.2.3).

    Returns: seconds to wait; None for a missing or malformed header.
    """
    if value is None:
        return None
    if value.isdecimal():
        return min(float(value), LONGEST)
    try:
        return min(max(0.0, parsedate_to_datetime(value).timestamp() - time.time()), LONGEST)
    except (ValueError, OverflowError):
        return None
