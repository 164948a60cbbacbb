"""Answers to `POST /sample`, one media type each."""

import base64
import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import mimeparse
import numpy as np
import orjson

from reparam.service.artifact.contract import Arrays, Output
from reparam.service.artifact.noise import NOISE_VERSION
from reparam.service.errors import NotAcceptable, clipped
from reparam.service.pictures import png, sheet
from reparam.service.runtime.repository import Model
from reparam.service.runtime.sampler import Rows

MOST_ACCEPT = 1000  # bytes of the header that are read
MEDIA_TYPES = JSON, PNG, NPY, NPZ = "application/json", "image/png", "application/x-npy", "application/x-npz"


def negotiate(accept: bytes, outputs: tuple[Output, ...]) -> str:
    """The media type that the header `Accept` likes best; JSON where it does not care. Raises NotAcceptable."""
    if len(accept) > MOST_ACCEPT:
        raise NotAcceptable(
            f"`Accept` has {len(accept)} bytes, at most {MOST_ACCEPT} are read: name one of {', '.join(MEDIA_TYPES)}",
            available=list(MEDIA_TYPES),
        )
    return _negotiate(accept.decode("latin-1"), outputs)


@lru_cache(256)
def _negotiate(accept: str, outputs: tuple[Output, ...]) -> str:
    able = [media_type for media_type, can_carry in _CARRIES.items() if can_carry(outputs)]
    best = _best(able, accept)
    if best:
        return best
    if _best(list(_CARRIES), accept):
        raise NotAcceptable(
            f"{clipped(accept)!r} cannot carry {', '.join(outputs)}; {', '.join(able)} can: {PNG} carries images "
            f"alone, {NPY} one output",
            available=able,
        )
    raise NotAcceptable(f"cannot send {clipped(accept)!r}; can send {', '.join(able)}", available=able)


_CARRIES: dict[str, Callable[[Sequence[Output]], bool]] = {
    JSON: lambda _: True,
    PNG: lambda outputs: list(outputs) == ["images"],
    NPY: lambda outputs: len(outputs) == 1,
    NPZ: lambda _: True,
}


def _best(media_types: Sequence[str], accept: str) -> str:
    """The one that the client likes best; of equally good ones the first, and none is ""."""
    try:
        return str(mimeparse.best_match(media_types[::-1], (accept or "*/*").lower()))
    except mimeparse.MimeTypeParseException:
        return ""


def head(rows: Rows, media_type: str, size: int, queue: float, infer: float, encode: float) -> bytes:
    """The lines of an answer's head: what it is, how to get it again, and how long that took.

    size: bytes of the body. queue, infer, encode: seconds.
    """
    return (
        b"content-length: %d\r\nserver-timing: queue;dur=%.3f, infer;dur=%.3f, encode;dur=%.3f\r\n"
        b"sample-seed: %d\r\nsample-start: %d\r\n%b"
        % (size, 1e3 * queue, 1e3 * infer, 1e3 * encode, rows.seed, rows.start, _head(rows.model, media_type))
    )


@lru_cache(1024)
def _head(model: Model, media_type: str) -> bytes:
    return (
        f"content-type: {media_type}\r\nmodel-name: {model.name}\r\nmodel-version: {model.version}\r\n"
        f"noise-version: {NOISE_VERSION}\r\n"
    ).encode()


def npy_header(rows: Rows, piece: Arrays) -> tuple[bytes, int]:
    """The header of the .npy file that `piece`, the first of the rows, begins, and the bytes of the whole file."""
    (array,) = piece.values()
    return _npy_header(rows.n, array.shape[1:], array.dtype)


@lru_cache(256)
def _npy_header(n: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[bytes, int]:
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n, *shape)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue(), len(buffer.getvalue()) + n * dtype.itemsize * prod(shape)


def buffers(pieces: Sequence[Arrays]) -> list[memoryview]:
    """Pieces of one output as the file has them, not copied."""
    return [array.reshape(-1).view(np.uint8).data for piece in pieces for array in piece.values()]


def _json(rows: Rows, pieces: Sequence[Arrays]) -> bytes:
    about = {
        "model": rows.model.name,
        "version": rows.model.version,
        "seed": rows.seed,
        "start": rows.start,
        "n": rows.n,
        "temperature": rows.temperature,
        "hard": rows.hard,
        "prior": rows.prior,
        "noise_version": NOISE_VERSION,
    }
    values = {
        name: [base64.b64encode(png(image)).decode() for image in array] if name == "images" else array
        for name, array in _joined(pieces).items()
    }
    return orjson.dumps({**about, **values}, option=orjson.OPT_SERIALIZE_NUMPY)


def _npy(rows: Rows, pieces: Sequence[Arrays]) -> bytes:
    return b"".join([npy_header(rows, pieces[0])[0], *(array.data for piece in pieces for array in piece.values())])


def _png(_: Rows, pieces: Sequence[Arrays]) -> bytes:
    return png(sheet(_joined(pieces)["images"]))


def _npz(_: Rows, pieces: Sequence[Arrays]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **_joined(pieces))
    return buffer.getvalue()


def _joined(pieces: Sequence[Arrays]) -> Arrays:
    first, *others = pieces
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in first} if others else first


ENCODERS: dict[str, Callable[[Rows, Sequence[Arrays]], bytes]] = {
    JSON: _json,
    PNG: _png,
    NPY: _npy,
    NPZ: _npz,
}
