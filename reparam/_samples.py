"""Samples: the arrays of a response, and the values that reproduce the arrays."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, SupportsIndex

import numpy as np
import numpy.typing as npt

from reparam._files import replacing
from reparam._options import latent_dims, of_rows, parameters
from reparam._pictures import Pixels, png, sheet

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Samples:
    """Rows start .. start + n - 1 of a seed.

    `client.sample(**samples.request)` returns the same rows again. Samples are a sequence of rows: `len`, iteration,
    `samples[3]` and `samples[2:5]` work, and each part is Samples again.

    images: uint8 (n, C, H, W), 0 .. 255.
    latents: float32 (n, *latent_shape); Gaussian models.
    codes: float32 (n, variables, categories), one-hot or relaxed; Gumbel models.
    indices: int32 (n, variables), the category of each variable; Gumbel models.
    model, version: the model that made the rows.
    seed, start: seed of the noise, and number of the first row.
    noise_version: version of the function from seed and row to noise.
    options: temperature, hard, prior and parameters, if given in the call.

    Arrays not requested in the call are None.
    """

    __module__ = "reparam"  # pickles name the public class, not this module

    images: Pixels | None = None
    latents: npt.NDArray[np.float32] | None = None
    codes: npt.NDArray[np.float32] | None = None
    indices: npt.NDArray[np.int32] | None = None
    model: str
    version: int
    seed: int
    start: int
    noise_version: int
    options: Mapping[str, Any] = field(default_factory=dict)
    _latent_dims: int = 0  # parameters with more dimensions have a row each; 0 for unknown

    @property
    def outputs(self) -> dict[str, Array]:
        """The arrays requested in the call, by name."""
        return {name: array for name in DTYPES if (array := getattr(self, name)) is not None}

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(next(iter(self.outputs.values())))

    @property
    def request(self) -> dict[str, Any]:
        """Keyword arguments of `Client.sample` for the same rows, by name.

        The arguments include the version, so the model's defaults, such as the temperature, stay the same.
        """
        return {"n": self.n, **self._origin, **self.options, "outputs": tuple(self.outputs)}

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator["Samples"]:
        return (self._rows(row, row + 1) for row in range(self.n))

    def __getitem__(self, key: SupportsIndex | slice) -> "Samples":
        """Select rows as Samples; `samples[3]` has one row, and negative numbers count from the end.

        The arrays of the result are views. Rows of Samples must be consecutive, so a slice has no step. To select other
        rows, index the arrays.

        Raises: IndexError for a row out of range, ValueError for a step, TypeError for another key.
        """
        if isinstance(key, slice):
            first, stop, step = key.indices(self.n)
            if step != 1:
                raise ValueError(f"rows of Samples follow each other, got the step {step}: {INDEX_ARRAYS}")
            return self._rows(first, max(first, stop))
        try:
            row = index(key)
        except TypeError:
            raise TypeError(f"rows are taken by an integer or a slice, got {key!r}: {INDEX_ARRAYS}") from None
        if not -self.n <= row < self.n:
            raise IndexError(f"row {row} of {self.n} rows")
        return self._rows(row % self.n, row % self.n + 1)

    @staticmethod
    def concatenate(parts: Iterable["Samples"]) -> "Samples":
        """Join consecutive parts, such as the batches of `iter_samples`.

        parts: Samples in order of rows; at least one.

        Returns: Samples as from a single call.

        Raises: ValueError for parts that a single call cannot return; the message says why.
        """
        return _joined(list(parts))

    def __repr__(self) -> str:
        shown = {**self.outputs, **self._origin, **self.options}
        return f"Samples({', '.join(f'{name}={_short(value)}' for name, value in shown.items())})"

    def grid(self, columns: int | None = None) -> "Image":
        """Lay the images out as a contact sheet.

        columns: number of images in a row. Default: ceil(sqrt(n)), nearly a square.

        Returns: a Pillow image.

        Raises: ImportError without Pillow, ValueError without images.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("grid() needs Pillow: pip install pillow") from error
        channels_last = self._sheet(columns).transpose(1, 2, 0)
        return Image.fromarray(channels_last[..., 0] if channels_last.shape[-1] == 1 else channels_last)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the samples to a file. An existing file is replaced when the new file is complete.

        path: name of the file. *.npz holds every output by name, *.npy the array of a single output, *.png a contact
            sheet of the images.

        Returns: the path.

        Raises: ValueError for another suffix, and for samples that do not fit the suffix; OSError.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"cannot save as {path.name!r}: the name must end in {', '.join(SUFFIXES)}")
        with replacing(path) as file:
            SUFFIXES[path.suffix](self, file)
        return path

    def _repr_png_(self) -> bytes | None:
        """Show the contact sheet in a notebook."""
        return png(self._sheet()) if self.images is not None and self.n else None

    def _rows(self, first: int, stop: int) -> "Samples":
        rows = slice(first, stop)
        arrays: dict[str, Any] = {name: array[rows] for name, array in self.outputs.items()}
        options = of_rows(self.options, rows, self._dims)
        return replace(self, **arrays, start=self.start + first, options=options, _latent_dims=self._dims)

    @property
    def _origin(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ORIGIN}

    @property
    def _dims(self) -> int:
        return self._latent_dims or latent_dims(self.n, self.options)

    def _sheet(self, columns: int | None = None) -> Pixels:
        if self.images is None:
            raise ValueError(f"no picture without images, got {', '.join(self.outputs)}; ask for outputs=('images',)")
        if not self.n:
            raise ValueError("no picture without rows, got 0 rows")
        return sheet(self.images, columns)


INDEX_ARRAYS = "index an array instead, such as samples.outputs['images'][::2]"


def _joined(parts: list[Samples]) -> Samples:
    if not parts:
        raise ValueError("nothing to concatenate: give at least one part")
    for number, (before, part) in enumerate(pairwise(parts), 1):
        if problem := _mismatch(before, part):
            raise ValueError(f"parts {number - 1} and {number} are no rows of one call: {problem}")
    first = parts[0]
    arrays: dict[str, Any] = {name: np.concatenate([part.outputs[name] for part in parts]) for name in first.outputs}
    each = {name: np.concatenate([part.options[name] for part in parts]) for name in _of_each_row(first)}
    return replace(first, **arrays, options={**first.options, **each}, _latent_dims=first._dims)


def _mismatch(before: Samples, part: Samples) -> str:
    """Compare two parts in succession.

    Returns: why the parts are not consecutive rows of a single call; "" if they can be.
    """
    each = _of_each_row(before), _of_each_row(part)
    if each[0] != each[1]:
        return f"parameters of each row are {each[0]} and {each[1]}"
    left, right = _shared(before), _shared(part)
    for name in left | right:
        values = left.get(name), right.get(name)
        if not _equal(*values):
            return f"{name} is {_short(values[0])} and {_short(values[1])}"
    end = before.start + before.n
    return "" if part.start == end else f"the next row is {end}, and not {part.start}"


def _of_each_row(samples: Samples) -> dict[str, tuple[int, ...]]:
    """Return the row shape of each parameter with a row each, by name."""
    arrays = parameters(samples.options)
    return {name: array.shape[1:] for name, array in arrays.items() if array.ndim > samples._dims}


def _shared(samples: Samples) -> dict[str, Any]:
    """Return the values that all parts of one call have in common, by name."""
    origin = {name: getattr(samples, name) for name in (*ORIGIN, "noise_version") if name != "start"}
    each = _of_each_row(samples)
    options = {name: value for name, value in samples.options.items() if name not in each}
    return {**origin, "outputs": tuple(samples.outputs), **options}


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    return bool(left == right)


def _short(value: Any) -> str:
    return f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)


def _write_npy(samples: Samples, file: BinaryIO) -> None:
    if len(samples.outputs) > 1:
        raise ValueError(f".npy holds one array, the samples have {', '.join(samples.outputs)}; save them as .npz")
    [array] = samples.outputs.values()
    np.save(file, array)


def _write_npz(samples: Samples, file: BinaryIO) -> None:
    np.savez(file, **samples.outputs)  # type: ignore[arg-type]  # the stub takes an output to be allow_pickle


def _write_png(samples: Samples, file: BinaryIO) -> None:
    file.write(png(samples._sheet()))


SUFFIXES: dict[str, Callable[[Samples, BinaryIO], None]] = {".npy": _write_npy, ".npz": _write_npz, ".png": _write_png}

ORIGIN = (
    "model",
    "version",
    "seed",
    "start",
)  # options that every response states in headers, so Samples has these as attributes

DTYPES: dict[str, np.dtype[Any]] = {
    "images": np.dtype("u1"),
    "latents": np.dtype("<f4"),
    "codes": np.dtype("<f4"),
    "indices": np.dtype("<i4"),
}
