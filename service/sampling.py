"""`POST /sample`, from the raw body to the response: an ASGI application of its own, so that a request, one among ten
thousand a second, does not pay for what it does not use."""

import asyncio
import math
import time

from starlette.types import Receive, Scope, Send

from service.artifact import Arrays
from service.errors import ClientLeft, InvalidRequest, TooLarge, UnsupportedMediaType
from service.job import Job
from service.life import Service
from service.requests import parse, resolve, row_bytes
from service.responses import ENCODERS, MEDIA_TYPES, NPY, buffers, headers, negotiate, npy_body, npy_header
from service.rows import Rows

LARGE_BODY = 2**16  # bytes; from here on a body is parsed on a thread, so that other requests go on meanwhile
LARGE_ANSWER = 2**13  # raw bytes; from here on PNG, JSON and npz are encoded on a thread
STREAMED = 2**20  # bytes; from here on rows are sent before the last of them is computed
LARGE_MESSAGE = 2**16  # bytes; from here on arrays are sent as they are, not copied into one message

Given = dict[bytes, bytes]


class Sampling:
    """Answers `POST /sample`. Raises Problem, and ClientLeft."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.settings = service.settings
        self.engine = service.engine
        self.encode = {media_type: service.metrics.encode.labels(media_type) for media_type in MEDIA_TYPES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.service.ready()
        given: Given = dict(scope["headers"])
        deadline = self.engine.loop.time() + _timeout(given, self.settings.request_timeout)
        _check_content_type(given)
        job = self.engine.open(deadline, receive)
        try:
            body = await _body(given, receive, self.settings.max_body_bytes)
            rows = self._read(body) if len(body) < LARGE_BODY else await asyncio.to_thread(self._read, body)
            media_type = negotiate(given.get(b"accept", b"*/*"), rows.outputs)
            self.engine.submit(job, rows, len(body) + self._held(rows, media_type))
            if media_type == NPY:
                await self._send_npy(job, rows, send)
            else:
                await self._send_encoded(job, rows, media_type, send)
        except ClientLeft:
            self.service.metrics.cancelled.labels(job.stage).inc()
            raise
        except asyncio.CancelledError:
            if job.error is None:
                raise
            raise job.error from None
        finally:
            job.close()

    def _read(self, body: bytes) -> Rows:
        return resolve(parse(body), self.service.repository, self.settings.max_rows)

    def _held(self, rows: Rows, media_type: str) -> int:
        """Raw bytes that the answer holds at a time. Raises TooLarge."""
        row, limit = row_bytes(rows.model, rows.outputs), self.settings.max_buffered_bytes
        if media_type == NPY:
            return row * min(rows.n, 2 * self.engine.window(rows.model))
        if rows.n * row > limit:
            raise TooLarge(
                f"{rows.n} rows are {rows.n * row} raw bytes; {media_type} answers hold at most {limit}, here "
                f"{limit // row} rows: ask for fewer, or stream one output as {NPY}",
                limit=limit // row,
                got=rows.n,
            )
        return row * rows.n

    async def _send_npy(self, job: Job, rows: Rows, send: Send) -> None:
        """Rows as they are computed, many without a copy. A slow reader holds back the computing, not the memory. What
        fails before the first rows gets a status; later, the connection breaks."""
        pieces = await job.pieces()
        header, size = npy_header(rows, pieces[0])
        if size < STREAMED:
            while not job.exhausted:
                pieces += await job.pieces()
        else:
            job.lift_deadline()
        started = time.perf_counter()
        small = size < LARGE_MESSAGE
        messages = [header + npy_body(pieces)] if small else [header, *buffers(pieces)]
        encoded = time.perf_counter() - started
        self.encode[NPY].observe(encoded)
        await _start(send, job, rows, NPY, size, encoded)
        if small:
            await send({"type": "http.response.body", "body": messages[0]})
            return
        while True:
            for message in messages:
                await send({"type": "http.response.body", "body": message, "more_body": True})
            if job.exhausted:
                break
            messages = buffers(await job.pieces())
        await send({"type": "http.response.body"})

    async def _send_encoded(self, job: Job, rows: Rows, media_type: str, send: Send) -> None:
        pieces: list[Arrays] = []
        while not job.exhausted:
            pieces += await job.pieces()
        started = time.perf_counter()
        encode = ENCODERS[media_type]
        if job.size < LARGE_ANSWER:
            body = encode(rows, pieces)
        else:
            try:
                async with asyncio.timeout_at(job.deadline):
                    body = await asyncio.to_thread(encode, rows, pieces)
            except TimeoutError:
                raise self.engine.expired("encode") from None
        encoded = time.perf_counter() - started
        self.encode[media_type].observe(encoded)
        await _start(send, job, rows, media_type, len(body), encoded)
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body"})  # when most of it is sent; until then it counts as held


def _check_content_type(given: Given) -> None:
    content_type = given.get(b"content-type", b"application/json")
    if content_type != b"application/json" and content_type.split(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType(
            f"the body is declared as {content_type.decode('latin-1')!r}: send JSON with the header "
            "`Content-Type: application/json`"
        )
    encoding = given.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        raise UnsupportedMediaType(f"the body is encoded as {encoding.decode('latin-1')!r}: send it as it is")


def _timeout(given: Given, limit: float) -> float:
    """Seconds from the `Request-Timeout` header, at most the limit. Raises InvalidRequest."""
    header = given.get(b"request-timeout")
    if header is None:
        return limit
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest(
            f"the header Request-Timeout must be a positive number of seconds, got {header.decode('latin-1')!r}"
        )
    return min(seconds, limit)


async def _body(given: Given, receive: Receive, limit: int) -> bytes:
    """Raises TooLarge, before the body is read where its length is announced, and ClientLeft."""
    announced = given.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise TooLarge(f"the body has {int(announced)} bytes, the limit is {limit}", limit=limit, got=int(announced))
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece, more = message.get("body", b""), message.get("more_body", False)
        if len(body) + len(piece) > limit:
            raise TooLarge(f"the body has more than {limit} bytes", limit=limit, got=len(body) + len(piece))
        if not more and not body:
            return bytes(piece)  # it came in one piece, as most do
        body += piece
        if not more:
            return bytes(body)


async def _start(send: Send, job: Job, rows: Rows, media_type: str, size: int, encode: float) -> None:
    own = [
        (b"content-length", b"%d" % size),
        (
            b"server-timing",
            b"queue;dur=%.3f, infer;dur=%.3f, encode;dur=%.3f" % (1e3 * job.queue, 1e3 * job.infer, 1e3 * encode),
        ),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": own + headers(rows, media_type)})
