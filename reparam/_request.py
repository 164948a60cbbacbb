"""Requests: pure functions from arguments to HTTP requests."""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np

from reparam import _checks as check
from reparam._http import httpx
from reparam._options import checked, latent_dims, of_rows
from reparam._samples import DTYPES
from reparam._version import __version__

JSON = "application/json"

Remaining = Callable[[], float | None]  # seconds until the deadline; None: there is no deadline


@dataclass(frozen=True)
class SampleRequest:
    """Rows start .. start + n - 1 of a seed, and how to draw them.

    n: number of rows.
    outputs: names of the arrays to return.
    options: options that were given, checked. Seed and start are always among them.
    latent_dims: number of dimensions of one latent; parameters with more dimensions have a row each.
    """

    n: int
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    latent_dims: int

    def content(self) -> bytes:
        """Returns: the body of POST /sample. The body names only what was given; the service knows the defaults."""
        fields = {"n": self.n, "outputs": self.outputs, **self.options}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        return json.dumps(plain, separators=(",", ":")).encode()

    def pinned(self, model: str, version: int) -> "SampleRequest":
        """Returns: the same rows of one version, even if another version becomes the latest."""
        return replace(self, options={**self.options, "model": model, "version": version})

    def after(self, rows: int) -> "SampleRequest":
        """Returns: the request for the rows that are missing when the first `rows` rows have arrived."""
        options = of_rows(self.options, slice(rows, None), self.latent_dims)
        return replace(self, n=self.n - rows, options={**options, "start": options["start"] + rows})


def sample_request(
    n: int, outputs: str | Sequence[str], options: Mapping[str, Any], others: tuple[str, ...] = ("n", "outputs")
) -> SampleRequest:
    """Check what can be checked without the service.

    others: names of the arguments beside the options, for messages.

    Raises: ValueError, TypeError.
    """
    rows = check.count("n", n)
    # The client draws the seed, so that a retry gives the same rows. Every reader of JSON keeps integers of 53 bits.
    given = {"seed": secrets.randbelow(2**53), "start": 0, **checked(options, others)}
    return SampleRequest(rows, _names(outputs), given, latent_dims(rows, given))


def _names(outputs: str | Sequence[str]) -> tuple[str, ...]:
    names = (outputs,) if isinstance(outputs, str) or not isinstance(outputs, Iterable) else tuple(outputs)
    if not names or not all(isinstance(name, str) and name in DTYPES for name in names):
        raise ValueError(f"outputs must be some of {', '.join(DTYPES)}, got {outputs!r}")
    return names


class Server:
    """Address of the service and the headers of every request.

    Raises: ValueError for an address or a key that cannot be sent.
    """

    def __init__(self, base_url: str, api_key: str | None) -> None:
        try:
            self.url = httpx.URL(check.string("base_url", base_url).rstrip("/"))
            host = self.url.host
            self.url.raw_host.decode("ascii").encode("idna")  # sockets do, and raise no error of the HTTP library
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"base_url must look like http://127.0.0.1:8000, got {base_url!r}: {error}") from error
        if self.url.scheme not in ("http", "https") or not host or set("?#") & set(base_url):
            raise ValueError(f"base_url must look like http://127.0.0.1:8000, got {base_url!r}")
        self.headers = {"User-Agent": f"reparam/{__version__}", "Accept-Encoding": "identity"}
        if api_key:
            key = check.string("api_key", api_key)
            if not (key.isascii() and key.isprintable() and key == key.strip()):
                raise ValueError("api_key must be printable ASCII without blanks around it; is there a line end in it?")
            self.headers["Authorization"] = f"Bearer {key}"

    def sample(self, request: SampleRequest, media_type: str, remaining: Remaining) -> httpx.Request:
        return self._request("POST", "/sample", media_type, remaining, request.content())

    def models(self, remaining: Remaining) -> httpx.Request:
        return self._request("GET", "/models", JSON, remaining)

    def model(self, name: str, version: int | None, remaining: Remaining) -> httpx.Request:
        path = f"/models/{quote(name, safe='')}" + ("" if version is None else f"/versions/{version}")
        return self._request("GET", path, JSON, remaining)

    def _request(
        self, method: str, path: str, accept: str, remaining: Remaining, content: bytes | None = None
    ) -> httpx.Request:
        headers = {**self.headers, "Accept": accept}
        if content is not None:
            headers["Content-Type"] = JSON
        timeouts = Timeouts(remaining)
        seconds = timeouts["read"]
        if seconds is not None:  # the service drops a request whose time has run out
            headers["Request-Timeout"] = f"{seconds:.3f}"
        url = f"{self.url}{path}"
        return httpx.Request(method, url, headers=headers, content=content, extensions={"timeout": timeouts})


class Timeouts(Mapping[str, float | None]):
    """Timeouts of one request, in the form of httpx. Each is the time that remains when it is read, so that all phases
    together keep one deadline."""

    def __init__(self, remaining: Remaining) -> None:
        self.remaining = remaining

    def __getitem__(self, phase: str) -> float | None:
        seconds = self.remaining()
        return None if seconds is None else max(seconds, 1e-3)  # 0 means "do not wait at all" to a socket

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "write", "read", "pool"))

    def __len__(self) -> int:
        return 4
