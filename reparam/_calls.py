"""The logic of each call, such as `Client.sample`, without input and output.

Each call is written once as a generator, called a flow here. A flow yields steps: Send, Read, Sleep, and Emit with a
result for the caller. Client and AsyncClient carry out each step, with and without `await`, and send the outcome into
the generator. If no response arrives, the client throws a ReparamError into the generator instead.
"""

import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from reparam import _checks
from reparam._errors import LONGEST, ConnectionFailed, ReparamError, StatusError, timed_out, worth_retrying
from reparam._http import httpx
from reparam._model import Model
from reparam._options import parameters
from reparam._progress import Progress
from reparam._request import JSON, Remaining, SampleRequest, Server
from reparam._responses import NPY, NPZ, RowReader, check, read_model, read_models, read_npy, read_npz, usable
from reparam._samples import Samples

T = TypeVar("T")

FIRST_BACKOFF = 0.5  # seconds; limit on the first random wait, doubled with each failure
LAST_BACKOFF = 8.0  # seconds; largest limit


@dataclass(frozen=True)
class Send:
    """Send a request. Outcome: the response, with the body still unread."""

    request: httpx.Request


@dataclass(frozen=True)
class Read:
    """Read more of the last response's body. Outcome: bytes; b"" at the end of the body."""


@dataclass(frozen=True)
class Sleep:
    """Wait for a number of seconds. Outcome: None."""

    seconds: float


@dataclass(frozen=True)
class Emit(Generic[T]):
    """Hand a value to the caller. Outcome: None."""

    value: T


Steps = Generator[Send | Read | Sleep, Any, T]
Flow = Generator[Send | Read | Sleep | Emit[T], Any, None]


class Calls:
    """Makes the flow of each call, with the settings of one client.

    base_url: address of the service.
    api_key: key of the service; None for no key.
    timeout: seconds for a whole call; None waits for ever.
    max_retries: number of attempts after the first.
    server: makes the HTTP requests.

    Raises: ValueError, TypeError for impossible settings.
    """

    def __init__(self, base_url: str, api_key: str | None, timeout: float | None, max_retries: int) -> None:
        if timeout is not None and not _checks.number("timeout", timeout) > 0:
            raise ValueError(f"timeout must be more than 0 seconds, or None to wait for ever, got {timeout}")
        if _checks.integer("max_retries", max_retries) < 0:
            raise ValueError(f"max_retries must be at least 0, got {max_retries}")
        self.server = Server(base_url, api_key)
        self.timeout = None if timeout is None or timeout > LONGEST else timeout
        self.max_retries = max_retries

    def sample(self, request: SampleRequest) -> Flow[Samples]:
        """Make the flow of `Client.sample`: a generator of its steps. It emits one Samples, or raises ReparamError."""
        media_type, read = (NPY, read_npy) if len(request.outputs) == 1 else (NPZ, read_npz)
        exchange = self._exchange(lambda remaining: self.server.sample(request, media_type, remaining), media_type)
        yield Emit(read(*(yield from exchange), request))

    def models(self) -> Flow[list[Model]]:
        """Make the flow of `Client.models`. The flow emits one list of Model, or raises ReparamError."""
        yield Emit(read_models(*(yield from self._exchange(self.server.models, JSON))))

    def model(self, name: str, version: int | None) -> Flow[Model]:
        """Make the flow of `Client.model`. The flow emits one Model.

        The flow raises ReparamError, and ValueError or TypeError for impossible arguments.
        """
        if not _checks.string("name", name) or name in (".", ".."):
            raise ValueError(f"name must be the name of a model, got {name!r}")
        yield Emit((yield from self._model(name, None if version is None else _checks.integer("version", version))))

    def stream(self, request: SampleRequest, progress: bool | None) -> Flow[Samples]:
        """Make the flow of `Client.iter_samples`, which emits batches of rows.

        Each time the connection breaks, the flow requests the missing rows. The flow raises ReparamError when
        max_retries attempts in succession bring no row, or a retry cannot help.

        request: the request for all rows; one output.
        progress: show a progress bar; None for a bar only on a terminal.
        """
        failures = latent_dims = 0
        with Progress(request.n, progress) as bar:
            while True:
                rows = RowReader(request)
                try:
                    yield from self._receive(rows, bar)
                    return
                except ReparamError as error:
                    yield from _emit_batches(rows, b"", bar)
                    if not rows.missing:
                        return
                    if rows.received:
                        failures = 0
                    yield Sleep(self._pause(error, failures, self.timeout))
                    failures += 1
                if rows.received:
                    request = rows.pinned()
                    if parameters(request.options) and not latent_dims:
                        model = yield from self._model(request.options["model"], request.options["version"])
                        latent_dims = len(model.latent_shape)
                    request = replace(request, latent_dims=latent_dims).after(rows.received)

    def _receive(self, rows: RowReader, bar: Progress) -> Flow[Samples]:
        """Make one attempt of a stream, and emit each batch.

        rows: reader of this attempt.

        Raises: ReparamError if the stream breaks before the last row.
        """
        # A stream may take hours, so the timeout limits each wait, not the whole stream.
        rows.response = yield Send(self.server.sample(rows.request, NPY, lambda: self.timeout))
        if not usable(rows.response, NPY):
            check(rows.response, (yield from self._read_all(rows.response, _countdown(self.timeout))), NPY)
        more = True
        while more:
            chunk = yield Read()
            yield from _emit_batches(rows, chunk, bar)
            more = bool(chunk)
        if rows.missing:
            raise ConnectionFailed(f"the response ended after {rows.received} of {rows.request.n} rows")

    def _model(self, name: str, version: int | None) -> Steps[Model]:
        exchange = self._exchange(lambda remaining: self.server.model(name, version, remaining), JSON)
        return read_model(*(yield from exchange))

    def _exchange(
        self, build: Callable[[Remaining], httpx.Request], media_type: str
    ) -> Steps[tuple[httpx.Response, bytearray]]:
        """Send a request and read the whole response. Retry while a retry can help and time remains.

        build: makes the request of an attempt. The argument is a function that returns the remaining seconds.
        media_type: media type that the response must have.

        Returns: the response and the body.

        Raises: ReparamError, the error of the last attempt.
        """
        remaining = _countdown(self.timeout)
        failures = 0
        while True:
            try:
                response = yield Send(build(remaining))
                body = yield from self._read_all(response, remaining)
                check(response, body, media_type)
                return response, body
            except ReparamError as error:
                yield Sleep(self._pause(error, failures, remaining()))
                failures += 1

    def _read_all(self, response: httpx.Response, remaining: Remaining) -> Steps[bytearray]:
        body = bytearray()
        while chunk := (yield Read()):
            body += chunk
            # The HTTP library's timeout limits each read. A slow response may take many reads.
            if (seconds := remaining()) is not None and seconds <= 0:
                raise timed_out(response.request, self.timeout)
        return body

    def _pause(self, error: ReparamError, failures: int, remaining: float | None) -> float:
        """Choose the wait before the next attempt.

        error: error of the last attempt.
        failures: number of failures before this error.
        remaining: seconds until the deadline; None for no deadline.

        Returns: seconds to wait.

        Raises: `error` if no further attempt should be made.
        """
        if not worth_retrying(error) or failures >= self.max_retries:
            raise error
        asked = error.retry_after if isinstance(error, StatusError) else None
        # Full jitter, added to Retry-After, so that clients that failed together do not retry together.
        pause = (asked or 0.0) + secrets.SystemRandom().uniform(0, min(LAST_BACKOFF, FIRST_BACKOFF * 2**failures))
        if remaining is not None and pause >= remaining:
            raise error
        return pause


def _emit_batches(rows: RowReader, chunk: bytes, bar: Progress) -> Flow[Samples]:
    for batch in rows.feed(chunk):
        bar.advance(batch.n)
        yield Emit(batch)


def _countdown(seconds: float | None) -> Remaining:
    """Start a countdown.

    Returns: a function that returns the remaining seconds, below 0 after the deadline. Without a deadline the function
        returns None.
    """
    if seconds is None:
        return lambda: None
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()
