"""Sample quality: known distances, detected copies, a trained classifier."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import linalg

from reparam.export.__main__ import main
from reparam.export.classifier import Classifier, train_classifier
from reparam.export.data import load, load_labels
from reparam.export.draws import generator
from reparam.export.errors import DataError, ExportError, RunError
from reparam.export.prior import fit_prior
from reparam.export.quality import frechet, kernel_distance, near_training, quality, quality_of_images, sample_images
from reparam.models import GaussianVAE, Mixture, VAEConfig


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    assert train_classifier("digits", folder, epochs=12, seed=0) > 0.9
    return folder


def test_frechet_distance_equals_the_formula() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(500, 4)) @ random.normal(size=(4, 4))
    other = random.normal(size=(400, 4)) + np.array([3, 0, 0, 1])
    first, second = np.cov(one.T), np.cov(other.T)
    root = np.real(linalg.sqrtm(first @ second))
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(one, other) == pytest.approx(expected)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_equals_the_double_sum_and_is_unbiased() -> None:
    random = np.random.default_rng(0)
    one, other = random.normal(size=(30, 3)), random.normal(size=(30, 3)) + 0.5

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [kernel(z[i], z[j]) for z in (one, other) for i in range(30) for j in range(30) if i != j]
    between = [kernel(x, y) for x in one for y in other]
    expected = sum(within) / (30 * 29) - 2 * sum(between) / (30 * 30)
    value, error = kernel_distance(one, other)
    assert value == pytest.approx(expected)
    assert error is None
    value, error = kernel_distance(random.normal(size=(10_000, 3)), random.normal(size=(10_000, 3)))
    assert error is not None
    assert abs(value) < 3 * error


def test_near_training_tells_copies_from_new_images() -> None:
    images = torch.from_numpy(load("digits").train.copy())
    train, test, new = images[:900], images[900:1200], images[1200:]
    assert near_training(train, train, test) == 1
    assert near_training(test, train, test) == 0
    assert near_training(new, train, test) == pytest.approx(0.75, abs=0.08)


def test_components_are_sampled_by_weight() -> None:
    torch.manual_seed(0)
    model = GaussianVAE(VAEConfig((1, 2, 2), (1,), "mlp", ())).eval()
    mixture = Mixture(torch.tensor([0.25, 0.75]).log(), (torch.tensor([[-9.0], [9.0]]), torch.full((2, 1), -9.0)))
    with torch.inference_mode():
        first, _ = (torch.sigmoid(model.decode(mu[None])) * 255 for mu in mixture.parameters[0])
        images = torch.cat(list(sample_images(model, mixture, 4000, generator(0, 0))))
    from_first = ((images - first).abs() < 20).flatten(1).all(1)
    assert len(images) == 4000
    assert from_first.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_labels_belong_to_the_training_and_held_out_images() -> None:
    from sklearn.datasets import load_digits

    data, (labels, held_out) = load("digits"), load_labels("digits")
    assert (len(labels), len(held_out)) == (len(data.train), len(data.test))
    digits = load_digits()
    by_image = {
        np.rint(image * (255 / 16)).astype(np.uint8).tobytes(): target
        for image, target in zip(digits.images, digits.target, strict=True)
    }
    assert [by_image[image.tobytes()] for image in data.test] == held_out.tolist()
    assert [by_image[image.tobytes()] for image in data.train] == labels.tolist()


def test_quality_covers_each_prior_and_repeats(runs: dict[str, Path], classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["tiny-gaussian"], folder)
    plain = quality(folder, classifier=classifier, samples=500, seed=0)
    assert not any(key.startswith("mixture") for key in plain)
    fit_prior(folder, components=10, seed=0)
    found = quality(folder, classifier=classifier, samples=500, seed=0)
    assert found == quality(folder, classifier=classifier, samples=500, seed=0)
    assert found == json.loads((folder / "quality.json").read_text())
    assert plain.items() <= found.items()
    assert found["training_frechet"] < found["mixture_frechet"]
    assert found["training_kernel"] < found["standard_kernel"]
    assert found["training_share"] == pytest.approx(0.9, abs=1e-3)
    assert 0.7 < found["mixture_near_training"] <= 1


def test_images_of_any_sampler_are_measured(classifier: Path, tmp_path: Path) -> None:
    path, images = tmp_path / "images.npy", load("digits").train
    np.save(path, images[::2])
    found = quality_of_images(path, data="digits", classifier=classifier, seed=0)
    assert found["samples_near_training"] == 1
    assert found["samples_frechet"] < 5
    np.save(path, 255 - images)
    assert quality_of_images(path, data="digits", classifier=classifier, seed=0)["samples_frechet"] > 50


def test_images_of_another_shape_or_type_are_refused(classifier: Path, tmp_path: Path) -> None:
    path, images = tmp_path / "images.npy", load("digits").train
    for wrong in (images[:99], images[:, :, 1:], images.astype(np.float32), np.array([{}])):
        np.save(path, wrong)
        with pytest.raises(ExportError, match=r"images\.npy (holds|is)"):
            quality_of_images(path, data="digits", classifier=classifier, seed=0)
    for damaged in (b"", path.read_bytes()[:60], (classifier / "classifier.safetensors").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images\.npy is not a readable \.npy"):
            quality_of_images(path, data="digits", classifier=classifier, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--data", "digits"], "run is no .npy file, and a run knows its images: leave out --data"),
        (["x.npy"], "all images of x.npy count: say --data to compare them with, and no --samples"),
        (["X.NPY", "--data", "digits", "--samples", "200"], "all images of X.NPY count: say --data"),
    ],
)
def test_file_needs_data_and_run_refuses_data(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["quality", *arguments, "--classifier", "c"])


def test_missing_or_damaged_classifier_is_refused(runs: dict[str, Path], classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no classifier"):
        quality(runs["tiny-gaussian"], classifier=tmp_path, samples=500, seed=0)
    (tmp_path / "classifier.safetensors").write_bytes(b"none")
    with pytest.raises(RunError, match="holds no classifier"):
        Classifier.load(tmp_path)
    weights = load_file(classifier / "classifier.safetensors")
    next(iter(weights.values())).fill_(torch.nan)
    with safe_open(classifier / "classifier.safetensors", "pt") as file:
        save_file(weights, tmp_path / "classifier.safetensors", file.metadata())
    with pytest.raises(RunError, match=r"holds no classifier .*NaN"):
        Classifier.load(tmp_path)
    with pytest.raises(DataError, match="has no train-labels-idx1-ubyte"):
        load_labels(str(tmp_path))


def test_classifier_is_not_overwritten(classifier: Path) -> None:
    with pytest.raises(RunError, match="already holds a classifier: choose another --out"):
        train_classifier("digits", classifier, epochs=1, seed=0)


def test_kernel_distance_does_not_depend_on_the_order_of_images() -> None:
    """Images sorted by class, and images next to slightly changed copies."""
    random = np.random.default_rng(0)
    one, other = (random.normal(size=(6_000, 3)) + random.integers(0, 2, (6_000, 1)) for _ in range(2))
    value, _ = kernel_distance(one, other[other[:, 0].argsort()])
    assert abs(value) < 0.05
    value, error = kernel_distance(other + random.normal(size=other.shape) / 100, other)
    shuffled, _ = kernel_distance(random.permutation(other), other)
    assert error is not None
    assert abs(value - shuffled) < 4 * error
