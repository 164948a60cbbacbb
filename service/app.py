"""The FastAPI application: routes, and the life of the service behind them."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service import __version__, schema
from service.artifact import Arrays
from service.batcher import Batcher, Timing
from service.devices import choose
from service.edge import Edge, refused_by_router
from service.errors import (
    PROBLEMS,
    DeadlineExceeded,
    InvalidRequest,
    TooLarge,
    Unavailable,
    UnknownPath,
    UnsupportedMediaType,
)
from service.metrics import Metrics
from service.repository import Model, Repository
from service.requests import parse, resolve, row_bytes
from service.responses import ENCODERS, NPY, Answer, negotiate, npy_header
from service.rows import Rows
from service.settings import Settings

log = logging.getLogger(__name__)

ENCODE_ON_LOOP = 2**16  # raw bytes; more is encoded on a thread, so that other requests go on


class Service:
    """What the routes share: the models, the batcher, and whether requests are taken."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = choose(settings.device)
        self.metrics = Metrics()
        self.repository = Repository(settings.default_model)
        self.batcher = Batcher(settings.max_batch_rows, settings.max_queue_rows, self.metrics)
        self.state = "starting"
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics.queue_rows.set_function(lambda: self.batcher.queued_rows)

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Load the models beside the event loop, so that /livez answers meanwhile; serve until the end."""
        self._tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._serve())]
        yield
        self.drain()
        self.stop()
        for task in self._tasks:
            task.cancel()

    async def _load(self) -> None:
        with _logged("the models could not be loaded"):
            await asyncio.to_thread(self.repository.load, self.settings.artifacts, self.device, self.settings.threads)
        for model in self.served():
            self.metrics.model_served.labels(model.name, str(model.version), model.artifact.provider).set(1)
        self.metrics.model_refused.set(len(self.repository.refused))
        if self.state == "starting":
            self.state = "ready" if self.repository.models else "no model"

    async def _serve(self) -> None:
        with _logged("the batcher ended"):
            await self.batcher.serve()

    def failure(self) -> BaseException | None:
        """What ended the loading or the batcher, if they did not end as they should: only a restart helps."""
        ended = (task for task in self._tasks if task.done() and not task.cancelled())
        return next((task.exception() for task in ended if task.exception()), None)

    def served(self) -> list[Model]:
        """The latest version of every model."""
        return [self.repository.find(name, None) for name in sorted(self.repository.models)]

    def drain(self) -> None:
        """From now on /readyz says no; requests are answered until `stop`."""
        self.state = "draining"

    def stop(self) -> None:
        """Refuse what waits and what comes."""
        self.batcher.close("the service is draining: ask another replica, or again")

    def ready(self) -> None:
        """Raises Unavailable."""
        if self.state == "starting":
            raise Unavailable("the models are being loaded", retry_after=1)

    @contextlib.asynccontextmanager
    async def within(self, deadline: float, stage: str) -> AsyncIterator[None]:
        """Raises DeadlineExceeded if what is done inside outlasts the deadline, on the event loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError:
            self.metrics.expired.labels(stage).inc()
            raise DeadlineExceeded(f"the deadline passed in the stage {stage!r}", stage=stage) from None

    async def outputs(self, rows: Rows, timing: Timing, deadline: float | None) -> AsyncGenerator[Arrays, None]:
        """The graph's outputs for the rows, in pieces of at most one batch."""
        size = self.batcher.max_batch_rows
        for lo in range(0, rows.n, size):
            yield await self.batcher.run(rows.part(lo, min(lo + size, rows.n)), timing, deadline)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception(what)
        raise


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings. Raises DeviceError."""
    service = Service(settings)
    app = FastAPI(
        title="Reparam",
        version=__version__,
        description="Samples of trained variational autoencoders, reproducible to the row.",
        lifespan=service.running,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.service = service
    key = settings.api_key.get_secret_value() if settings.api_key else None
    app.add_middleware(Edge, metrics=service.metrics, api_key=key)
    app.add_exception_handler(HTTPException, refused_by_router)

    @app.post("/sample", **schema.SAMPLE)
    async def sample(request: Request) -> Response:
        service.ready()
        deadline = asyncio.get_running_loop().time() + _timeout(request, settings.request_timeout)
        _check_content_type(request)
        async with service.within(deadline, "body"):
            asked = parse(await _body(request, settings.max_body_bytes))
        media_type = negotiate(request.headers.get("accept"), asked.outputs)
        rows = resolve(asked, service.repository, settings.max_rows)
        answer = Answer(rows, asked.outputs)
        service.batcher.admit(rows.n)
        if rows.n <= service.batcher.max_batch_rows:
            return await _buffered(service, answer, media_type, deadline)
        if media_type == NPY:
            return await _stream(service, answer, deadline)
        return await _while_connected(request, _buffered(service, answer, media_type, deadline))

    @app.get("/models", **schema.MODELS)
    async def models() -> JSONResponse:
        service.ready()
        served = [_describe(service, model) for model in service.served()]
        return JSONResponse({"default": service.repository.default_name(), "models": served})

    @app.get("/models/{name}", **schema.MODEL)
    async def model(name: str) -> JSONResponse:
        service.ready()
        return JSONResponse(_describe(service, service.repository.find(name, None)))

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", **schema.LIVEZ)
    async def livez() -> JSONResponse:
        failure = service.failure()
        if failure is None:
            return JSONResponse({"status": "alive"})
        return JSONResponse({"status": "failed", "failure": repr(failure)}, 503)

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", **schema.READYZ)
    async def readyz() -> JSONResponse:
        versions = {name: sorted(known) for name, known in sorted(service.repository.models.items())}
        status = "failed" if service.failure() else service.state
        body = {"status": status, "models": versions, "refused": service.repository.refused}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @app.get("/metrics", **schema.METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/problems/{slug}", **schema.PROBLEM)
    async def problem(slug: str) -> PlainTextResponse:
        if slug not in PROBLEMS:
            raise UnknownPath(f"no problem type {slug!r}; there are: {', '.join(PROBLEMS)}")
        return PlainTextResponse(f"{PROBLEMS[slug].status} {slug}\n\n{PROBLEMS[slug].meaning}\n")

    return app


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "application/json")
    if content_type.split(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(
            f"the body is declared as {content_type!r}: send JSON with the header `Content-Type: application/json`"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"the body is encoded as {encoding!r}: send it as it is")


async def _body(request: Request, limit: int) -> bytes:
    """Raises TooLarge, before the body is read where its length is announced."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise TooLarge(f"the body has {announced} bytes, the limit is {limit}", limit=limit, got=int(announced))
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise TooLarge(f"the body has more than {limit} bytes", limit=limit, got=len(body))
    return bytes(body)


def _timeout(request: Request, limit: float) -> float:
    """Seconds from the `Request-Timeout` header, at most the limit. Raises InvalidRequest."""
    header = request.headers.get("request-timeout")
    if header is None:
        return limit
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest(f"the header Request-Timeout must be a positive number of seconds, got {header!r}")
    return min(seconds, limit)


async def _buffered(service: Service, answer: Answer, media_type: str, deadline: float) -> Response:
    rows, limit = answer.rows, service.settings.max_buffered_bytes
    size = rows.n * row_bytes(rows.model, answer.outputs)
    if size > limit:
        most = limit // row_bytes(rows.model, answer.outputs)
        raise TooLarge(
            f"{rows.n} rows are {size} raw bytes; {media_type} answers hold at most {limit}, here {most} rows: "
            f"ask for fewer, or stream one output as {NPY}",
            limit=most,
            got=rows.n,
        )
    timing = Timing()
    pieces = [answer.select(piece) async for piece in service.outputs(rows, timing, deadline)]
    arrays: Arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in answer.outputs}
    started = time.perf_counter()
    async with service.within(deadline, "encode"):
        encode = ENCODERS[media_type]
        small = size <= ENCODE_ON_LOOP
        body = encode(answer, arrays) if small else await asyncio.to_thread(encode, answer, arrays)
    encoded = time.perf_counter() - started
    service.metrics.encode.labels(media_type).observe(encoded)
    return Response(body, media_type=media_type, headers=answer.headers() | _headers(timing, encoded))


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response, unless the client leaves first: then the work is cancelled. Raises ClientDisconnect."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_departure(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _departure(request: Request) -> None:
    """Return when the client has gone; its body was read, so nothing else can come."""
    await request.receive()


async def _stream(service: Service, answer: Answer, deadline: float) -> Response:
    """Rows as they are computed. A slow reader holds back the computing, not the memory: no piece is computed before
    the one before it was taken. What fails before the first rows gets a status; later, the connection breaks."""
    timing, size = Timing(), service.batcher.max_batch_rows
    (first,) = answer.select(await service.batcher.run(answer.rows.part(0, size), timing, deadline)).values()
    rest = answer.rows.part(size, answer.rows.n)
    header = npy_header(answer, first)

    async def body() -> AsyncIterator[bytes]:
        yield header + first.tobytes()
        async for piece in service.outputs(rest, timing, None):
            (array,) = answer.select(piece).values()
            yield array.tobytes()

    length = len(header) + answer.rows.n * first[0].nbytes
    headers = {"Content-Length": str(length), **answer.headers(), **_headers(timing, 0)}
    return StreamingResponse(body(), media_type=NPY, headers=headers)


def _headers(timing: Timing, encode: float) -> dict[str, str]:
    stages = {"queue": timing.queue, "infer": timing.infer, "encode": encode}
    milliseconds = ", ".join(f"{stage};dur={1000 * seconds:.3f}" for stage, seconds in stages.items())
    return {"Server-Timing": milliseconds, "Vary": "Accept"}


def _describe(service: Service, model: Model) -> dict[str, Any]:
    contract = model.contract
    return {
        "name": model.name,
        "version": model.version,
        "versions": sorted(service.repository.models[model.name]),
        "kind": contract.kind,
        "latent_shape": contract.latent_shape,
        "image_shape": contract.image_shape,
        "default_temperature": contract.default_temperature,
        "noise_version": contract.noise_version,
        "parameters": contract.traits.parameters,
        "outputs": model.outputs,
        "trained_on": contract.trained_on,
        "evaluation": contract.evaluation,
        "provider": model.artifact.provider,
        "bytes": model.artifact.size,
    }
