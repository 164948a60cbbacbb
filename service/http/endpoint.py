"""An operation as an HTTP endpoint, from headers and body to the response.

The steps of a request are methods: Endpoint's `read_head`, `read` and `plan`, the engine's `submit`, and Endpoint's
`header_block`. Two callers share the steps: the endpoint itself, as an ASGI application, and the fast path in `wire/`.
"""

import asyncio
import math
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from reparam.service.artifact.outputs import Output
from reparam.service.engine.awaited import AwaitedJob
from reparam.service.engine.job import Job
from reparam.service.errors import ClientLeft, InvalidRequest, MalformedRequest, TooLarge, UnsupportedMediaType, clipped
from reparam.service.http.encoders import (
    MEDIA_TYPES,
    NPY,
    HeaderBlock,
    buffers,
    encode,
    negotiate,
    npy_header,
)
from reparam.service.http.headers import HeaderMap, by_name, content_length, from_lines
from reparam.service.lifespan import Lifespan
from reparam.service.operations.faults import explain
from reparam.service.operations.operation import Operation
from reparam.service.runtime.graphs import Graph, Work

LARGE_BODY = 2**16  # bytes; larger bodies are parsed on a thread, so that the event loop can serve other requests
LARGE_RESPONSE = 2**13  # raw bytes; larger PNG, JSON and npz are encoded on a thread
LARGE_MESSAGE = 2**16  # bytes; larger npy responses are sent array by array, without a copy into one message
STREAMED = 2**20  # bytes; larger npy responses are sent while later rows are computed
MIN_ROW_BYTES = 1024  # smallest size counted for a row of a response, because even a small row takes time to encode


class Head(NamedTuple):
    """The checked headers of a request.

    timeout: seconds for the whole request.
    accept: the header `Accept`.
    content_length: bytes of the body; 0 without the header `Content-Length`, or if the header is not a number.
    """

    timeout: float
    accept: bytes
    content_length: int


class Plan(NamedTuple):
    """The form of a response.

    work: the rows of the response.
    media_type: media type of the response.
    size: largest number of raw bytes of the response in memory at a time.
    first: number of rows that may run before the client has read a part of the response.
    is_small: the response is encoded at once on the event loop, after all rows are computed.
    """

    work: Work
    media_type: str
    size: int
    first: int
    is_small: bool


class Endpoint:
    """One operation over HTTP, as an ASGI application and as separate steps for the fast path.

    operation: the operation.
    lifespan: models and engine of the application.
    """

    def __init__(self, operation: Operation, lifespan: Lifespan) -> None:
        self.operation = operation
        self.lifespan = lifespan
        self.settings = lifespan.settings
        self.engine = lifespan.engine
        self._recorder = lifespan.recorder
        self._small = dict.fromkeys(MEDIA_TYPES, min(LARGE_RESPONSE, self.settings.max_buffered_bytes))
        self._small[NPY] = LARGE_MESSAGE
        self._headers = HeaderBlock(operation)
        for media_type in MEDIA_TYPES:
            lifespan.metrics.encode.labels(media_type)  # every series exists from the start
        self._validate = operation.adapter.validator.validate_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request, as an ASGI application.

        Raises: Problem; ClientLeft after a disconnect.
        """
        headers = by_name(scope["headers"])
        self.lifespan.check_ready()
        head = self.read_head(headers)
        job = AwaitedJob(self.engine, head.timeout, receive)
        self.engine.join(job)
        try:
            body = await self._receive_body(job, head, receive)
            work = self.read(body) if len(body) < LARGE_BODY else await asyncio.to_thread(self.read, body)
            plan = self.plan(head, work)
            self.engine.submit(job, work, plan.size, plan.first)
            await self._send(job, plan, send)
        except ClientLeft:
            self.count_disconnect(job)
            raise
        except asyncio.CancelledError:
            if job.error is None:
                raise
            raise job.error from None
        finally:
            job.unwatch()
            self.engine.leave(job)

    def read_head(self, headers: HeaderMap) -> Head:
        """Check the headers. The result depends on the headers alone, so callers may cache the result.

        Raises: InvalidRequest, NotAcceptable, UnsupportedMediaType.
        """
        _check_content_type(headers)
        timeout = _timeout(headers, self.settings.request_timeout)
        return Head(timeout, headers.get(b"accept", b"*/*"), content_length(headers))

    def read(self, body: bytes) -> Work:
        """Parse the body and resolve the request. An empty body means an empty JSON object.

        Returns: the rows to compute.

        Raises: InvalidRequest; UnknownModel; TooLarge for too many rows; Unavailable if no model is served.
        """
        try:
            request = self._validate(body or b"{}")
        except ValidationError:
            raise explain(body, self.operation.request) from None
        return self.operation.resolve(request, self.lifespan.repository, self.settings.max_rows)

    def plan(self, head: Head, work: Work) -> Plan:
        """Choose the media type and the form of the response.

        Raises: NotAcceptable; TooLarge for a response that is not npy and exceeds the setting max_buffered_bytes.
        """
        media_type = negotiate(head.accept, work.outputs)
        row, limit = _row_bytes(work.graph, work.outputs), self.settings.max_buffered_bytes
        size, n, window = work.n * row, work.n, self.engine.window(work.graph)
        if size <= self._small[media_type] and n <= window:
            return Plan(work, media_type, size, n, is_small=True)
        if media_type == NPY:
            size = min(size, 2 * window * row)
        elif size > limit:
            raise TooLarge(
                f"{n} rows are {size} raw bytes; {media_type} responses hold at most {limit}, here {limit // row} "
                f"rows: ask for fewer, or stream one output as {NPY}",
                limit=limit // row,
                got=n,
            )
        return Plan(work, media_type, size, min(n, window), is_small=False)

    def header_block(self, job: Job, media_type: str, size: int, encode_seconds: float) -> bytes:
        """Write the headers of the response as lines, and note the time of encoding for the metrics.

        size: bytes of the body.
        encode_seconds: time of encoding, in seconds.
        """
        self._recorder.encodings.append((media_type, encode_seconds))
        return self._headers.write(job.work, media_type, size, job.queue_seconds, job.infer_seconds, encode_seconds)

    def count_disconnect(self, job: Job) -> None:
        """Count a client that disconnected before the end of the response."""
        self.lifespan.metrics.cancelled.labels(job.stage).inc()

    async def _receive_body(self, job: Job, head: Head, receive: Receive) -> bytes:
        """Receive the body, and reserve its bytes piece by piece.

        Raises: TooLarge, before the body is read if Content-Length exceeds the limit; QueueFull; ClientLeft.
        """
        limit = self.settings.max_body_bytes
        if head.content_length > limit:
            raise _body_too_large(limit, head.content_length)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            piece, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(piece) > limit:
                raise _body_too_large(limit, len(body) + len(piece))
            self.engine.reserve_body(job, len(piece))
            if not more and not body and len(piece) >= head.content_length:
                return bytes(piece)  # most bodies come in one piece
            body += piece
            if not more and len(body) < head.content_length:  # a server dropped the body, as uvicorn does for upgrades
                raise MalformedRequest(
                    f"{len(body)} bytes of the body came, Content-Length says {head.content_length}: send all, and ask "
                    "for no upgrade"
                )
            if not more:
                return bytes(body)

    async def _send(self, job: AwaitedJob, plan: Plan, send: Send) -> None:
        if plan.is_small:
            body, seconds = encode(plan.work, plan.media_type, await job.all())
        elif plan.media_type == NPY:
            await self._stream(job, send)
            return
        else:
            pieces = await job.all()
            job.watch()
            try:
                async with asyncio.timeout_at(job.deadline):
                    body, seconds = await asyncio.to_thread(encode, plan.work, plan.media_type, pieces)
            except TimeoutError:
                raise self.engine.deadline_exceeded("encode", job.timeout) from None
            if job.error is not None:  # during encoding the client disconnected, or the shutdown failed all jobs
                raise job.error
        lines = self.header_block(job, plan.media_type, len(body), seconds)
        await send({"type": "http.response.start", "status": 200, "headers": from_lines(lines)})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        # This send waits until the write buffer holds little of the body. Until then its bytes stay reserved.
        await send({"type": "http.response.body"})

    async def _stream(self, job: AwaitedJob, send: Send) -> None:
        """Send rows as npy without a copy. A large response is sent while later rows are computed.

        With a slow reader, fewer rows are computed, so memory stays bounded.

        Raises: the job's error. Before the first rows, the error becomes a problem document. Later, the error breaks
            the connection.
        """
        pieces = await job.pieces()
        header, size = npy_header(job.work, pieces[0])
        if size < STREAMED:
            pieces += await job.all()
        else:
            # From here the client's speed decides. The transport aborts clients that read nothing.
            self.engine.deadlines.lift(job)
        lines = self.header_block(job, NPY, size, 0.0)
        await send({"type": "http.response.start", "status": 200, "headers": from_lines(lines)})
        await send({"type": "http.response.body", "body": header, "more_body": True})
        while True:
            for message in buffers(pieces):
                await send({"type": "http.response.body", "body": message, "more_body": True})
            if job.is_exhausted:
                break
            pieces = await job.pieces()
        await send({"type": "http.response.body"})


_PLAIN_ENCODINGS = ((b"content-encoding", b"identity"), (b"transfer-encoding", b"chunked"))


def _check_content_type(headers: HeaderMap) -> None:
    content_type = headers.get(b"content-type", b"application/json")
    if content_type != b"application/json" and content_type.split(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType(
            f"the body is declared as {clipped(content_type.decode('latin-1'))!r}: send JSON with the header "
            "`Content-Type: application/json`"
        )
    for name, plain in _PLAIN_ENCODINGS:
        encoding = headers.get(name, plain)
        if encoding.lower() != plain:
            got = clipped(encoding.decode("latin-1"))
            raise UnsupportedMediaType(f"the body is encoded as {got!r}: send it as it is")


def _timeout(headers: HeaderMap, limit: float) -> float:
    """Read the header `Request-Timeout` in seconds, at most the limit. Raises: InvalidRequest."""
    header = headers.get(b"request-timeout")
    if header is None:
        return limit
    try:
        seconds = float(header.replace(b"_", b"?"))  # refuse underscores, which Python allows in numbers
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        got = clipped(header.decode("latin-1"))
        raise InvalidRequest(f"the header Request-Timeout must be a positive number of seconds, got {got!r}")
    return min(seconds, limit)


@lru_cache(1024)
def _row_bytes(graph: Graph, outputs: tuple[Output, ...]) -> int:
    """Return the raw bytes of one row of a response, at least MIN_ROW_BYTES."""
    sizes = (np.dtype(output.dtype).itemsize * prod(graph.row_shapes[output.name]) for output in outputs)
    return max(MIN_ROW_BYTES, sum(sizes))


def _body_too_large(limit: int, got: int) -> TooLarge:
    return TooLarge(
        f"the body has at least {got} bytes, the limit is {limit}: send the parameters of fewer rows at a time",
        limit=limit,
        got=got,
    )
