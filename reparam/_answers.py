"""What comes back: pure functions from HTTP answers to values."""

import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import httpx
import numpy as np
from numpy.lib import format as npy

from reparam._errors import media_type_of, status_error, unexpected_answer
from reparam._model import Model
from reparam._request import SampleRequest
from reparam._samples import DTYPES, Array, Samples

NPY = "application/x-npy"
NPZ = "application/x-npz"
JSON = "application/json"
BATCH_BYTES = 2**20  # of a batch of a stream, or one row where that is larger
# What json, zipfile and NumPy raise for bytes that are not theirs.
UNREADABLE = (BadZipFile, EOFError, KeyError, RuntimeError, TokenError, TypeError, ValueError, zlib.error)


def check(response: httpx.Response, body: bytes | bytearray, media_type: str) -> None:
    """Raises StatusError where the answer is an error, or of another type than was asked for."""
    if not response.is_success:
        raise status_error(response, body)
    if not usable(response, media_type):
        raise unexpected_answer(response, f"answered with {media_type_of(response)}, not with {media_type}")


def usable(response: httpx.Response, media_type: str) -> bool:
    """It is no error, and of the type that was asked for."""
    return response.is_success and media_type_of(response) == media_type


def read_npy(response: httpx.Response, body: bytearray, request: SampleRequest) -> Samples:
    with _readable(response):
        [name] = request.outputs
        header = _npy_header(body, name, request.n)
        if header is None:
            raise ValueError("its array broke off")
        row_shape, offset = header
        array = np.frombuffer(body, DTYPES[name], offset=offset).reshape(request.n, *row_shape)
        return _samples(response, {name: array})


def read_npz(response: httpx.Response, body: bytearray, request: SampleRequest) -> Samples:
    with _readable(response), np.load(io.BytesIO(body)) as archive:
        arrays = {name: archive[name] for name in request.outputs}
        for name, array in arrays.items():
            _check_array(name, array.dtype, array.shape, request.n)
        return _samples(response, arrays)


def read_models(response: httpx.Response, body: bytearray) -> list[Model]:
    """The default model first, the others by name."""
    with _readable(response):
        listed = json.loads(body)
        models = [Model.from_json(described) for described in listed["models"]]
        return sorted(models, key=lambda model: (model.name != listed["default"], model.name))


def read_model(response: httpx.Response, body: bytearray) -> Model:
    with _readable(response):
        return Model.from_json(json.loads(body))


class RowReader:
    """Makes batches of the rows of an npy answer while its bytes come in. It holds one batch and one chunk at most."""

    response: httpx.Response  # set when it is there; before, there are no bytes

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.received = 0  # rows handed out
        [self._name] = request.outputs
        self._buffer = bytearray()
        self._row_shape: tuple[int, ...] = ()
        self._row_bytes = 0  # 0: the header is still to come

    @property
    def missing(self) -> int:
        return self.request.n - self.received

    def pinned(self) -> SampleRequest:
        """The request for the version that answered, whatever becomes the latest meanwhile."""
        headers = self.response.headers
        return self.request.of(headers["Model-Name"], int(headers["Model-Version"]))

    def feed(self, chunk: bytes) -> list[Samples]:
        """Take the next bytes in, b"" for the end of them. Returns the batch that they complete, if they do."""
        self._buffer += chunk
        if not self._buffer:
            return []
        with _readable(self.response):
            if not self._row_bytes and not self._read_header():
                return []
            whole = len(self._buffer) // self._row_bytes
            if not whole or (chunk and len(self._buffer) < BATCH_BYTES):
                return []
            return [self._take(whole)]

    def _read_header(self) -> bool:
        header = _npy_header(self._buffer, self._name, self.request.n)
        if header is None:
            return False
        self._row_shape, offset = header
        self._row_bytes = DTYPES[self._name].itemsize * prod(self._row_shape)
        del self._buffer[:offset]
        return True

    def _take(self, whole: int) -> Samples:
        """The next rows. The buffer becomes their memory; the part of a row behind them moves to a new one."""
        if whole > self.missing:
            raise ValueError("more rows than the header says")
        end = whole * self._row_bytes
        rows, self._buffer = self._buffer, self._buffer[end:]
        array = np.frombuffer(rows, DTYPES[self._name], whole * prod(self._row_shape)).reshape(whole, *self._row_shape)
        samples = _samples(self.response, {self._name: array}, self.received)
        self.received += whole
        return samples


def _npy_header(data: bytearray, name: str, n: int) -> tuple[tuple[int, ...], int] | None:
    """Shape of a row and offset of the first; None until the header is whole. Raises ValueError for another array."""
    begin = 10  # magic string, version of the format, length of the rest
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


def _samples(response: httpx.Response, arrays: Mapping[str, Array], after: int = 0) -> Samples:
    headers = response.headers
    return Samples(
        **arrays,
        model=headers["Model-Name"],
        version=int(headers["Model-Version"]),
        seed=int(headers["Sample-Seed"]),
        start=int(headers["Sample-Start"]) + after,
        noise_version=int(headers["Noise-Version"]),
    )


@contextmanager
def _readable(response: httpx.Response) -> Iterator[None]:
    """Where reading an answer fails, say so as StatusError."""
    try:
        yield
    except UNREADABLE as error:
        what = f"answered with something that cannot be read: {type(error).__name__}: {error}"
        raise unexpected_answer(response, what) from error
