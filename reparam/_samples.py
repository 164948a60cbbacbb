"""What a call returns: arrays, and where they come from."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EISDIR, ENOENT
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from reparam._pictures import Pixels, png, sheet

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Samples:
    """Rows start .. start + n - 1 of a seed. The same model, version, seed and start give the same rows again, with the
    same other arguments.

    images: uint8 (n, C, H, W), 0 .. 255. latents: float32 (n, *latent_shape), Gaussian models.
    codes: float32 (n, variables, categories), one-hot or relaxed; indices: int32 (n, variables), the category of
    each variable; Gumbel models. What was not asked for is None.
    """

    images: Pixels | None = None
    latents: npt.NDArray[np.float32] | None = None
    codes: npt.NDArray[np.float32] | None = None
    indices: npt.NDArray[np.int32] | None = None
    model: str
    version: int
    seed: int
    start: int
    noise_version: int

    @property
    def outputs(self) -> dict[str, Array]:
        """The arrays that were asked for, by name."""
        return {name: array for name in DTYPES if (array := getattr(self, name)) is not None}

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(next(iter(self.outputs.values())))

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        arrays = "".join(f"{name}={array.dtype}{array.shape}, " for name, array in self.outputs.items())
        return f"Samples({arrays}model={self.model!r}, version={self.version}, seed={self.seed}, start={self.start})"

    def grid(self, columns: int | None = None) -> "Image":
        """A contact sheet of the images, `columns` wide (default: near a square), as a Pillow image.

        Raises ImportError without Pillow, ValueError without images.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("grid() needs Pillow: pip install pillow") from error
        channels_last = self._sheet(columns).transpose(1, 2, 0)
        return Image.fromarray(channels_last[..., 0] if channels_last.shape[-1] == 1 else channels_last)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the samples to a file and return its path. A file of that name is replaced once the new one is whole.

        path: *.npz holds every output under its name, *.npy the array of a single output, *.png a contact sheet of the
        images. Raises ValueError for another suffix, or where the samples do not fit it.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"cannot save as {path.name!r}: the name must end in {', '.join(SUFFIXES)}")
        with replacing(path) as file:
            SUFFIXES[path.suffix](self, file)
        return path

    def _repr_png_(self) -> bytes | None:
        """How a notebook shows it."""
        return None if self.images is None else png(self._sheet())

    def _sheet(self, columns: int | None = None) -> Pixels:
        if self.images is None:
            raise ValueError(f"no picture without images, got {', '.join(self.outputs)}; ask for outputs=('images',)")
        return sheet(self.images, columns)


def _write_npy(samples: Samples, file: BinaryIO) -> None:
    if len(samples.outputs) > 1:
        raise ValueError(f".npy holds one array, the samples have {', '.join(samples.outputs)}; save them as .npz")
    [array] = samples.outputs.values()
    np.save(file, array)


def _write_npz(samples: Samples, file: BinaryIO) -> None:
    np.savez(file, **samples.outputs)  # type: ignore[arg-type]  # the stub takes one to be allow_pickle


def _write_png(samples: Samples, file: BinaryIO) -> None:
    file.write(png(samples._sheet()))


SUFFIXES: dict[str, Callable[[Samples, BinaryIO], None]] = {".npy": _write_npy, ".npz": _write_npz, ".png": _write_png}

DTYPES: dict[str, np.dtype[Any]] = {
    "images": np.dtype("u1"),
    "latents": np.dtype("<f4"),
    "codes": np.dtype("<f4"),
    "indices": np.dtype("<i4"),
}


def check_place(path: Path) -> None:
    """Raises OSError where no file can have this name."""
    if not path.parent.is_dir():
        raise FileNotFoundError(ENOENT, "no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "a folder has this name", str(path))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when all is written, and is gone when something fails. Raises OSError."""
    check_place(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
