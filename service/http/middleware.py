"""The outermost ASGI layer: request ids, the API key, problem documents, the access log and request metrics."""

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reparam.service.errors import (
    MEDIA_TYPE,
    ClientLeft,
    MethodNotAllowed,
    Problem,
    Unauthorized,
    UnknownPath,
    clipped,
    cut_off,
)
from reparam.service.http.headers import HeaderMap, Headers, by_name
from reparam.service.telemetry.recorder import Recorder

log = logging.getLogger(__name__)

OPEN_PATHS = ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/problems")  # need no key
CLIENT_CLOSED = 499  # status of a request whose client disconnected; in the log and in metrics only
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestMiddleware:
    """ASGI middleware: turns every error into a problem document, and counts and logs every request once.

    app: the application to wrap.
    recorder: counts and logs requests.
    api_key: key required of clients; None for no key.
    """

    def __init__(self, app: ASGIApp, recorder: Recorder, api_key: str | None) -> None:
        self.app = app
        self._recorder = recorder
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = by_name(scope["headers"])
        request_id = client_request_id(headers) or next(self._recorder.request_ids)
        status = 0

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id))
            return send(message)

        self._recorder.begin()
        try:
            check_key(self._api_key, scope["path"], headers)
            await self.app(scope, receive, send_with_id)
        except ClientLeft:
            status = CLIENT_CLOSED
        except (Exception, asyncio.CancelledError) as caught:  # every error is answered with a problem document
            # At shutdown, uvicorn cancels requests that take too long.
            error = cut_off() if isinstance(caught, asyncio.CancelledError) else caught
            if status:  # the headers are sent, so only a broken connection can tell the client
                _log_broken_off(error, request_id)
            else:
                status, problem_headers, body = problem_response(error, request_id)
                await send_with_id({"type": "http.response.start", "status": status, "headers": problem_headers})
                await send({"type": "http.response.body", "body": body})
        finally:
            route = scope["route"].path if "route" in scope else "other"
            self._recorder.request(scope["method"], scope["path"], route, status, request_id, started)


def client_request_id(headers: HeaderMap) -> bytes | None:
    """Return the client's request id.

    Returns: None if the id is missing, longer than 128 bytes, or not printable ASCII without blanks.
    """
    request_id = headers.get(b"x-request-id")
    return request_id if request_id is not None and _REQUEST_ID.fullmatch(request_id) else None


def check_key(api_key: str | None, path: str, headers: HeaderMap) -> None:
    """Check the API key of a request. Paths that begin with an entry of OPEN_PATHS need no key.

    api_key: key required of clients; None for no key.

    Raises: Unauthorized for a missing or wrong key.
    """
    if api_key is None or path.startswith(OPEN_PATHS):
        return
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(key, api_key.encode()):
        raise Unauthorized(
            "this service asks for its key: send the header `Authorization: Bearer <key>`",
            headers={"WWW-Authenticate": "Bearer"},
        )


def problem_response(error: Exception, request_id: bytes) -> tuple[int, Headers, bytes]:
    """Make a problem document (RFC 9457), and log the traceback of an unexpected error.

    error: a Problem, or an unexpected error, which becomes the problem `internal`.

    Returns: status, headers and body of the response.
    """
    name = request_id.decode()
    if not isinstance(error, Problem):
        log.error("unexpected", exc_info=error, extra={"request_id": name})
        error = Problem(f"something failed inside the service; its log has the cause under request {name}")
    body = json.dumps(error.document(name)).encode()
    headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **error.headers}
    return (
        error.status,
        [(key.lower().encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()],
        body,
    )


async def refuse_by_router(request: Request, error: Exception) -> Response:
    """Raise the problem of a request that the router refuses; FastAPI's handler of HTTPException.

    Raises: MethodNotAllowed for another method of a known path; UnknownPath.
    """
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for this class
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        allow = ", ".join(sorted({method for route in here for method in route.methods}))
        raise MethodNotAllowed(
            f"{clipped(request.url.path)} answers {allow}, not {request.method}", headers={"Allow": allow}
        )
    raise UnknownPath(f"nothing lies at {clipped(request.url.path)!r}; /docs lists what does")


def _log_broken_off(error: Exception, request_id: bytes) -> None:
    fields = {"request_id": request_id.decode(), "fault": str(error)}
    if isinstance(error, Problem):
        log.warning("broken off", extra=fields)
    else:
        log.error("broken off", extra=fields, exc_info=error)
