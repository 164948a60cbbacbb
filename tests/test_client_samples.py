"""Samples: files, pictures and their text form."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reparam import Client, Samples
from tests.conftest import Running

GREY = np.arange(5 * 64, dtype=np.uint8).reshape(5, 1, 8, 8)
COLOUR = np.arange(3 * 3 * 4 * 6, dtype=np.uint8).reshape(3, 3, 4, 6)


def samples(**arrays: Any) -> Samples:
    return Samples(**arrays, model="some", version=2, seed=7, start=0, noise_version=1)


def test_the_repr_shows_shapes_and_the_origin() -> None:
    shown = repr(samples(images=GREY))
    assert shown == "Samples(images=uint8(5, 1, 8, 8), model='some', version=2, seed=7, start=0)"


def test_npy_holds_the_single_output(tmp_path: Path) -> None:
    path = samples(images=GREY).save(tmp_path / "rows.npy")
    np.testing.assert_array_equal(np.load(path), GREY)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.npy"]


def test_npz_holds_every_output(tmp_path: Path) -> None:
    latents = np.ones((5, 3), np.float32)
    with np.load(samples(images=GREY, latents=latents).save(str(tmp_path / "rows.npz"))) as archive:
        assert set(archive) == {"images", "latents"}
        np.testing.assert_array_equal(archive["latents"], latents)


@pytest.mark.parametrize("images", [GREY, COLOUR, GREY[:1]], ids=["grey", "colour", "single"])
def test_png_is_the_picture_of_the_grid(images: Any, tmp_path: Path) -> None:
    some = samples(images=images)
    with Image.open(some.save(tmp_path / "grid.png")) as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(some.grid()))
    with Image.open(io.BytesIO(some._repr_png_() or b"")) as shown:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(some.grid()))


def test_the_grid_is_the_contact_sheet_of_the_service(service: Running) -> None:
    with Client(service.url) as client:
        grid = client.sample(7, seed=5).grid()
    response = service.post({"n": 7, "seed": 5}, headers={"Accept": "image/png"})
    with Image.open(io.BytesIO(response.content)) as sheet:
        np.testing.assert_array_equal(np.asarray(grid), np.asarray(sheet))


def test_columns_choose_the_shape_of_the_grid() -> None:
    assert samples(images=GREY).grid().size == (2 + 3 * 10, 2 + 2 * 10)
    assert samples(images=GREY).grid(columns=5).size == (2 + 5 * 10, 2 + 10)


@pytest.mark.parametrize(
    ("arrays", "name", "message"),
    [
        ({"images": GREY}, "rows.jpg", "cannot save as 'rows.jpg': the name must end in .npy, .npz, .png"),
        ({"images": GREY, "latents": GREY}, "rows.npy", "the samples have images, latents; save them as .npz"),
        ({"latents": GREY}, "rows.png", "no picture without images, got latents"),
        ({"images": GREY.reshape(5, 2, 8, 4)}, "rows.png", "a PNG has 1 or 3 channels, the images have 2"),
    ],
)
def test_samples_that_do_not_fit_a_file_leave_no_file(arrays: Any, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        samples(**arrays).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_images_a_notebook_shows_the_repr() -> None:
    assert samples(latents=np.ones((2, 3), np.float32))._repr_png_() is None


def test_only_grid_needs_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert samples(images=GREY).save(tmp_path / "grid.png").stat().st_size > 0
    with pytest.raises(ImportError, match="pip install pillow"):
        samples(images=GREY).grid()
