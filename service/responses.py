"""Answers to `POST /sample`, one media type each."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mimeparse
import numpy as np
import numpy.typing as npt
import orjson

from service.artifact import Arrays
from service.errors import NotAcceptable
from service.noise import NOISE_VERSION
from service.pictures import png, sheet
from service.requests import Output
from service.rows import Rows

JSON, PNG, NPY, NPZ = "application/json", "image/png", "application/x-npy", "application/x-npz"


@dataclass(frozen=True)
class Answer:
    """Rows, and the outputs of them that were asked for."""

    rows: Rows
    outputs: Sequence[Output]

    def select(self, arrays: Arrays) -> Arrays:
        """From the graph's outputs to those of the answer: images are uint8 pixels, indices int32."""
        return {name: _SELECT[name](arrays) for name in self.outputs}

    def headers(self) -> dict[str, str]:
        model = self.rows.model
        return {
            "Model-Name": model.name,
            "Model-Version": str(model.version),
            "Sample-Seed": str(self.rows.seed),
            "Sample-Start": str(self.rows.start),
            "Noise-Version": str(NOISE_VERSION),
        }


_SELECT: dict[str, Callable[[Arrays], npt.NDArray[np.generic]]] = {
    "images": lambda arrays: arrays["pixels"],
    "latents": lambda arrays: arrays["latents"],
    "codes": lambda arrays: arrays["codes"],
    "indices": lambda arrays: arrays["codes"].argmax(-1).astype(np.int32),
}


def negotiate(accept: str | None, outputs: Sequence[Output]) -> str:
    """The media type to answer with; JSON where the client does not care. Raises NotAcceptable."""
    able = [media_type for media_type, can_carry in _CARRIES.items() if can_carry(outputs)]
    best = _best(able, accept)
    if best:
        return best
    if _best(list(_CARRIES), accept):
        raise NotAcceptable(
            f"{accept!r} cannot carry {', '.join(outputs)}; {', '.join(able)} can: image/png carries images alone, "
            f"{NPY} one output",
            available=able,
        )
    raise NotAcceptable(f"cannot send {accept!r}; can send {', '.join(able)}", available=able)


_CARRIES: dict[str, Callable[[Sequence[Output]], bool]] = {
    JSON: lambda _: True,
    PNG: lambda outputs: list(outputs) == ["images"],
    NPY: lambda outputs: len(outputs) == 1,
    NPZ: lambda _: True,
}


def _best(media_types: Sequence[str], accept: str | None) -> str:
    """The one that the client likes best; of equally good ones the first, and none is ""."""
    try:
        return str(mimeparse.best_match(media_types[::-1], (accept or "*/*").lower()))
    except mimeparse.MimeTypeParseException:
        return ""


def npy_header(answer: Answer, piece: npt.NDArray[np.generic]) -> bytes:
    """The header of the .npy file that `piece`, the first rows of the answer, begins."""
    buffer = io.BytesIO()
    shape = (answer.rows.n, *piece.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(piece.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _json(answer: Answer, arrays: Arrays) -> bytes:
    rows, model = answer.rows, answer.rows.model
    about = {
        "model": model.name,
        "version": model.version,
        "seed": rows.seed,
        "start": rows.start,
        "n": rows.n,
        "temperature": rows.temperature,
        "hard": rows.hard,
        "noise_version": NOISE_VERSION,
    }
    values = {
        name: [base64.b64encode(png(image)).decode() for image in array]
        if name == "images"
        else np.ascontiguousarray(array)
        for name, array in arrays.items()
    }
    return orjson.dumps({**about, **values}, option=orjson.OPT_SERIALIZE_NUMPY)


def _png(_: Answer, arrays: Arrays) -> bytes:
    return png(sheet(arrays["images"]))


def _npy(answer: Answer, arrays: Arrays) -> bytes:
    (array,) = arrays.values()
    return npy_header(answer, array) + array.tobytes()


def _npz(_: Answer, arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


ENCODERS: dict[str, Callable[[Answer, Arrays], bytes]] = {JSON: _json, PNG: _png, NPY: _npy, NPZ: _npz}
