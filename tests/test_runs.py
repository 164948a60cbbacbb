"""The folder of a training: begun, gone on with, and not when it is another's or damaged."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from reparam.export.__main__ import main
from reparam.export.errors import RunError
from reparam.export.evaluate import evaluate
from reparam.export.files import write_atomically
from reparam.export.prior import fit_prior
from reparam.export.run import Run
from reparam.export.train import train
from tests.conftest import small

OPTIONS = ["--data", "digits", "--epochs", "6", "--width", "8,8", "--tau-every", "7", "--seed", "3"]


def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path: Path) -> None:
    train(small(), tmp_path / "r", resume=False, sheet_every=1)
    with pytest.raises(RunError, match="add --resume"):
        train(small(), tmp_path / "r", resume=False, sheet_every=1)
    with pytest.raises(RunError, match=r"started with seed=0, not 1"):
        train(small(seed=1), tmp_path / "r", resume=True, sheet_every=1)


def test_a_checkpoint_without_its_configuration_is_not_taken_over(tmp_path: Path) -> None:
    run = train(small(), tmp_path / "r", resume=False, sheet_every=1)
    (run.folder / "config.json").unlink()
    with pytest.raises(RunError, match="already holds a run"):
        train(small(seed=1), tmp_path / "r", resume=True, sheet_every=1)


def test_resuming_a_finished_or_a_missing_run_is_no_error(tmp_path: Path) -> None:
    train(small(), tmp_path / "r", resume=True, sheet_every=1)
    before = (tmp_path / "r" / "checkpoint.safetensors").read_bytes()
    train(small(), tmp_path / "r", resume=True, sheet_every=1)
    assert (tmp_path / "r" / "checkpoint.safetensors").read_bytes() == before


def test_two_do_not_write_into_one_folder(tmp_path: Path) -> None:
    run = train(small(), tmp_path / "r", resume=False, sheet_every=1)
    before = run.metrics.read_bytes()
    with run.locked():
        with pytest.raises(RunError, match=r"another process works in .*r: wait"):
            train(small(), tmp_path / "r", resume=True, sheet_every=1)
        with pytest.raises(RunError, match="another process"):
            evaluate(run.folder, samples=1, rows=10, seed=0)
        with pytest.raises(RunError, match="another process"):
            fit_prior(run.folder, components=2, seed=0)
    assert run.metrics.read_bytes() == before
    assert evaluate(run.folder, samples=1, rows=10, seed=0)["images"] == 10


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path: Path) -> None:
    run = train(small(), tmp_path / "r", resume=False, sheet_every=1)
    before = run.checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"not written: '.*checkpoint\.safetensors'"):
            write_atomically(run.checkpoint, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.checkpoint.read_bytes() == before
    assert not list(run.folder.glob(".*"))


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        Run(tmp_path / "none").trained()
    run = train(small(), tmp_path / "r", resume=False, sheet_every=1)
    whole = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(whole[:-10])
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged"):
        run.trained()
    run.checkpoint.unlink()
    with pytest.raises(RunError, match="finished 0 of 1 epochs"):
        run.trained()
    (run.folder / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        run.trained()


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("optimizer.step", torch.ones(2)),
        ("optimizer.step", torch.ones((), dtype=torch.int64)),
        ("optimizer.exp_avg", torch.zeros(1)),
        ("optimizer.exp_avg_sq", None),
        ("model.decoder.1.bias", torch.zeros(3)),
        ("average.decoder.1.bias", torch.tensor(torch.nan)),
        ("average.decoder.1.bias", None),
    ],
)
def test_a_damaged_state_is_not_continued(tmp_path: Path, name: str, damaged: Tensor | None) -> None:
    config = small(average=0.9, epochs=2)
    run = train(config, tmp_path, resume=False, sheet_every=9)
    tensors = load_file(run.checkpoint)
    before = tensors.pop(name)
    if damaged is not None:
        tensors[name] = damaged.expand_as(before).contiguous() if damaged.isnan().any() else damaged
    run.checkpoint.write_bytes(save(tensors, {"epoch": "1"}))
    with pytest.raises(
        RunError, match=r"checkpoint\.safetensors is damaged or of another version \([^\n]*\): train again"
    ):
        train(config, tmp_path, resume=True, sheet_every=9)


def test_a_run_goes_on_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(device="cpu"), tmp_path, resume=False, sheet_every=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train(small(), tmp_path, resume=True, sheet_every=1).config().train.device == "cpu"
    with pytest.raises(RunError, match="was started with device='cpu', not 'cuda'"):
        train(small(device="cuda"), tmp_path, resume=True, sheet_every=1)


def test_a_run_of_an_older_version_is_not_continued(tmp_path: Path) -> None:
    """One whose optimizer had moments for each layer."""
    run = train(small(), tmp_path, resume=False, sheet_every=1)
    tensors = {name.replace("exp_avg", "encoder.0.weight.exp_avg"): t for name, t in load_file(run.checkpoint).items()}
    run.checkpoint.write_bytes(save(tensors, {"epoch": "1"}))
    with pytest.raises(RunError, match="of another version"):
        train(run.config().train, tmp_path, resume=True, sheet_every=1)


def test_a_run_goes_on_by_what_it_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its recipe says, and from whatever folder."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    out = ["--out", str(tmp_path / "r")]
    monkeypatch.chdir(tmp_path)
    options = ["--recipe", "jang-bernoulli", "--data", "d.npz", "--epochs", "2", "--width", "4", "--decoder-width", "4"]
    run_command(monkeypatch, "train", *options, *out)
    monkeypatch.chdir("/")
    run_command(monkeypatch, "train", "--resume", *out)
    run_command(monkeypatch, "train", "--resume", "--recipe", "jang-bernoulli", *out)
    run_command(monkeypatch, "train", "--resume", "--data", str(tmp_path / "d.npz"), *out)
    assert Run(tmp_path / "r").data().train.shape == (36, 1, 8, 8)
    with pytest.raises(SystemExit, match="was started with epochs=2, not 3"):
        run_command(monkeypatch, "train", "--resume", "--epochs", "3", *out)
    with pytest.raises(SystemExit, match="was started with kind='gumbel', not 'gaussian'"):
        run_command(monkeypatch, "train", "gaussian", "--resume", *out)


def test_a_run_that_is_not_there_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="holds no run: `reparam train` makes one"):
        run_command(monkeypatch, "train", "--resume", "--out", str(tmp_path / "none"))


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    main()
