"""What is sent: pure functions from arguments to HTTP requests."""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from operator import index
from typing import Any, SupportsIndex
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt

from reparam._samples import DTYPES
from reparam._version import __version__

SEEDS = 2**64

Left = Callable[[], float | None]  # seconds that may still be waited; None: any


@dataclass(frozen=True)
class SampleRequest:
    """Rows start .. start + n - 1 of a seed, and how to draw them.

    parameters: mu and log_var, or logits; float64, of the latent shape or (n, *latent_shape).
    """

    n: int
    seed: int
    start: int
    outputs: tuple[str, ...]
    options: Mapping[str, Any]  # model, version, temperature, hard, prior: those that were given
    parameters: Mapping[str, npt.NDArray[np.float64]]

    def content(self) -> bytes:
        """The body of POST /sample. It names what was given and nothing else; the service knows the defaults."""
        rows = {"n": self.n, "seed": self.seed, "start": self.start, "outputs": self.outputs}
        parameters = {name: array.tolist() for name, array in self.parameters.items()}
        return json.dumps({**rows, **self.options, **parameters}, separators=(",", ":")).encode()

    def of(self, model: str, version: int) -> "SampleRequest":
        """The same rows of one version, whatever becomes the latest meanwhile."""
        return replace(self, options={**self.options, "model": model, "version": version})

    def after(self, rows: int, latent_dims: int) -> "SampleRequest":
        """What is left to ask for when the first `rows` have come."""
        left = {name: array[rows:] if array.ndim > latent_dims else array for name, array in self.parameters.items()}
        return replace(self, n=self.n - rows, start=self.start + rows, parameters=left)


def sample_request(
    n: int,
    model: str | None,
    version: int | None,
    temperature: float | None,
    hard: bool | None,
    prior: str | None,
    seed: int | None,
    start: int,
    mu: npt.ArrayLike | None,
    log_var: npt.ArrayLike | None,
    logits: npt.ArrayLike | None,
    outputs: str | Sequence[str],
) -> SampleRequest:
    """Check what can be checked here; the service checks the rest. Raises ValueError, TypeError.

    The seed is settled before the first try, so that a retry asks for the same rows. It is below 2**53, so that any
    reader of JSON can hand it back.
    """
    rows, first = whole("n", n), whole("start", start)
    chosen = secrets.randbelow(2**53) if seed is None else whole("seed", seed)
    if rows < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= chosen < SEEDS:
        raise ValueError(f"seed must be 0 .. 2**64 - 1, got {seed}; leave it out for a fresh one")
    if first < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    options = {"model": model, "version": version, "temperature": temperature, "hard": hard, "prior": prior}
    parameters = {"mu": mu, "log_var": log_var, "logits": logits}
    return SampleRequest(
        n=rows,
        seed=chosen,
        start=first,
        outputs=_names(outputs),
        options={name: _OPTIONS[name](name, value) for name, value in options.items() if value is not None},
        parameters={name: _numbers(name, value) for name, value in parameters.items() if value is not None},
    )


def text(name: str, value: str) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{name} must be a string, got {value!r}")


def whole(name: str, value: SupportsIndex) -> int:
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be a whole number, got {value!r}")


def number(name: str, value: float) -> float:
    """One beyond a float's range is infinite."""
    try:
        if not isinstance(value, bool | np.bool_ | str | bytes):
            return float(value)
    except OverflowError:
        return inf
    except TypeError:
        pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def _names(outputs: str | Sequence[str]) -> tuple[str, ...]:
    names = (outputs,) if isinstance(outputs, str) or not isinstance(outputs, Iterable) else tuple(outputs)
    if not names or not all(isinstance(name, str) and name in DTYPES for name in names):
        raise ValueError(f"outputs must be some of {', '.join(DTYPES)}, got {outputs!r}")
    return names


def _flag(name: str, value: bool) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def _temperature(name: str, value: float) -> float:
    scale = number(name, value)
    if not 0 <= scale < inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return scale


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "model": text,
    "version": whole,
    "temperature": _temperature,
    "hard": _flag,
    "prior": text,
}


def _numbers(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    try:
        given = np.asarray(values)
        if given.dtype.kind == "O":  # whole numbers of more than 64 bits, and what is none
            given = np.asarray(values, np.float64)
        if given.dtype.kind not in "iuf":
            raise ValueError(f"they are {given.dtype}")
        array = given.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    if not np.isfinite(array).all():
        at = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(array)))
        raise ValueError(f"{name} must be finite, got {array[at]} at {at}")
    return array


class Server:
    """Where requests go, and what all of them carry. Raises ValueError for an address or a key that cannot be sent."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        try:
            self.url = httpx.URL(text("base_url", base_url).rstrip("/"))
            host = self.url.host
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"base_url must look like http://127.0.0.1:8000, got {base_url!r}: {error}") from error
        if self.url.scheme not in ("http", "https") or not host or set("?#") & set(base_url):
            raise ValueError(f"base_url must look like http://127.0.0.1:8000, got {base_url!r}")
        self.headers = {"User-Agent": f"reparam/{__version__}", "Accept-Encoding": "identity"}
        if api_key:
            if not (text("api_key", api_key).isascii() and api_key.isprintable() and api_key == api_key.strip()):
                raise ValueError("api_key must be printable ASCII without blanks around it; is there a line end in it?")
            self.headers["Authorization"] = f"Bearer {api_key}"

    def sample(self, request: SampleRequest, media_type: str, left: Left) -> httpx.Request:
        return self._request("POST", "/sample", media_type, left, request.content())

    def models(self, left: Left) -> httpx.Request:
        return self._request("GET", "/models", "application/json", left)

    def model(self, name: str, version: int | None, left: Left) -> httpx.Request:
        path = f"/models/{quote(name, safe='')}" + ("" if version is None else f"/versions/{version}")
        return self._request("GET", path, "application/json", left)

    def _request(self, method: str, path: str, accept: str, left: Left, content: bytes | None = None) -> httpx.Request:
        headers = {**self.headers, "Accept": accept}
        if content is not None:
            headers["Content-Type"] = "application/json"
        timeouts = Timeouts(left)
        seconds = timeouts["read"]
        if seconds is not None:  # the service drops a request that nobody waits for any more
            headers["Request-Timeout"] = f"{seconds:.3f}"
        url = f"{self.url}{path}"
        return httpx.Request(method, url, headers=headers, content=content, extensions={"timeout": timeouts})


class Timeouts(Mapping[str, float | None]):
    """httpx's timeouts of one request: each is what is left when it is asked for, so together they keep a deadline."""

    def __init__(self, left: Left) -> None:
        self.left = left

    def __getitem__(self, phase: str) -> float | None:
        seconds = self.left()
        return None if seconds is None else max(seconds, 1e-3)  # a socket takes 0 for "do not wait at all"

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "write", "read", "pool"))

    def __len__(self) -> int:
        return 4
