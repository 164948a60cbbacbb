"""Encoders: bodies of responses, a media type each, and headers of responses."""

import base64
import io
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import mimeparse
import numpy as np
import orjson

from reparam.service.artifact.contract import Arrays
from reparam.service.artifact.outputs import Output
from reparam.service.errors import NotAcceptable, clipped
from reparam.service.operations.operation import FACTS, Operation
from reparam.service.pictures import png, sheet
from reparam.service.runtime.graphs import Work

MAX_ACCEPT = 1000  # bytes; longer `Accept` headers are refused
MEDIA_TYPES = JSON, PNG, NPY, NPZ = "application/json", "image/png", "application/x-npy", "application/x-npz"


@lru_cache(256)
def negotiate(header: bytes, outputs: tuple[Output, ...]) -> str:
    """Choose the media type of a response.

    header: the header `Accept`, at most MAX_ACCEPT bytes. Without a preference JSON is chosen.
    outputs: arrays of the response.

    Raises: NotAcceptable.
    """
    if len(header) > MAX_ACCEPT:
        raise NotAcceptable(
            f"`Accept` has {len(header)} bytes, at most {MAX_ACCEPT} are read: name one of {', '.join(MEDIA_TYPES)}",
            available=list(MEDIA_TYPES),
        )
    accept = header.decode("latin-1")
    able = [media_type for media_type, can_carry in _CARRIES.items() if can_carry(outputs)]
    best = _best(able, accept)
    if best:
        return best
    if _best(list(_CARRIES), accept):
        names = ", ".join(output.name for output in outputs)
        raise NotAcceptable(
            f"{clipped(accept)!r} cannot carry {names}; {', '.join(able)} can: {PNG} carries images alone, {NPY} one "
            "output",
            available=able,
        )
    raise NotAcceptable(f"cannot send {clipped(accept)!r}; can send {', '.join(able)}", available=able)


_CARRIES: dict[str, Callable[[Sequence[Output]], bool]] = {
    JSON: lambda _: True,
    PNG: lambda outputs: len(outputs) == 1 and outputs[0].is_picture,
    NPY: lambda outputs: len(outputs) == 1,
    NPZ: lambda _: True,
}


def _best(media_types: Sequence[str], accept: str) -> str:
    """Choose the media type preferred by `Accept`, the first in the list on a tie; "" if no media type matches."""
    try:
        return str(mimeparse.best_match(media_types[::-1], (accept or "*/*").lower()))
    except mimeparse.MimeTypeParseException:
        return ""


_FORMATS = {int: b"%d", float: b"%a", bool: b"%a"}  # formats of facts in headers, by type


class HeaderBlock:
    """Writes the headers of an operation's responses as lines.

    The lines of a model version and media type are cached. A template writes the remaining lines.

    operation: the operation, for the names of the facts.
    """

    def __init__(self, operation: Operation) -> None:
        facts = [FACTS[name] for name in operation.facts if FACTS[name].header is not None]
        varying = [fact for fact in facts if not fact.per_model]
        self._names = [fact.name for fact in varying]
        self._template = b"content-length: %d\r\nserver-timing: queue;dur=%.3f, infer;dur=%.3f, encode;dur=%.3f\r\n"
        for fact in varying:
            self._template += b"%b: %b\r\n" % (str(fact.header).lower().encode(), _FORMATS[fact.type])
        self._template += b"%b"
        self._of_model = [fact for fact in facts if fact.per_model]
        self._lines_of_model: dict[tuple[tuple[str, str], str], bytes] = {}

    def write(self, work: Work, media_type: str, size: int, queue: float, infer: float, encode: float) -> bytes:
        """Write Content-Length, Content-Type, Server-Timing and the facts of the rows.

        work: the rows of the response.
        media_type: media type of the response.
        size: bytes of the body.
        queue, infer, encode: seconds in each stage.

        Returns: the lines, names in lower case, each line with a line end.
        """
        facts = work.facts()
        lines = self._lines_of_model.get((work.graph.labels, media_type))
        if lines is None:
            headers = [("content-type", media_type), *((str(fact.header), facts[fact.name]) for fact in self._of_model)]
            lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in headers).encode()
            self._lines_of_model[work.graph.labels, media_type] = lines
        times = 1e3 * queue, 1e3 * infer, 1e3 * encode
        return self._template % (size, *times, *map(facts.__getitem__, self._names), lines)


def npy_header(work: Work, piece: Arrays) -> tuple[bytes, int]:
    """Make the header of a .npy file for all rows of a work.

    piece: the first result, for dtype and row shape; one array (rows, ...).

    Returns: the header, and the size of the whole file in bytes.
    """
    (array,) = piece.values()
    return _npy_header(work.n, array.shape[1:], array.dtype)


@lru_cache(256)
def _npy_header(n: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[bytes, int]:
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n, *shape)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue(), len(buffer.getvalue()) + n * dtype.itemsize * prod(shape)


def buffers(pieces: Sequence[Arrays]) -> list[memoryview]:
    """List the bytes of results with one output, in the order of a .npy file, without a copy.

    pieces: results in order of rows, one array (rows, ...) each.
    """
    return [array.reshape(-1).view(np.uint8).data for piece in pieces for array in piece.values()]


def encode(work: Work, media_type: str, pieces: Sequence[Arrays]) -> tuple[bytes, float]:
    """Encode the body of a response.

    work: the rows of the response.
    media_type: an entry of MEDIA_TYPES that can carry the outputs.
    pieces: results of all rows in order, each by output name, (rows, ...).

    Returns: the body, and the time of encoding in seconds.
    """
    started = time.perf_counter()
    body = _ENCODERS[media_type](work, pieces)
    return body, time.perf_counter() - started


def _json(work: Work, pieces: Sequence[Arrays]) -> bytes:
    arrays = _joined(pieces)
    values = {
        output.name: [base64.b64encode(png(image)).decode() for image in arrays[output.name]]
        if output.is_picture
        else arrays[output.name]
        for output in work.outputs
    }
    return orjson.dumps({**work.facts(), **values}, option=orjson.OPT_SERIALIZE_NUMPY)


def _npy(work: Work, pieces: Sequence[Arrays]) -> bytes:
    header, _ = npy_header(work, pieces[0])
    return b"".join([header, *[array.data for piece in pieces for array in piece.values()]])


def _png(_: Work, pieces: Sequence[Arrays]) -> bytes:
    (images,) = _joined(pieces).values()
    return png(sheet(images))


def _npz(_: Work, pieces: Sequence[Arrays]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **_joined(pieces))
    return buffer.getvalue()


def _joined(pieces: Sequence[Arrays]) -> Arrays:
    first, *others = pieces
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in first} if others else first


_ENCODERS: dict[str, Callable[[Work, Sequence[Arrays]], bytes]] = {
    JSON: _json,
    PNG: _png,
    NPY: _npy,
    NPZ: _npz,
}
