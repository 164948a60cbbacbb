"""`POST /sample`, from the raw body to the response."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from service.artifact import Arrays
from service.batcher import Timing
from service.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from service.life import Service
from service.requests import parse, resolve, row_bytes
from service.responses import ENCODERS, NPY, Answer, negotiate, npy_header

ENCODE_ON_LOOP = 2**16  # raw bytes; more is encoded on a thread, so that other requests go on


async def sample(service: Service, request: Request) -> Response:
    """Answer one request. Raises Problem, and ClientDisconnect if the client leaves first."""
    service.ready()
    deadline = asyncio.get_running_loop().time() + _timeout(request, service.settings.request_timeout)
    _check_content_type(request)
    async with service.within(deadline, "body"):
        asked = parse(await _body(request, service.settings.max_body_bytes))
    media_type = negotiate(request.headers.get("accept"), asked.outputs)
    rows = resolve(asked, service.repository, service.settings.max_rows)
    answer = Answer(rows, asked.outputs)
    service.batcher.admit(rows.n)
    if rows.n <= service.batcher.max_batch_rows:
        return await _buffered(service, answer, media_type, deadline)
    if media_type == NPY:
        return await _stream(service, answer, deadline)
    return await _while_connected(request, _buffered(service, answer, media_type, deadline))


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
    row = row_bytes(rows.model, answer.outputs)
    size, most = rows.n * row, limit // row
    if size > limit:
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
