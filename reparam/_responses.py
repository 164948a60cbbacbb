"""Responses: pure functions from HTTP responses to values."""

import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.lib import format as npy

from reparam._errors import media_type_of, status_error, unexpected_response
from reparam._http import httpx
from reparam._model import Model
from reparam._options import of_rows
from reparam._request import SampleRequest
from reparam._samples import DTYPES, ORIGIN, Array, Samples

NPY = "application/x-npy"
NPZ = "application/x-npz"
BATCH_BYTES = 2**20  # approximate size of a stream's batches; a larger row makes a batch alone
# Errors of json, zipfile and NumPy for bytes of another format.
UNREADABLE = (BadZipFile, EOFError, KeyError, RuntimeError, TokenError, TypeError, ValueError, zlib.error)


def check(response: httpx.Response, body: bytes | bytearray, media_type: str) -> None:
    """Check status and media type of a response.

    body: the whole body, for the error.
    media_type: media type that the response must have.

    Raises: StatusError.
    """
    if not response.is_success:
        raise status_error(response, body)
    if not usable(response, media_type):
        raise unexpected_response(response, f"answered with {media_type_of(response)}, not with {media_type}")


def usable(response: httpx.Response, media_type: str) -> bool:
    """Return True if a response has a status 2xx and this media type."""
    return response.is_success and media_type_of(response) == media_type


def read_npy(response: httpx.Response, body: bytearray, request: SampleRequest) -> Samples:
    """Read the samples from an npy response. The body becomes the memory of the array. Raises: StatusError."""
    with _readable(response):
        [name] = request.outputs
        header = _npy_header(body, name, request.n)
        if header is None:
            raise ValueError("its array broke off")
        row_shape, offset = header
        array = np.frombuffer(body, DTYPES[name], offset=offset).reshape(request.n, *row_shape)
        return _samples(response, {name: array}, request)


def read_npz(response: httpx.Response, body: bytearray, request: SampleRequest) -> Samples:
    """Read the samples from an npz response. Raises: StatusError."""
    with _readable(response), np.load(io.BytesIO(body)) as archive:
        arrays = {name: archive[name] for name in request.outputs}
        for name, array in arrays.items():
            _check_array(name, array.dtype, array.shape, request.n)
        return _samples(response, arrays, request)


def read_models(response: httpx.Response, body: bytearray) -> list[Model]:
    """Read the response of /models.

    Returns: the default model, then the other models by name.

    Raises: StatusError.
    """
    with _readable(response):
        listed = json.loads(body)
        models = [Model.from_json(described) for described in listed["models"]]
        return sorted(models, key=lambda model: (model.name != listed["default"], model.name))


def read_model(response: httpx.Response, body: bytearray) -> Model:
    """Read the response of /models/<name>. Raises: StatusError."""
    with _readable(response):
        return Model.from_json(json.loads(body))


class RowReader:
    """Cuts the rows of an npy response into batches while bytes arrive. Buffers at most one batch and one chunk.

    request: the request for the rows.
    received: number of rows returned so far.
    response: the response; the caller sets it before the first `feed`.
    """

    response: httpx.Response

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.received = 0
        [self._name] = request.outputs
        self._buffer = bytearray()
        self._row_shape: tuple[int, ...] = ()
        self._row_bytes = 0  # 0 until the header has arrived

    @property
    def missing(self) -> int:
        """Number of rows not yet returned."""
        return self.request.n - self.received

    def pinned(self) -> SampleRequest:
        """Make the request for the version of this response, so that all rows come from one version."""
        headers = self.response.headers
        return self.request.pinned(headers["Model-Name"], int(headers["Model-Version"]))

    def feed(self, chunk: bytes) -> list[Samples]:
        """Add bytes of the body.

        chunk: the next bytes; b"" at the end of the body.

        Returns: a list with the batch completed by these bytes, or an empty list.

        Raises: StatusError for bytes that are not the requested array.
        """
        self._buffer += chunk
        if not self._buffer:
            return []
        with _readable(self.response):
            if not self._row_bytes and not self._read_header():
                return []
            rows = len(self._buffer) // self._row_bytes
            if not rows or (chunk and len(self._buffer) < BATCH_BYTES):
                return []
            return [self._take(rows)]

    def _read_header(self) -> bool:
        header = _npy_header(self._buffer, self._name, self.request.n)
        if header is None:
            return False
        self._row_shape, offset = header
        self._row_bytes = DTYPES[self._name].itemsize * prod(self._row_shape)
        del self._buffer[:offset]
        return True

    def _take(self, rows: int) -> Samples:
        """Return the next rows. The buffer becomes the memory of the rows; an incomplete row moves to a new buffer.

        Raises: ValueError for more rows than requested.
        """
        if rows > self.missing:
            raise ValueError("more rows than the header says")
        end = rows * self._row_bytes
        data, self._buffer = self._buffer, self._buffer[end:]
        array = np.frombuffer(data, DTYPES[self._name], rows * prod(self._row_shape)).reshape(rows, *self._row_shape)
        samples = _samples(self.response, {self._name: array}, self.request, self.received)
        self.received += rows
        return samples


def _npy_header(data: bytearray, name: str, n: int) -> tuple[tuple[int, ...], int] | None:
    """Read the header of an npy file (NEP 1).

    Returns: the shape of a row and the offset of the first row; None until the header has arrived.

    Raises: ValueError for an array other than n rows of this output.
    """
    begin = 10  # magic string, version of the format, length of the header
    offset = begin + int.from_bytes(data[8:begin], "little")
    if len(data) < begin or len(data) < offset:
        return None
    header = io.BytesIO(data[:offset])
    if npy.read_magic(header) != (1, 0):
        raise ValueError("not version 1.0 of the npy format")
    shape, fortran_order, dtype = npy.read_array_header_1_0(header)
    if fortran_order:
        raise ValueError("rows are not contiguous (fortran_order)")
    _check_array(name, dtype, shape, n)
    return shape[1:], offset


def _check_array(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], n: int) -> None:
    if dtype != DTYPES[name] or shape[:1] != (n,) or 0 in shape:
        raise ValueError(f"{name} are {dtype}{shape}, not {n} rows of {DTYPES[name]}")


def _samples(response: httpx.Response, arrays: Mapping[str, Array], request: SampleRequest, first: int = 0) -> Samples:
    """Make the Samples of a response from arrays and headers.

    arrays: output arrays by name, (rows, ...).
    first: position of the first row in the request.
    """
    headers = response.headers
    n = len(next(iter(arrays.values())))
    # Arrays of latents give the exact number of dimensions of a latent.
    known = [array.ndim - 1 for name, array in arrays.items() if name in ("latents", "codes")]
    latent_dims = known[0] if known else request.latent_dims
    options = {name: value for name, value in request.options.items() if name not in ORIGIN}
    return Samples(
        **arrays,
        model=headers["Model-Name"],
        version=int(headers["Model-Version"]),
        seed=int(headers["Sample-Seed"]),
        start=int(headers["Sample-Start"]) + first,
        noise_version=int(headers["Noise-Version"]),
        options=of_rows(options, slice(first, first + n), latent_dims),
        _latent_dims=latent_dims,
    )


@contextmanager
def _readable(response: httpx.Response) -> Iterator[None]:
    """Turn errors of parsing a response into StatusError.

    Raises: StatusError instead of an error in UNREADABLE.
    """
    try:
        yield
    except UNREADABLE as error:
        problem = f"answered with something that cannot be read: {type(error).__name__}: {error}"
        raise unexpected_response(response, problem) from error
