"""Evaluation: resumed or not, the same numbers."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from reparam.export.__main__ import main
from reparam.export.config import TrainConfig
from reparam.export.errors import RunError
from reparam.export.evaluate import PARTIAL, evaluate, read_evaluation
from reparam.export.files import read_tensors, write_tensors
from reparam.export.run import Run
from reparam.export.train import train
from tests.conftest import small


def test_evaluation_repeats_and_more_samples_raise_the_bound(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["tiny-gumbel"]
    kept = (folder / "evaluation.json").read_bytes()
    one, again = (evaluate(folder, samples=1, rows=100, seed=1) for _ in range(2))
    assert one == again
    assert evaluate(folder, samples=50, rows=100, seed=1)["bound"] > one["bound"]
    (folder / "evaluation.json").write_bytes(kept)


# Evaluates the run in the first argument, and kills the process after the first of two batches.
KILLED_AFTER_A_BATCH = """
import os, signal, sys
from reparam.export import evaluate
from reparam.export.__main__ import main

def save_then_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

save, evaluate._save_partial = evaluate._save_partial, save_then_die
main(["evaluate", *sys.argv[1:]])
"""


def test_killed_evaluation_resumes_to_the_same_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    whole, killed = (Path(shutil.copytree(runs["tiny-gumbel"], tmp_path / name)) for name in ("whole", "killed"))
    options = ["--samples", "5", "--images", "180", "--seed", "4"]
    command = [sys.executable, "-c", KILLED_AFTER_A_BATCH, str(killed), *options]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    marked = Path(shutil.copytree(killed, tmp_path / "marked"))
    done, about = read_tensors(marked / PARTIAL)
    assert len(done) == 1
    write_tensors(marked / PARTIAL, done | {"0": done["0"] - 1000}, **about)
    for folder in (whole, killed, marked):
        main(["evaluate", str(folder), *options])
    contents = [(folder / "evaluation.json").read_bytes() for folder in (whole, killed, marked)]
    assert contents[0] == contents[1]
    # The finished batch is read from the file rather than computed again.
    assert json.loads(contents[2])["bound"] < json.loads(contents[0])["bound"] - 500
    assert not (killed / PARTIAL).exists()


def test_number_of_threads_does_not_change_an_evaluation(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["tiny-gumbel"], tmp_path / "r"))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(evaluate(folder, samples=3, rows=180, seed=0))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_bound_without_a_finite_value_fails(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["tiny-gaussian"], tmp_path / "r"))
    tensors = load_file(folder / "checkpoint.safetensors")
    last = [name for name in tensors if name.startswith("model.encoder") and name.endswith("bias")][-1]
    tensors[last][3:] = -300  # variance 0 in float32
    (folder / "checkpoint.safetensors").write_bytes(save(tensors, {"epoch": "1"}))
    before = (folder / "evaluation.json").read_bytes()
    for _ in range(2):
        with pytest.raises(
            RunError, match=r"the bound of \d+ of 150 images is NaN or infinite.* lower --learning-rate"
        ):
            evaluate(folder, samples=2, rows=150, seed=0)
    assert (folder / "evaluation.json").read_bytes() == before


def test_partial_results_of_another_evaluation_are_ignored(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["tiny-gumbel"], tmp_path / "r")
    expected = evaluate(tmp_path / "r", samples=2, rows=150, seed=0)
    for content in (b"", save({"0": torch.zeros(3, 100)}, {"stamp": "{}"}), save({"0": torch.zeros(3, 100)})):
        (tmp_path / "r" / PARTIAL).write_bytes(content)
        assert evaluate(tmp_path / "r", samples=2, rows=150, seed=0) == expected


def test_evaluation_needs_the_images_of_the_training(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((20, 8, 8))
    np.savez(tmp_path / "d.npz", images=images)
    config = TrainConfig(kind="gaussian", data=str(tmp_path / "d.npz"), epochs=1, width=(4,))
    train(config, tmp_path / "r", resume=False, sheet_every=1)
    np.savez(tmp_path / "d.npz", images=1 - images)
    with pytest.raises(RunError, match="has changed since"):
        evaluate(tmp_path / "r", samples=1, rows=None, seed=0)


def test_equal_images_have_different_draws(tmp_path: Path) -> None:
    images = np.tile(np.random.default_rng(0).integers(0, 256, (1, 8, 8), np.uint8), (200, 1, 1))
    np.savez(tmp_path / "alike.npz", train=images, test=images)
    train(small(data=str(tmp_path / "alike.npz")), tmp_path / "r", resume=False, sheet_every=1)
    half, whole = (evaluate(tmp_path / "r", samples=1, rows=rows, seed=0)["bound"] for rows in (100, 200))
    assert half != whole  # the second hundred images have another generator


def test_standard_error_falls_with_the_root_of_the_number_of_images(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["tiny-gaussian"], tmp_path / "r"))
    few, many = (evaluate(folder, samples=1, rows=rows, seed=0) for rows in (20, 180))
    for name in ("elbo_standard_error", "bound_standard_error"):
        assert 2 < few[name] / many[name] < 5
    assert "elbo_standard_error" not in evaluate(folder, samples=1, rows=1, seed=0)
    assert many["elbo_standard_error"] == pytest.approx(10 / 180**0.5, rel=0.5)  # the images differ by about 10 nats


def test_shorter_evaluation_does_not_replace_a_longer_evaluation(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(runs["tiny-gaussian"], tmp_path / "r"))
    printed = {}
    for images in ("100", "20"):
        main(["evaluate", str(folder), "--samples", "2", "--images", images])
        printed[images] = capsys.readouterr().out
    assert "m 2, 100 images" in printed["20"]
    assert "keeps" in printed["20"]
    assert "keeps" not in printed["100"]
    assert read_evaluation(Run(folder))["images"] == 100
    tensors = load_file(folder / "checkpoint.safetensors")
    (folder / "checkpoint.safetensors").write_bytes(save(tensors, {"epoch": "1", "other": "file"}))
    evaluate(folder, samples=2, rows=20, seed=0)
    assert read_evaluation(Run(folder))["images"] == 20  # the old evaluation had other weights


def test_more_images_than_held_out_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(RunError, match="there are 180 held-out images, not 181: evaluate at most 180"):
        evaluate(runs["tiny-gaussian"], samples=1, rows=181, seed=0)
