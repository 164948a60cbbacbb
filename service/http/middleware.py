"""The outermost ASGI layer: request ids, the API key, problem documents, the access log and request metrics."""

import asyncio
import hmac
import itertools
import json
import logging
import re
import secrets
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
from reparam.service.telemetry.logs import AccessLog
from reparam.service.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

OPEN = ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/problems")  # no key needed
CLIENT_CLOSED = 499  # in log and metrics only: nobody is left to read it
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Edge:
    """Wraps an application, so that whatever it raises is answered, counted and logged once."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, access_log: AccessLog) -> None:
        self.app = app
        self.metrics = metrics
        self.api_key = api_key
        self.access_log = access_log
        self._first_digits = secrets.token_hex(10).encode()  # 20 of the 32 of a request's id; the others count
        self._count = itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = by_name(scope["headers"])
        request_id = self.request_id(given)
        status = 0

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id))
            return send(message)

        self.metrics.in_flight += 1
        try:
            self.authorize(scope["path"], given)
            await self.app(scope, receive, send_with_id)
        except ClientLeft:
            status = CLIENT_CLOSED
        except (Exception, asyncio.CancelledError) as caught:  # whatever it is, the client gets a problem document
            error = cut_off() if isinstance(caught, asyncio.CancelledError) else caught  # uvicorn cancels what is late
            if status:  # half an answer is out, and cutting it short is all that can be said
                about = {"request_id": request_id.decode(), "fault": str(error)}
                foreseen = isinstance(error, Problem)
                log.log(
                    logging.WARNING if foreseen else logging.ERROR, "broken off", extra=about, exc_info=not foreseen
                )
            else:
                code, headers, body = refusal(error, request_id)
                await send_with_id({"type": "http.response.start", "status": code, "headers": headers})
                await send({"type": "http.response.body", "body": body})
        finally:
            self.metrics.in_flight -= 1
            route = scope["route"].path if "route" in scope else "other"
            self.account(scope["method"], scope["path"], route, status, started, request_id)

    def account(self, method: str, path: str, route: str, status: int, started: float, request_id: bytes) -> None:
        """Count and log a request that has ended. started: on time.perf_counter."""
        seconds = time.perf_counter() - started
        self.metrics.answered(route, status, seconds)
        if self.access_log.enabled:
            self.access_log.write(method, path, status, request_id, seconds)

    def request_id(self, given: HeaderMap) -> bytes:
        """The client's, if it can stand in a header and a log line; else a fresh one."""
        request_id = given.get(b"x-request-id")
        if request_id is not None and _REQUEST_ID.fullmatch(request_id):
            return request_id
        return b"%b%012x" % (self._first_digits, next(self._count))

    def authorize(self, path: str, given: HeaderMap) -> None:
        """Raises Unauthorized."""
        if self.api_key is None or path.startswith(OPEN):
            return
        scheme, _, key = given.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self.api_key.encode()):
            raise Unauthorized(
                "this service asks for its key: send the header `Authorization: Bearer <key>`",
                headers={"WWW-Authenticate": "Bearer"},
            )


def refusal(error: Exception, request_id: bytes) -> tuple[int, Headers, bytes]:
    """Status, headers and body of the problem document. What nobody foresaw is logged, and no more is said of it."""
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


async def refused_by_router(request: Request, error: Exception) -> Response:
    """Exception handler for what the router itself refuses: says it as a problem."""
    assert isinstance(error, HTTPException)  # noqa: S101  # it is registered for this class
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        allow = ", ".join(sorted({method for route in here for method in route.methods}))
        raise MethodNotAllowed(
            f"{clipped(request.url.path)} answers {allow}, not {request.method}", headers={"Allow": allow}
        )
    raise UnknownPath(f"nothing lies at {clipped(request.url.path)!r}; /docs lists what does")
