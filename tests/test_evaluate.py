"""Evaluation: the same numbers again, killed or not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from reparam.export.config import TrainConfig
from reparam.export.errors import RunError
from reparam.export.evaluate import PARTIAL, evaluate, read_evaluation
from reparam.export.files import read_tensors, write_tensors
from reparam.export.run import Run
from reparam.export.train import train
from tests.conftest import small, wait_until


def test_evaluation_repeats_itself_and_more_samples_tighten_the_bound(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["tiny-gumbel"]
    kept = (folder / "evaluation.json").read_bytes()
    one, again = (evaluate(folder, samples=1, rows=100, seed=1) for _ in range(2))
    assert one == again
    assert evaluate(folder, samples=50, rows=100, seed=1)["bound"] > one["bound"]
    (folder / "evaluation.json").write_bytes(kept)


def test_an_evaluation_that_was_killed_goes_on_to_the_same_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        shutil.copytree(runs["tiny-gumbel"], tmp_path / name)
    arguments = ["--samples", "3000", "--images", "180", "--seed", "4"]

    def start(name: str, **environment: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "reparam", "evaluate", str(tmp_path / name), *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}
        )

    killed = start("killed", OMP_NUM_THREADS="1")  # one part after the other
    wait_until(lambda: (tmp_path / "killed" / PARTIAL).exists())
    killed.kill()
    killed.communicate()
    shutil.copytree(tmp_path / "killed", tmp_path / "marked")
    done, about = read_tensors(tmp_path / "marked" / PARTIAL)
    write_tensors(tmp_path / "marked" / PARTIAL, done | {"0": done["0"] - 1000}, **about)
    for name in ("whole", "killed", "marked"):
        start(name).communicate(timeout=120)
    whole, resumed, marked = (
        (tmp_path / name / "evaluation.json").read_bytes() for name in ("whole", "killed", "marked")
    )
    assert whole == resumed
    assert json.loads(marked)["bound"] < json.loads(whole)["bound"] - 500  # what was done is not done again
    assert not (tmp_path / "killed" / PARTIAL).exists()


def test_a_bound_that_is_no_number_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["tiny-gaussian"], tmp_path / "r"))
    tensors = load_file(folder / "checkpoint.safetensors")
    last = [name for name in tensors if name.startswith("model.encoder") and name.endswith("bias")][-1]
    tensors[last][3:] = -300  # no variance
    (folder / "checkpoint.safetensors").write_bytes(save(tensors, {"epoch": "1"}))
    before = (folder / "evaluation.json").read_bytes()
    for _ in range(2):
        with pytest.raises(RunError, match=r"the bound of \d+ of 150 images is no number.* lower --learning-rate"):
            evaluate(folder, samples=2, rows=150, seed=0)
    assert (folder / "evaluation.json").read_bytes() == before


def test_an_evaluation_of_something_else_starts_anew(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["tiny-gumbel"], tmp_path / "r")
    expected = evaluate(tmp_path / "r", samples=2, rows=150, seed=0)
    for content in (b"", save({"0": torch.zeros(3, 100)}, {"stamp": "{}"}), save({"0": torch.zeros(3, 100)})):
        (tmp_path / "r" / PARTIAL).write_bytes(content)
        assert evaluate(tmp_path / "r", samples=2, rows=150, seed=0) == expected


def test_an_evaluation_wants_the_data_of_the_run(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((20, 8, 8))
    np.savez(tmp_path / "d.npz", images=images)
    config = TrainConfig(kind="gaussian", data=str(tmp_path / "d.npz"), epochs=1, width=(4,))
    train(config, tmp_path / "r", resume=False, sheet_every=1)
    np.savez(tmp_path / "d.npz", images=1 - images)
    with pytest.raises(RunError, match="has changed since"):
        evaluate(tmp_path / "r", samples=1, rows=None, seed=0)


def test_images_that_are_alike_have_draws_of_their_own(tmp_path: Path) -> None:
    images = np.tile(np.random.default_rng(0).integers(0, 256, (1, 8, 8), np.uint8), (200, 1, 1))
    np.savez(tmp_path / "alike.npz", train=images, test=images)
    train(small(data=str(tmp_path / "alike.npz")), tmp_path / "r", resume=False, sheet_every=1)
    half, whole = (evaluate(tmp_path / "r", samples=1, rows=rows, seed=0)["bound"] for rows in (100, 200))
    assert half != whole  # the second hundred are computed apart


def test_the_standard_error_falls_with_the_root_of_the_images(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["tiny-gaussian"], tmp_path / "r"))
    few, many = (evaluate(folder, samples=1, rows=rows, seed=0) for rows in (20, 180))
    for name in ("elbo_standard_error", "bound_standard_error"):
        assert 2 < few[name] / many[name] < 5
    assert "elbo_standard_error" not in evaluate(folder, samples=1, rows=1, seed=0)
    assert many["elbo_standard_error"] == pytest.approx(10 / 180**0.5, rel=0.5)  # the images differ by about 10 nats


def test_a_short_evaluation_does_not_replace_a_long_one(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["tiny-gaussian"], tmp_path / "r"))
    command = [sys.executable, "-m", "reparam", "evaluate", str(folder), "--samples", "2", "--images"]
    said = {
        images: subprocess.run([*command, images], capture_output=True, text=True, check=True)
        for images in ("100", "20")
    }
    assert "keeps, and publishes, one by more latents: m 2, 100 images" in said["20"].stdout
    assert "keeps" not in said["100"].stdout
    assert read_evaluation(Run(folder))["images"] == 100
    tensors = load_file(folder / "checkpoint.safetensors")
    (folder / "checkpoint.safetensors").write_bytes(save(tensors, {"epoch": "1", "other": "file"}))
    evaluate(folder, samples=2, rows=20, seed=0)
    assert read_evaluation(Run(folder))["images"] == 20  # that of other weights is of no use


def test_more_images_than_there_are_cannot_be_evaluated(runs: dict[str, Path]) -> None:
    with pytest.raises(RunError, match="there are 180 held-out images, not 181: ask for no more"):
        evaluate(runs["tiny-gaussian"], samples=1, rows=181, seed=0)
