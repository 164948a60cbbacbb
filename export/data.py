"""Training images: scikit-learn's digits, IDX files (MNIST family), .amat files, an .npz, or a folder of pictures."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from reparam.export.errors import DataError

Pixels = npt.NDArray[np.uint8]  # (n, C, H, W)
Labels = npt.NDArray[np.int64]  # (n,), 0 .. classes - 1

HELD_OUT = 0.1  # share held out for evaluation if the data has no test set
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Dataset:
    """Images of a data set.

    name: name of the data set.
    train, test: uint8 (n, C, H, W), 0 .. 255. `test` is held out of the training.
    """

    name: str
    train: Pixels
    test: Pixels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        _, channels, height, width = self.train.shape
        return channels, height, width


def load(source: str) -> Dataset:
    """Read a data set.

    source: `digits`, or a path: a folder of IDX files (gzipped or not) or of .amat files, an .npz with arrays `train`
        and `test` or `images`, or a folder of pictures of one size.

    Returns: the images. Without a test set, a fixed random tenth is held out.

    Raises: DataError naming the file.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir() and any(path.glob("*.amat")):
        return _amat_folder(path)
    if path.is_dir():
        return _idx_folder(path) if any(path.glob("*-idx3-ubyte*")) else _picture_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    raise DataError(
        f"no data at {source!r}: give `digits`, an .npz, or a folder of IDX files or of pictures that exists"
    )


def anywhere(source: str) -> str:
    """Make the path of a source absolute, so that a run also resumes from another working directory.

    source: as in `load`.

    Returns: the source with an absolute path; `digits` stays.
    """
    return source if source == "digits" else str(Path(source).absolute())


def load_labels(source: str) -> tuple[Labels, Labels]:
    """Read the labels of `digits` or of a folder of IDX files.

    Returns: labels of the training images and of the held-out images, int64 (n,) each.

    Raises: DataError naming the file.
    """
    if source == "digits":
        from sklearn.datasets import load_digits

        labels = load_digits().target.astype(np.int64)
        kept, held_out = _parts(len(labels))
        return labels[kept], labels[held_out]
    train, test = (_idx_labels(_idx_file(Path(source), split, "labels-idx1")) for split in ("train", "t10k"))
    return train, test


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # takes a second to import, needed for this source only

    images = load_digits().images  # (1797, 8, 8), 0 .. 16
    return _split("digits", np.rint(images * (255 / 16)).astype(np.uint8)[:, None])


def _idx_folder(folder: Path) -> Dataset:
    train, test = (_idx(_idx_file(folder, split, "images-idx3")) for split in ("train", "t10k"))
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{folder}: training images are {train.shape[1:]}, test images {test.shape[1:]}")
    return Dataset(folder.resolve().name, train, test)


def _idx_file(folder: Path, split: str, what: str) -> Path:
    for name in (f"{split}-{what}-ubyte.gz", f"{split}-{what}-ubyte"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {split}-{what}-ubyte.gz")


def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable gzip file ({error}): fetch it again") from error


def _idx_labels(path: Path) -> Labels:
    """Read an IDX file of labels: magic 0x00000801, a big-endian size, then bytes. Raises: DataError."""
    content = _content(path)
    header = np.frombuffer(content[:8].ljust(8), ">u4")
    if header[0] != 0x801 or len(content) != 8 + header[1]:
        raise DataError(f"{path} is not an IDX file of labels: it should start with 00 00 08 01 and their number")
    return np.frombuffer(content, np.uint8, offset=8).astype(np.int64)


def _idx(path: Path) -> Pixels:
    """Read an IDX file of images: magic 0x00000803, three big-endian sizes, then bytes.

    Source: http://yann.lecun.com/exdb/mnist

    Returns: uint8 (n, 1, H, W).

    Raises: DataError.
    """
    content = _content(path)
    header = np.frombuffer(content[:16].ljust(16), ">u4")
    if header[0] != 0x803:
        raise DataError(f"{path} is not an IDX file of images: it should start with 00 00 08 03")
    count, height, width = (int(size) for size in header[1:])
    if len(content) != 16 + count * height * width or min(count, height, width) < 1:
        raise DataError(f"{path} announces {count} images of {height}x{width} but holds {len(content) - 16} pixels")
    return np.frombuffer(content, np.uint8, offset=16).reshape(count, 1, height, width)


def _amat_folder(folder: Path) -> Dataset:
    """Read static MNIST: binarized once (Larochelle and Murray, 2011). The 10000 validation images are not used."""
    train, test = (_amat(folder / f"binarized_mnist_{split}.amat") for split in ("train", "test"))
    return Dataset(folder.resolve().name, train, test)


def _amat(path: Path) -> Pixels:
    """Read (n, 784) zeros and ones: MATLAB 5 with a matrix X, or lines of text.

    Returns: uint8 (n, 1, 28, 28), 0 or 255.

    Raises: DataError.
    """
    try:
        with path.open("rb") as file:
            is_matlab = file.read(10) == b"MATLAB 5.0"
        if is_matlab:
            images = loadmat(path, variable_names=["X"])["X"]
        else:
            images = np.loadtxt(path, np.float32, comments=None, ndmin=2)
        if images.ndim != 2 or images.shape[1] != 784 or not (images.size and np.isin(images, (0, 1)).all()):
            raise ValueError("expected rows of 784 zeros and ones")
    except Exception as error:  # scipy's errors have no common base class
        raise DataError(f"{path} is not readable ({error})") from error
    pixels: Pixels = 255 * images.astype(np.uint8).reshape(-1, 1, 28, 28)
    return pixels


def _npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("a member is not an array")
    except Exception as error:  # errors of NumPy and zipfile have no common base class
        raise DataError(f"{path} is not a readable .npz ({error!r})") from error
    if {"train", "test"} <= arrays.keys():
        train, test = (_pixels(arrays[key], f"{path}[{key!r}]") for key in ("train", "test"))
        if train.shape[1:] != test.shape[1:]:
            raise DataError(f"{path}: `train` holds images of {train.shape[1:]}, `test` of {test.shape[1:]}")
        return Dataset(path.stem, train, test)
    if "images" in arrays:
        return _split(path.stem, _pixels(arrays["images"], f"{path}['images']"))
    raise DataError(f"{path} holds {sorted(arrays)}: it should hold `train` and `test`, or `images`")


def load_npy(path: Path) -> Pixels:
    """Read the images of an .npy file.

    path: file of an array (n, H, W) or (n, C, H, W), C 1 or 3: uint8, or other numbers in [0, 1].

    Returns: uint8 (n, C, H, W), 0 .. 255.

    Raises: DataError for another file or array; OSError.
    """
    try:
        with path.open("rb") as file:
            array = npy.read_array(file, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # NumPy's errors have no common base class
        raise DataError(f"{path} is not a readable .npy ({error!r})") from error
    return _pixels(array, str(path))


def _pixels(array: npt.NDArray[np.generic], where: str) -> Pixels:
    if array.ndim not in (3, 4) or min(array.shape) < 1 or (array.ndim == 4 and array.shape[1] not in (1, 3)):
        raise DataError(f"{where} has shape {array.shape}: it should be (n, H, W) or (n, C, H, W), C 1 or 3, n >= 1")
    if array.ndim == 3:
        array = array[:, None]
    if array.dtype == np.uint8 and array.max() > 1:
        return array.astype(np.uint8)
    floats = array.astype(np.float64) if array.dtype.kind in "biuf" else np.array([np.nan])
    least, most = floats.min(), floats.max()
    if not (least >= 0 and most <= 1):
        raise DataError(f"{where} is {array.dtype}, {least:g} to {most:g}: it should be uint8, or floats in [0, 1]")
    pixels: Pixels = np.rint(floats * 255).astype(np.uint8)
    return pixels


def _picture_folder(folder: Path) -> Dataset:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise DataError(f"{folder} holds neither IDX files nor pictures ({', '.join(sorted(PICTURES))})")
    mode, first = "L", _picture(paths[0])
    if first.mode not in ("1", "L", "LA"):
        mode = "RGB"
    images = np.empty((len(paths), first.height, first.width, len(mode)), np.uint8)
    for row, path in enumerate(tqdm(paths, desc="reading pictures", unit="file", disable=None)):
        picture = _picture(path)
        if picture.size != first.size:
            raise DataError(
                f"{path} is {picture.width}x{picture.height}, {paths[0]} is {first.width}x{first.height}: "
                "all pictures must have one size"
            )
        images[row] = np.asarray(picture.convert(mode)).reshape(images.shape[1:])
    return _split(folder.resolve().name, images.transpose(0, 3, 1, 2).copy())


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            picture = opened.copy()
    except Exception as error:  # errors of Pillow's readers have no common base class
        raise DataError(f"{path} is not a readable picture ({error})") from error
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{path} has more than 8 bits a pixel: convert it to 8")
    return picture


def _split(name: str, images: Pixels) -> Dataset:
    if len(images) < 2:
        raise DataError(f"{name} holds {len(images)} image: at least 2 are needed, to train on and to hold out")
    kept, held_out = _parts(len(images))
    return Dataset(name, images[kept], images[held_out])


def _parts(n: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Split n images: the indices to train on, and a fixed random tenth to hold out."""
    order = np.random.default_rng(0).permutation(n)
    held_out = max(1, round(HELD_OUT * n))
    return order[held_out:], order[:held_out]
