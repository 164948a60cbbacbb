"""The two clients, Client and AsyncClient. Each call is a generator of `_calls`, which yields steps such as sending a
request. Client carries out the steps, AsyncClient awaits the same steps.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from reparam._calls import Calls, Emit, Flow, Read, Send, Sleep, T
from reparam._checks import string
from reparam._errors import no_response
from reparam._http import check_transport, httpx
from reparam._model import Model
from reparam._options import SampleOptions
from reparam._request import SampleRequest, sample_request
from reparam._samples import Samples

DEFAULT_URL = "http://127.0.0.1:8000"


class Client:
    """A connection pool to a Reparam service. Threads may share a client.

    base_url: address of the service.
    api_key: key of the service, sent as `Authorization: Bearer`.
    timeout: seconds for a whole call, including retries; None waits for ever.
    max_retries: number of attempts after the first, upon a connection error, 429, 502 or 503. A stream also retries
        after a timeout.
    transport: a transport of the HTTP library in use, for TLS settings, a proxy, a Unix socket or an application in
        this process. The library is httpx2 if installed, else httpx.

    Raises: ValueError, TypeError for impossible settings.

    Calls raise ReparamError. They raise ValueError or TypeError for impossible arguments before anything is sent.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float | None = 60.0,
        max_retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        check_transport(transport, httpx.BaseTransport)
        self._calls = Calls(base_url, api_key, timeout, max_retries)
        self._http = httpx.Client(transport=transport)

    def sample(
        self, n: int = 1, *, outputs: str | Sequence[str] = ("images",), **options: Unpack[SampleOptions]
    ) -> Samples:
        """Draw rows start .. start + n - 1 of a seed.

        n: number of rows.
        outputs: one or several of "images", "latents" (Gaussian), "codes" and "indices" (Gumbel).
        options: the fields of SampleOptions.

        Returns: the rows, with one array per output.

        Raises: ReparamError; ValueError, TypeError for impossible arguments.
        """
        return self._call(self._calls.sample(sample_request(n, outputs, options)))

    def iter_samples(
        self,
        n: int = 1_000_000,
        *,
        output: str = "images",
        progress: bool | None = None,
        **options: Unpack[SampleOptions],
    ) -> Generator[Samples, None, None]:
        """Draw the same rows as `sample`, in batches of about 1 MiB while the rows arrive, in constant memory.

        After a broken connection the stream resumes at the first missing row, with the same model version. So each row
        arrives exactly once. Here `timeout` limits each wait, and `max_retries` limits successive attempts without a
        new row.

        n: number of rows.
        output: name of one output, as in `sample`.
        progress: show a progress bar on stderr. Default: only if stderr is a terminal.
        options: the fields of SampleOptions. Parameters of all rows travel in one request, so the limit on bodies
            applies.

        Returns: a generator of batches, in order of rows.

        Raises: ReparamError; ValueError, TypeError for impossible arguments.
        """
        return self._carry_out(self._calls.stream(_stream_request(n, output, options), progress))

    def models(self) -> list[Model]:
        """List the models of the service, the default model first.

        Raises: ReparamError.
        """
        return self._call(self._calls.models())

    def model(self, name: str, version: int | None = None) -> Model:
        """Describe a model.

        name: name of the model.
        version: version of the model. Default: the latest.

        Raises: NotFound with the models or versions of the service; any other ReparamError; ValueError, TypeError for
            impossible arguments.
        """
        return self._call(self._calls.model(name, version))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, flow: Flow[T]) -> T:
        [value] = self._carry_out(flow)
        return value

    def _carry_out(self, flow: Flow[T]) -> Generator[T, None, None]:
        response: httpx.Response | None = None
        chunks: Iterator[bytes]
        outcome: Any
        try:
            step = next(flow)
            while True:
                try:
                    match step:
                        case Send(request):
                            outcome = response = self._http.send(request, stream=True)
                            chunks = response.iter_bytes()
                        case Read():
                            outcome = next(chunks, b"")
                        case Sleep(seconds):
                            time.sleep(seconds)
                            outcome = None
                        case Emit(value):  # pragma: no branch
                            outcome = yield value
                except httpx.RequestError as error:
                    step = flow.throw(no_response(error, self._calls.timeout))
                else:
                    step = flow.send(outcome)
        except StopIteration:
            pass
        finally:
            flow.close()
            if response is not None:
                response.close()


class AsyncClient:
    """The client for asyncio, with the settings and calls of `Client`. Calls are awaited."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float | None = 60.0,
        max_retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        check_transport(transport, httpx.AsyncBaseTransport)
        self._calls = Calls(base_url, api_key, timeout, max_retries)
        self._http = httpx.AsyncClient(transport=transport)

    async def sample(
        self, n: int = 1, *, outputs: str | Sequence[str] = ("images",), **options: Unpack[SampleOptions]
    ) -> Samples:
        """Draw rows; see `Client.sample`."""
        return await self._call(self._calls.sample(sample_request(n, outputs, options)))

    def iter_samples(
        self,
        n: int = 1_000_000,
        *,
        output: str = "images",
        progress: bool | None = None,
        **options: Unpack[SampleOptions],
    ) -> AsyncGenerator[Samples, None]:
        """Draw rows as batches, for `async for`; see `Client.iter_samples`.

        To leave the loop early, close the generator, for example by `contextlib.aclosing`.
        """
        return self._carry_out(self._calls.stream(_stream_request(n, output, options), progress))

    async def models(self) -> list[Model]:
        """List the models; see `Client.models`."""
        return await self._call(self._calls.models())

    async def model(self, name: str, version: int | None = None) -> Model:
        """Describe a model; see `Client.model`."""
        return await self._call(self._calls.model(name, version))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _call(self, flow: Flow[T]) -> T:
        [value] = [value async for value in self._carry_out(flow)]
        return value

    async def _carry_out(self, flow: Flow[T]) -> AsyncGenerator[T, None]:
        from asyncio import sleep  # imported here, because asyncio is slow to import and Client does not need asyncio

        response: httpx.Response | None = None
        chunks: AsyncIterator[bytes]
        outcome: Any
        try:
            step = next(flow)
            while True:
                try:
                    match step:
                        case Send(request):
                            outcome = response = await self._http.send(request, stream=True)
                            chunks = response.aiter_bytes()
                        case Read():
                            outcome = await anext(chunks, b"")
                        case Sleep(seconds):
                            await sleep(seconds)
                            outcome = None
                        case Emit(value):  # pragma: no branch
                            outcome = yield value
                except httpx.RequestError as error:
                    step = flow.throw(no_response(error, self._calls.timeout))
                else:
                    step = flow.send(outcome)
        except StopIteration:
            pass
        finally:
            flow.close()
            if response is not None:
                await response.aclose()


def _stream_request(n: int, output: str, options: SampleOptions) -> SampleRequest:
    return sample_request(n, string("output", output), options, ("n", "output", "progress"))
