"""Sources of training images, and errors naming the broken file."""

import gzip
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from reparam.export.data import load
from reparam.export.draws import as_images, generator
from reparam.export.errors import DataError

Pixels = npt.NDArray[np.uint8]


def some_images(n: int = 20, height: int = 6, width: int = 5) -> Pixels:
    return np.random.default_rng(n).integers(0, 256, (n, 1, height, width), np.uint8)


def idx(images: Pixels) -> bytes:
    n, _, height, width = images.shape
    return np.array([0x803, n, height, width], ">u4").tobytes() + images.tobytes()


def write_idx(folder: Path, train: Pixels, test: Pixels, *, zipped: bool = True) -> Path:
    for split, images in (("train", train), ("t10k", test)):
        name = f"{split}-images-idx3-ubyte"
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(images)))
        else:
            (folder / name).write_bytes(idx(images))
    return folder


def write_pictures(folder: Path, images: Pixels, mode: str = "L") -> Path:
    for row, image in enumerate(images):
        Image.fromarray(image[0]).convert(mode).save(folder / f"{row:03}.png")
    return folder


def refusal(source: Path | str) -> str:
    with pytest.raises(DataError) as error:
        load(str(source))
    return str(error.value)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_digits() -> None:
    data = load("digits")
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train), len(data.test)) == (1617, 180)
    assert data.train.max() == 255
    assert np.array_equal(data.test, load("digits").test)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path: Path, zipped: bool) -> None:
    train, test = some_images(20), some_images(7)
    data = load(str(write_idx(tmp_path, train, test, zipped=zipped)))
    assert np.array_equal(data.train, train)
    assert np.array_equal(data.test, test)
    assert data.name == tmp_path.name


def test_npz_with_and_without_a_split(tmp_path: Path) -> None:
    train, test = some_images(20), some_images(7)
    np.savez(tmp_path / "split.npz", train=train[:, 0], test=test)
    assert np.array_equal(load(str(tmp_path / "split.npz")).train, train)
    np.savez_compressed(tmp_path / "whole.npz", images=train / 255)
    data = load(str(tmp_path / "whole.npz"))
    assert (len(data.train), len(data.test)) == (18, 2)
    assert sorted(data.train.tobytes() + data.test.tobytes()) == sorted(train.tobytes())


@pytest.mark.parametrize("kind", ["uint8", "bool", "int64", "float32"])
def test_binary_images_of_any_dtype_become_0_and_255(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).integers(0, 2, (20, 4, 4)).astype(kind))
    assert set(np.unique(load(str(tmp_path / "d.npz")).train)) == {0, 255}


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("1", 1), ("P", 3)])
def test_folder_of_pictures(tmp_path: Path, mode: str, channels: int) -> None:
    data = load(str(write_pictures(tmp_path, some_images(10), mode)))
    assert data.image_shape == (channels, 6, 5)
    assert (len(data.train), len(data.test)) == (9, 1)


def test_pictures_keep_their_pixels(tmp_path: Path) -> None:
    images = some_images(10)
    data = load(str(write_pictures(tmp_path, images)))
    assert {image.tobytes() for image in [*data.train, *data.test]} == {image.tobytes() for image in images}


def test_missing_sources_are_refused(tmp_path: Path) -> None:
    assert "no data at 'nowhere'" in refusal("nowhere")
    assert "holds neither IDX files nor pictures" in refusal(tmp_path)


def test_corrupt_gzip_is_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path, some_images(), some_images()) / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    for broken in (content[:-20], content[:50] + b"\0\0\0\0" + content[54:], b"plain", b""):
        path.write_bytes(broken)
        assert str(path) in refusal(tmp_path)


def test_broken_idx_files_are_refused(tmp_path: Path) -> None:
    folder = write_idx(tmp_path, some_images(), some_images(), zipped=False)
    train = folder / "train-images-idx3-ubyte"
    train.write_bytes(idx(some_images())[:-1])
    assert "announces 20 images of 6x5 but holds 599 pixels" in refusal(folder)
    train.write_bytes(b"\0\0\x08\x01" + bytes(20))
    assert "is not an IDX file of images" in refusal(folder)
    train.write_bytes(idx(some_images(20, 7, 7)))
    assert re.search(r"training images are \(1, 7, 7\), test images \(1, 6, 5\)", refusal(folder))
    train.unlink()
    assert "has no train-images-idx3-ubyte.gz" in refusal(folder)


def test_broken_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    for arrays, says in (
        ({"x": some_images()}, "it should hold `train` and `test`, or `images`"),
        ({"images": np.zeros((3, 4))}, "has shape (3, 4)"),
        ({"images": np.zeros((3, 2, 4, 4))}, "has shape (3, 2, 4, 4)"),
        ({"images": np.zeros((0, 4, 4))}, "has shape (0, 4, 4)"),
        ({"images": np.full((3, 4, 4), 2.0)}, "floats in [0, 1]"),
        ({"images": np.array([[[-1.0]], [[2.0]]])}, "is float64, -1 to 2: it should be uint8"),
        ({"images": np.full((3, 4, 4), np.nan)}, "floats in [0, 1]"),
        ({"images": np.full((3, 4, 4), "a")}, "floats in [0, 1]"),
        ({"images": np.zeros((1, 4, 4))}, "at least 2 are needed"),
        ({"train": np.zeros((3, 4, 4)), "test": np.zeros((3, 5, 5))}, "`test` of (1, 5, 5)"),
        ({"images": np.array([object()])}, "Object arrays cannot be loaded"),
    ):
        np.savez(path, **arrays)
        assert says in refusal(path)
    for content in (b"PK no zip", b"", npy(np.zeros(3)), npy(np.zeros(3))[:-30].replace(b"(3,)", b"(9**99,)")):
        path.write_bytes(content)
        assert f"{path} is not a readable .npz" in refusal(path)
    for member in (b"no array", npy(np.zeros(3))[:60], npy(np.zeros(3)).replace(b"(3,), }", b"(3,   }")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images", member)
        assert f"{path} is not a readable .npz" in refusal(path)


def test_pictures_with_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 1000).save(tmp_path / "deep.png")
    assert "deep.png has more than 8 bits a pixel" in refusal(tmp_path)


def test_broken_pictures_are_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, some_images(3))
    Image.new("L", (9, 9)).save(folder / "other.png")
    assert "other.png is 9x9" in refusal(folder)
    (folder / "other.png").write_bytes((folder / "000.png").read_bytes()[:40])
    assert "other.png is not a readable picture" in refusal(folder)
    broken = bytearray((folder / "000.png").read_bytes())
    broken[16:24] = b"\0\0\0\5\0\0\0\7"  # another size with the old checksum
    (folder / "other.png").write_bytes(broken)
    assert "other.png is not a readable picture" in refusal(folder)


@pytest.mark.parametrize("as_text", ["%d", "%.1f", "%.18e", None])
def test_amat_files(tmp_path: Path, as_text: str | None) -> None:
    images = np.random.default_rng(0).integers(0, 2, (7, 784))
    for split in ("train", "test"):
        path = tmp_path / f"binarized_mnist_{split}.amat"
        if as_text:
            np.savetxt(path, images, as_text)
        else:
            savemat(path, {"X": images}, appendmat=False)
    data = load(str(tmp_path))
    assert data.image_shape == (1, 28, 28)
    assert np.array_equal(data.test.reshape(7, 784), images * 255)


@pytest.mark.parametrize("content", [b"MATLAB 5.0 and no more", b"0 1 1", b"2 " * 784, b"x " * 784, b""])
def test_broken_amat_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "binarized_mnist_train.amat").write_bytes(content)
    with pytest.raises(DataError, match=r"binarized_mnist_train\.amat is not readable"):
        load(str(tmp_path))


def test_pixels_are_1_with_the_probability_of_their_grey_value() -> None:
    greys = torch.arange(256, dtype=torch.uint8)
    drawn = as_images(greys.expand(20_001, 1, 1, 256), True, generator(0, 0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    white = drawn.double().mean((0, 1, 2))
    expected = greys.double() / 255
    assert white[0] == 0
    assert white[255] == 1
    errors = ((white - expected) / (expected * (1 - expected) / len(drawn)).sqrt())[1:-1]
    assert errors.abs().max() < 4.5
    assert 0.8 < errors.std() < 1.2


def test_pixels_are_drawn_independently() -> None:
    n = 20_001
    drawn = as_images(torch.full((n, 1, 3, 7), 128, dtype=torch.uint8), True, generator(0, 0))
    correlations = torch.corrcoef(drawn.flatten(1).T) - torch.eye(21)
    assert correlations.abs().max() < 5 / n**0.5
