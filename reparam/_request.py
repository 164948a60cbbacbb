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

Remaining = Callable[[], float | None]  # returns the seconds until the deadline; None for no deadline


@dataclass(frozen=True)
class SampleRequest:
    """A request for rows start .. start + n - 1 of a seed.

    n: number of rows.
    outputs: names of the arrays to return.
    options: checked options, always with seed and start.
    latent_dims: number of dimensions of one latent; parameters with more dimensions have a row each. 0 without
        parameters.
    """

    n: int
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    latent_dims: int

    def content(self) -> bytes:
        """Make the body of POST /sample, without default values. The service fills the defaults in."""
        fields = {"n": self.n, "outputs": self.outputs, **self.options}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        return json.dumps(plain, separators=(",", ":")).encode()

    def pinned(self, model: str, version: int) -> "SampleRequest":
        """Make the request for the same rows of a fixed version, even if another version becomes the latest."""
        return replace(self, options={**self.options, "model": model, "version": version})

    def after(self, rows: int) -> "SampleRequest":
        """Make the request for the remaining rows, after the first `rows` rows have arrived."""
        options = of_rows(self.options, slice(rows, None), self.latent_dims)
        return replace(self, n=self.n - rows, options={**options, "start": options["start"] + rows})


def sample_request(
    n: int, outputs: str | Sequence[str], options: Mapping[str, Any], others: tuple[str, ...] = ("n", "outputs")
) -> SampleRequest:
    """Check the arguments of a call as far as possible without the service, and make the request.

    n: number of rows.
    outputs: name of one output, or names.
    options: options of the call; without a seed, the client draws a seed.
    others: names of the arguments besides the options, for messages.

    Raises: ValueError for a wrong value, TypeError for a wrong type or an unknown option.
    """
    rows = check.count("n", n)
    # The client draws the seed, so that a retry gives the same rows. Every JSON reader keeps integers of 53 bits exact.
    given = {"seed": secrets.randbelow(2**53), "start": 0, **checked(options, others)}
    return SampleRequest(rows, _names(outputs), given, latent_dims(rows, given))


def _names(outputs: str | Sequence[str]) -> tuple[str, ...]:
    names = (outputs,) if isinstance(outputs, str) or not isinstance(outputs, Iterable) else tuple(outputs)
    if not names or not all(isinstance(name, str) and name in DTYPES for name in names):
        raise ValueError(f"outputs must be some of {', '.join(DTYPES)}, got {outputs!r}")
    return names


class Server:
    """Makes the HTTP requests to a service. `remaining` is a function that returns the seconds until the deadline.

    base_url: address of the service.
    api_key: key of the service; None for no key.
    url: the parsed address.
    headers: headers of every request.

    Raises: ValueError, TypeError for an impossible address or key.
    """

    def __init__(self, base_url: str, api_key: str | None) -> None:
        try:
            self.url = httpx.URL(check.string("base_url", base_url).rstrip("/"))
            host = self.url.host
            self.url.raw_host.decode("ascii").encode("idna")  # sockets encode so too, but would fail with UnicodeError
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
        """Make POST /sample. `media_type` is the media type of the response."""
        return self._request("POST", "/sample", media_type, remaining, request.content())

    def models(self, remaining: Remaining) -> httpx.Request:
        """Make GET /models."""
        return self._request("GET", "/models", JSON, remaining)

    def model(self, name: str, version: int | None, remaining: Remaining) -> httpx.Request:
        """Make GET /models/<name>, or GET /models/<name>/versions/<version>."""
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
        if seconds is not None:  # so that the service stops computing when the client stops waiting
            headers["Request-Timeout"] = f"{seconds:.3f}"
        url = f"{self.url}{path}"
        return httpx.Request(method, url, headers=headers, content=content, extensions={"timeout": timeouts})


class Timeouts(Mapping[str, float | None]):
    """Timeouts of one request, in the form of httpx: phase to seconds.

    Each look-up returns the remaining time, so all phases together keep one deadline.

    remaining: returns the seconds until the deadline; None for no deadline.
    """

    def __init__(self, remaining: Remaining) -> None:
        self.remaining = remaining

    def __getitem__(self, phase: str) -> float | None:
        seconds = self.remaining()
        return None if seconds is None else max(seconds, 1e-3)  # 0 means "do not wait at all" to a socket

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "write", "read", "pool"))

    def __len__(self) -> int:
        return 4
