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

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import MEDIA_TYPE, ClientLeft, MethodNotAllowed, Problem, Unauthorized, UnknownPath
from service.logs import AccessLog
from service.metrics import Metrics

log = logging.getLogger("service")

OPEN = ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/problems")  # no key needed
CLIENT_CLOSED = 499  # in log and metrics only: nobody is left to read it
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_PROCESS = secrets.token_hex(10).encode()  # of 32 digits of a request's id the first 20; the others count
_COUNT = itertools.count()


class Edge:
    """Wraps an application, so that whatever it raises is answered, counted and logged once."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, access_log: AccessLog) -> None:
        self.app = app
        self.metrics = metrics
        self.api_key = api_key
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        status = 0

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id))
            return send(message)

        self.metrics.in_flight += 1
        try:
            if self.api_key is not None:
                self._authorize(scope)
            await self.app(scope, receive, send_with_id)
        except (ClientLeft, asyncio.CancelledError):
            status = CLIENT_CLOSED
        except Exception as error:  # the last resort: whatever it is, the client gets a problem document
            if status:  # half an answer is out, and cutting it short is all that can be said
                log.exception("broken off", extra={"request_id": request_id.decode()})
            else:
                await _answer(_problem(error, request_id.decode()), request_id.decode(), send_with_id)
        finally:
            self.metrics.in_flight -= 1
            self._account(scope, status, time.perf_counter() - started, request_id)

    def _account(self, scope: Scope, status: int, seconds: float, request_id: bytes) -> None:
        path = scope["route"].path if "route" in scope else "other"
        self.metrics.answered(path, status, seconds)
        if self.access_log.enabled:
            self.access_log.write(scope["method"], scope["path"], status, request_id.decode(), seconds)

    def _authorize(self, scope: Scope) -> None:
        if scope["path"].startswith(OPEN):
            return
        given = Headers(scope=scope).get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise Unauthorized(
                "this service asks for its key: send the header `Authorization: Bearer <key>`",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _request_id(scope: Scope) -> bytes:
    """The client's, if it can stand in a header and a log line; else a fresh one."""
    given: bytes | None = dict(scope["headers"]).get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return b"%b%012x" % (_PROCESS, next(_COUNT))


def _problem(error: Exception, request_id: str) -> Problem:
    if isinstance(error, Problem):
        return error
    log.error("unexpected", exc_info=error, extra={"request_id": request_id})
    return Problem(f"something failed inside the service; its log has the cause under request {request_id}")


async def refused_by_router(request: Request, error: Exception) -> Response:
    """Exception handler for what the router itself refuses: says it as a problem."""
    assert isinstance(error, HTTPException)  # noqa: S101  # it is registered for this class
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = (error.headers or {}).get("Allow", "")
        raise MethodNotAllowed(f"{request.url.path} answers {allow}, not {request.method}", headers=error.headers)
    raise UnknownPath(f"nothing lies at {request.url.path!r}; /docs lists what does")


async def _answer(problem: Problem, request_id: str, send: Send) -> None:
    body = json.dumps(problem.document(request_id)).encode()
    headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **problem.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
