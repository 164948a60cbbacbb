"""`POST /sample`, from the raw body to the response: an ASGI application of its own, so that a request, one among ten
thousand a second, does not pay for what it does not use."""

import asyncio
import math
import time
from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from reparam.service.artifact.contract import Arrays
from reparam.service.engine.job import Awaited, Job
from reparam.service.errors import ClientLeft, InvalidRequest, TooLarge, UnsupportedMediaType, clipped
from reparam.service.http.encoders import ENCODERS, MEDIA_TYPES, NPY, buffers, head, negotiate, npy_header
from reparam.service.http.headers import HeaderMap, by_name, from_lines
from reparam.service.lifespan import Service
from reparam.service.operations.sample import parse, resolve
from reparam.service.runtime.sampler import Rows, row_bytes

LARGE_BODY = 2**16  # bytes; from here on a body is parsed on a thread, so that other requests go on between its steps
LARGE_ANSWER = 2**13  # raw bytes; from here on PNG, JSON and npz are encoded on a thread
LARGE_MESSAGE = 2**16  # bytes; from here on arrays are sent as they are, not copied into one message
STREAMED = 2**20  # bytes; from here on rows are sent before the last of them is computed
UNCODED = ((b"content-encoding", b"identity"), (b"transfer-encoding", b"chunked"))


class Sampling:
    """What happens to a request, step by step; and called as an ASGI application, all of it. Raises Problem, and
    ClientLeft."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.settings = service.settings
        self.engine = service.engine
        self._small = dict.fromkeys(MEDIA_TYPES, min(LARGE_ANSWER, self.settings.max_buffered_bytes))
        self._small[NPY] = LARGE_MESSAGE
        self.encode = {media_type: service.metrics.encode.labels(media_type) for media_type in MEDIA_TYPES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = by_name(scope["headers"])
        job = Awaited(self.engine, self.check_head(given), receive)
        self.engine.join(job)
        try:
            body = await self._body(job, given, receive)
            rows = self.read(body) if len(body) < LARGE_BODY else await asyncio.to_thread(self.read, body)
            media_type = self.negotiate(given, rows)
            first = min(rows.n, self.engine.window(rows.model))
            self.engine.submit(job, rows, self.held(rows, media_type), first)
            await self._send(job, media_type, send)
        except ClientLeft:
            self.count_departure(job)
            raise
        except asyncio.CancelledError:
            if job.error is None:
                raise
            raise job.error from None
        finally:
            job.close()

    def check_head(self, given: HeaderMap) -> float:
        """The seconds that it may take. Raises Unavailable, InvalidRequest, UnsupportedMediaType."""
        self.service.ready()
        _check_content_type(given)
        return _timeout(given, self.settings.request_timeout)

    def read(self, body: bytes) -> Rows:
        """Raises UnknownModel, InvalidRequest, TooLarge."""
        return resolve(parse(body), self.service.repository, self.settings.max_rows)

    def negotiate(self, given: HeaderMap, rows: Rows) -> str:
        """The media type of the answer. Raises NotAcceptable."""
        return negotiate(given.get(b"accept", b"*/*"), rows.outputs)

    def size_if_small(self, rows: Rows, media_type: str) -> int | None:
        """Raw bytes of an answer that is computed as a whole and encoded in no time; None of any other."""
        size = rows.n * row_bytes(rows.model, rows.outputs)
        return size if size <= self._small[media_type] and rows.n <= self.engine.window(rows.model) else None

    def held(self, rows: Rows, media_type: str) -> int:
        """Raw bytes that the answer holds at a time. Raises TooLarge."""
        row, limit = row_bytes(rows.model, rows.outputs), self.settings.max_buffered_bytes
        size = rows.n * row
        if media_type == NPY:
            size = min(size, 2 * self.engine.window(rows.model) * row)
        elif size > limit:
            raise TooLarge(
                f"{rows.n} rows are {size} raw bytes; {media_type} answers hold at most {limit}, here "
                f"{limit // row} rows: ask for fewer, or stream one output as {NPY}",
                limit=limit // row,
                got=rows.n,
            )
        return size

    def head(self, job: Job, media_type: str, size: int, encode: float) -> bytes:
        """The lines of an answer's head. size: bytes of the body. encode: seconds that it took."""
        self.encode[media_type].observe(encode)
        return head(job.request, media_type, size, job.queue_seconds, job.infer_seconds, encode)

    def count_departure(self, job: Job) -> None:
        """Count a client that did not wait for its answer."""
        self.service.metrics.cancelled.labels(job.stage).inc()

    async def _body(self, job: Job, given: HeaderMap, receive: Receive) -> bytes:
        """Raises TooLarge, before the body is read where its length is announced, QueueFull, and ClientLeft."""
        limit = self.settings.max_body_bytes
        if announced(given) > limit:
            raise _too_large(limit, announced(given))
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            piece, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(piece) > limit:
                raise _too_large(limit, len(body) + len(piece))
            self.engine.hold(job, len(piece))
            if not more and not body:
                return bytes(piece)  # it came in one piece, as most do
            body += piece
            if not more:
                return bytes(body)

    async def _send(self, job: Awaited, media_type: str, send: Send) -> None:
        if self.size_if_small(job.request, media_type) is not None:
            body, seconds = encoded(job.request, media_type, await job.all())
        elif media_type == NPY:
            await self._stream(job, send)
            return
        else:
            pieces = await job.all()
            job.watch()
            try:
                async with asyncio.timeout_at(job.deadline):
                    body, seconds = await asyncio.to_thread(encoded, job.request, media_type, pieces)
            except TimeoutError:
                raise self.engine.expired("encode", job.timeout) from None
            if job.error is not None:  # meanwhile the client has left, or the service has to end
                raise job.error
        lines = self.head(job, media_type, len(body), seconds)
        await send({"type": "http.response.start", "status": 200, "headers": from_lines(lines)})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body"})  # when most of it is sent; until then it counts as held

    async def _stream(self, job: Awaited, send: Send) -> None:
        """Rows as npy without a copy, and if they are many, as they are computed. A slow reader holds back the
        computing, not the memory. What fails before the first rows gets a status; later, the connection breaks."""
        pieces = await job.pieces()
        header, size = npy_header(job.request, pieces[0])
        if size < STREAMED:
            pieces += await job.all()
        else:
            job.lift_deadline()
        lines = self.head(job, NPY, size, 0.0)
        await send({"type": "http.response.start", "status": 200, "headers": from_lines(lines)})
        await send({"type": "http.response.body", "body": header, "more_body": True})
        while True:
            for message in buffers(pieces):
                await send({"type": "http.response.body", "body": message, "more_body": True})
            if job.exhausted:
                break
            pieces = await job.pieces()
        await send({"type": "http.response.body"})


def _check_content_type(given: HeaderMap) -> None:
    content_type = given.get(b"content-type", b"application/json")
    if content_type != b"application/json" and content_type.split(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType(
            f"the body is declared as {clipped(content_type.decode('latin-1'))!r}: send JSON with the header "
            "`Content-Type: application/json`"
        )
    for name, plain in UNCODED:
        encoding = given.get(name, plain)
        if encoding.lower() != plain:
            got = clipped(encoding.decode("latin-1"))
            raise UnsupportedMediaType(f"the body is encoded as {got!r}: send it as it is")


def _timeout(given: HeaderMap, limit: float) -> float:
    """Seconds from the `Request-Timeout` header, at most the limit. Raises InvalidRequest."""
    header = given.get(b"request-timeout")
    if header is None:
        return limit
    try:
        seconds = float(header.replace(b"_", b"?"))  # which Python would take
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        got = clipped(header.decode("latin-1"))
        raise InvalidRequest(f"the header Request-Timeout must be a positive number of seconds, got {got!r}")
    return min(seconds, limit)


def _too_large(limit: int, got: int) -> TooLarge:
    return TooLarge(
        f"the body has at least {got} bytes, the limit is {limit}: send the parameters of fewer rows at a time",
        limit=limit,
        got=got,
    )


def announced(given: HeaderMap) -> int:
    """Bytes of the body, as its head says; 0 if it does not."""
    length = given.get(b"content-length", b"")
    return int(length) if length.isdigit() else 0


def encoded(rows: Rows, media_type: str, pieces: Sequence[Arrays]) -> tuple[bytes, float]:
    """The body of an answer, of all its rows, and the seconds that it took."""
    started = time.perf_counter()
    body = ENCODERS[media_type](rows, pieces)
    return body, time.perf_counter() - started
