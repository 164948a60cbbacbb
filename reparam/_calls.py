"""The course of each call, without its input and output.

A flow is a generator. It yields what is to be done, and is sent what came of it: the response to Send, bytes to Read.
What it has for the caller it yields as Emit. Client and AsyncClient carry flows out, so they share all of this.
"""

import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from reparam._answers import JSON, NPY, NPZ, RowReader, check, read_model, read_models, read_npy, read_npz, usable
from reparam._errors import LONGEST, ConnectionFailed, ReparamError, StatusError, timed_out, worth_retrying
from reparam._model import Model
from reparam._progress import Progress
from reparam._request import Left, SampleRequest, Server, number, text, whole
from reparam._samples import Samples

T = TypeVar("T")

FIRST_BACKOFF = 0.5  # seconds, at most; it doubles with each try
LAST_BACKOFF = 8.0


@dataclass(frozen=True)
class Send:
    """Send a request. Outcome: the response, its body still unread."""

    request: httpx.Request


@dataclass(frozen=True)
class Read:
    """Read on in the body of the last response. Outcome: bytes, b"" at its end."""


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Emit(Generic[T]):
    """Hand a value to the caller."""

    value: T


Steps = Generator[Send | Read | Sleep, Any, T]
Flow = Generator[Send | Read | Sleep | Emit[T], Any, None]


class Calls:
    """The flows of one client. Raises ValueError, TypeError for settings that make no sense."""

    def __init__(self, base_url: str, api_key: str | None, timeout: float | None, max_retries: int) -> None:
        if timeout is not None and not number("timeout", timeout) > 0:
            raise ValueError(f"timeout must be more than 0 seconds, or None to wait for ever, got {timeout}")
        if whole("max_retries", max_retries) < 0:
            raise ValueError(f"max_retries must be at least 0, got {max_retries}")
        self.server = Server(base_url, api_key)
        self.timeout = None if timeout is None or timeout > LONGEST else timeout
        self.max_retries = max_retries

    def sample(self, request: SampleRequest) -> Flow[Samples]:
        media_type, read = (NPY, read_npy) if len(request.outputs) == 1 else (NPZ, read_npz)
        answer = yield from self._exchange(lambda left: self.server.sample(request, media_type, left), media_type)
        yield Emit(read(*answer, request))

    def models(self) -> Flow[list[Model]]:
        answer = yield from self._exchange(self.server.models, JSON)
        yield Emit(read_models(*answer))

    def model(self, name: str, version: int | None) -> Flow[Model]:
        if not text("name", name) or name in (".", ".."):
            raise ValueError(f"name must be that of a model, got {name!r}")
        yield Emit((yield from self._model(name, None if version is None else whole("version", version))))

    def stream(self, request: SampleRequest, progress: bool | None) -> Flow[Samples]:
        """One request, asked again from the row it had reached each time the connection breaks."""
        failures = latent_dims = 0
        with Progress(request.n, progress) as bar:
            while True:
                rows = RowReader(request)
                try:
                    yield from self._receive(rows, bar)
                    return
                except ReparamError as error:
                    yield from _hand_out(rows, b"", bar)
                    if not rows.missing:
                        return
                    if rows.received:
                        failures = 0
                    yield Sleep(self._pause(error, failures, self.timeout))
                    failures += 1
                if rows.received:
                    request = rows.pinned()
                    if request.parameters and not latent_dims:
                        model = yield from self._model(request.options["model"], request.options["version"])
                        latent_dims = len(model.latent_shape)
                    request = request.after(rows.received, latent_dims)

    def _receive(self, rows: RowReader, bar: Progress) -> Flow[Samples]:
        """One try of a stream. Raises ReparamError where it does not reach the last row."""
        # A stream may take hours: the timeout is for each wait, not for all of it.
        rows.response = yield Send(self.server.sample(rows.request, NPY, lambda: self.timeout))
        if not usable(rows.response, NPY):
            check(rows.response, (yield from self._read_all(rows.response, _deadline(self.timeout))), NPY)
        more = True
        while more:
            chunk = yield Read()
            yield from _hand_out(rows, chunk, bar)
            more = bool(chunk)
        if rows.missing:
            raise ConnectionFailed(f"the answer ended after {rows.received} of {rows.request.n} rows")

    def _model(self, name: str, version: int | None) -> Steps[Model]:
        return read_model(*(yield from self._exchange(lambda left: self.server.model(name, version, left), JSON)))

    def _exchange(
        self, build: Callable[[Left], httpx.Request], media_type: str
    ) -> Steps[tuple[httpx.Response, bytearray]]:
        """A request and its whole answer, tried again while that can help and the time lasts."""
        left = _deadline(self.timeout)
        failures = 0
        while True:
            try:
                response = yield Send(build(left))
                body = yield from self._read_all(response, left)
                check(response, body, media_type)
                return response, body
            except ReparamError as error:
                yield Sleep(self._pause(error, failures, left()))
                failures += 1

    def _read_all(self, response: httpx.Response, left: Left) -> Steps[bytearray]:
        body = bytearray()
        while chunk := (yield Read()):
            body += chunk
            # The timeout of a read cannot see an answer that trickles in.
            if (seconds := left()) is not None and seconds <= 0:
                raise timed_out(response.request, self.timeout)
        return body

    def _pause(self, error: ReparamError, failures: int, left: float | None) -> float:
        """Seconds to wait after so many failures before the next try. Raises `error` where there should be none."""
        if not worth_retrying(error) or failures >= self.max_retries:
            raise error
        asked = error.retry_after if isinstance(error, StatusError) else None
        # Full jitter, on top of what the service asks for: clients that failed together do not come back together.
        pause = (asked or 0.0) + secrets.SystemRandom().uniform(0, min(LAST_BACKOFF, FIRST_BACKOFF * 2**failures))
        if left is not None and pause >= left:
            raise error
        return pause


def _hand_out(rows: RowReader, chunk: bytes, bar: Progress) -> Flow[Samples]:
    for batch in rows.feed(chunk):
        bar.advance(batch.n)
        yield Emit(batch)


def _deadline(seconds: float | None) -> Left:
    """A clock that runs down from now."""
    if seconds is None:
        return lambda: None
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()
