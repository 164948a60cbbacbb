"""The two clients: the same calls, carried out with and without `await`."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import numpy.typing as npt

from reparam._calls import Calls, Emit, Flow, Read, Send, Sleep, T
from reparam._errors import no_answer
from reparam._model import Model
from reparam._request import sample_request, text
from reparam._samples import Samples

LOCAL = "http://127.0.0.1:8000"


class Client:
    """A connection pool to a Reparam service. Threads may share it.

    api_key: sent as `Authorization: Bearer`. timeout: seconds that a call may take, with all its retries; None waits
    for ever. max_retries: tries after the first, on a connection error, 429, 502 or 503. transport: an httpx transport,
    for TLS settings, a proxy, a Unix socket or an application in this process.

    Calls raise ReparamError. Settings and arguments that make no sense raise ValueError or TypeError before anything is
    sent.
    """

    def __init__(
        self,
        base_url: str = LOCAL,
        api_key: str | None = None,
        *,
        timeout: float | None = 60.0,
        max_retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._calls = Calls(base_url, api_key, timeout, max_retries)
        self._http = httpx.Client(transport=transport)

    def sample(
        self,
        n: int = 1,
        *,
        model: str | None = None,
        version: int | None = None,
        temperature: float | None = None,
        hard: bool | None = None,
        prior: str | None = None,
        seed: int | None = None,
        start: int = 0,
        mu: npt.ArrayLike | None = None,
        log_var: npt.ArrayLike | None = None,
        logits: npt.ArrayLike | None = None,
        outputs: str | Sequence[str] = ("images",),
    ) -> Samples:
        """Rows start .. start + n - 1 of a seed. What is not given is the service's default; the seed is a fresh one.

        model, version: default: the service's default model, its latest version.
        temperature: at least 0. Gaussian: scale of the noise, 0 gives z = mu. Gumbel: of the relaxation, 0 gives
        one-hot codes.
        hard: Gumbel: one-hot codes at any temperature.
        prior: what rows without parameters are drawn from: "standard", one distribution for every row, or, where the
        model has it, "mixture", one of several, which is then the default.
        seed: 0 .. 2**64 - 1.
        mu, log_var: Gaussian, logits: Gumbel; of the latent shape, for every row, or (n, *latent_shape). Default: the
        model's prior. The service takes 8 MiB of them in one request: of more rows send some at a time, each from its
        own start.
        outputs: some of "images", "latents" (Gaussian), "codes" and "indices" (Gumbel).
        """
        request = sample_request(n, model, version, temperature, hard, prior, seed, start, mu, log_var, logits, outputs)
        [samples] = self._carry_out(self._calls.sample(request))
        return samples

    def iter_samples(
        self,
        n: int = 1_000_000,
        *,
        model: str | None = None,
        version: int | None = None,
        temperature: float | None = None,
        hard: bool | None = None,
        prior: str | None = None,
        seed: int | None = None,
        start: int = 0,
        mu: npt.ArrayLike | None = None,
        log_var: npt.ArrayLike | None = None,
        logits: npt.ArrayLike | None = None,
        output: str = "images",
        progress: bool | None = None,
    ) -> Generator[Samples, None, None]:
        """The rows that `sample` would return, as batches of about 1 MiB while they arrive, in constant memory.

        After a broken connection the stream goes on at the row it had reached, with the version it began with; each
        row comes once. Here `timeout` is for each wait, and max_retries for tries in a row that bring no new one.

        Parameters of single rows travel in one request: see `sample`.

        output: one of those of `sample`. progress: a progress bar on stderr; default: if that is a terminal.
        """
        outputs = text("output", output)
        request = sample_request(n, model, version, temperature, hard, prior, seed, start, mu, log_var, logits, outputs)
        return self._carry_out(self._calls.stream(request, progress))

    def models(self) -> list[Model]:
        """All models of the service, the default one first."""
        [models] = self._carry_out(self._calls.models())
        return models

    def model(self, name: str, version: int | None = None) -> Model:
        """One model, its latest version or this one. Raises NotFound, naming those there are."""
        [model] = self._carry_out(self._calls.model(name, version))
        return model

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

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
                    step = flow.throw(no_answer(error, self._calls.timeout))
                else:
                    step = flow.send(outcome)
        except StopIteration:
            pass
        finally:
            flow.close()
            if response is not None:
                response.close()


class AsyncClient:
    """`Client` for asyncio: the same arguments, the same calls, to be awaited."""

    def __init__(
        self,
        base_url: str = LOCAL,
        api_key: str | None = None,
        *,
        timeout: float | None = 60.0,
        max_retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._calls = Calls(base_url, api_key, timeout, max_retries)
        self._http = httpx.AsyncClient(transport=transport)

    async def sample(
        self,
        n: int = 1,
        *,
        model: str | None = None,
        version: int | None = None,
        temperature: float | None = None,
        hard: bool | None = None,
        prior: str | None = None,
        seed: int | None = None,
        start: int = 0,
        mu: npt.ArrayLike | None = None,
        log_var: npt.ArrayLike | None = None,
        logits: npt.ArrayLike | None = None,
        outputs: str | Sequence[str] = ("images",),
    ) -> Samples:
        """As `Client.sample`."""
        request = sample_request(n, model, version, temperature, hard, prior, seed, start, mu, log_var, logits, outputs)
        [samples] = [one async for one in self._carry_out(self._calls.sample(request))]
        return samples

    def iter_samples(
        self,
        n: int = 1_000_000,
        *,
        model: str | None = None,
        version: int | None = None,
        temperature: float | None = None,
        hard: bool | None = None,
        prior: str | None = None,
        seed: int | None = None,
        start: int = 0,
        mu: npt.ArrayLike | None = None,
        log_var: npt.ArrayLike | None = None,
        logits: npt.ArrayLike | None = None,
        output: str = "images",
        progress: bool | None = None,
    ) -> AsyncGenerator[Samples, None]:
        """As `Client.iter_samples`, for `async for`. To leave it early, `aclose` it: see contextlib.aclosing."""
        outputs = text("output", output)
        request = sample_request(n, model, version, temperature, hard, prior, seed, start, mu, log_var, logits, outputs)
        return self._carry_out(self._calls.stream(request, progress))

    async def models(self) -> list[Model]:
        """As `Client.models`."""
        [models] = [one async for one in self._carry_out(self._calls.models())]
        return models

    async def model(self, name: str, version: int | None = None) -> Model:
        """As `Client.model`."""
        [model] = [one async for one in self._carry_out(self._calls.model(name, version))]
        return model

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _carry_out(self, flow: Flow[T]) -> AsyncGenerator[T, None]:
        from asyncio import sleep  # here, for `import reparam` to stay fast where nothing is asynchronous

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
                    step = flow.throw(no_answer(error, self._calls.timeout))
                else:
                    step = flow.send(outcome)
        except StopIteration:
            pass
        finally:
            flow.close()
            if response is not None:
                await response.aclose()
