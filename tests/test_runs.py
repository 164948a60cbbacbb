"""The folder of a run: started, resumed, and refused if damaged or of another configuration."""

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


def test_run_is_neither_overwritten_nor_resumed_with_another_configuration(tmp_path: Path) -> None:
    train(small(), tmp_path / "r", resume=False, sheet_every=1)
    with pytest.raises(RunError, match="add --resume"):
        train(small(), tmp_path / "r", resume=False, sheet_every=1)
    with pytest.raises(RunError, match=r"started with seed=0, not 1"):
        train(small(seed=1), tmp_path / "r", resume=True, sheet_every=1)


def test_checkpoint_without_a_configuration_is_refused(tmp_path: Path) -> None:
    run = train(small(), tmp_path / "r", resume=False, sheet_every=1)
    (run.folder / "config.json").unlink()
    with pytest.raises(RunError, match="already holds a run"):
        train(small(seed=1), tmp_path / "r", resume=True, sheet_every=1)


def test_resume_accepts_a_finished_and_a_missing_run(tmp_path: Path) -> None:
    train(small(), tmp_path / "r", resume=True, sheet_every=1)
    before = (tmp_path / "r" / "checkpoint.safetensors").read_bytes()
    train(small(), tmp_path / "r", resume=True, sheet_every=1)
    assert (tmp_path / "r" / "checkpoint.safetensors").read_bytes() == before


def test_second_process_cannot_write_into_a_run(tmp_path: Path) -> None:
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


def test_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
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


def test_damaged_run_is_refused_with_the_file(tmp_path: Path) -> None:
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
def test_damaged_state_is_not_resumed(tmp_path: Path, name: str, damaged: Tensor | None) -> None:
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


def test_run_resumes_on_the_same_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(device="cpu"), tmp_path, resume=False, sheet_every=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train(small(), tmp_path, resume=True, sheet_every=1).config().train.device == "cpu"
    with pytest.raises(RunError, match="was started with device='cpu', not 'cuda'"):
        train(small(device="cuda"), tmp_path, resume=True, sheet_every=1)


def test_run_of_an_older_version_is_not_resumed(tmp_path: Path) -> None:
    """The older checkpoint has moments for each layer."""
    run = train(small(), tmp_path, resume=False, sheet_every=1)
    tensors = {name.replace("exp_avg", "encoder.0.weight.exp_avg"): t for name, t in load_file(run.checkpoint).items()}
    run.checkpoint.write_bytes(save(tensors, {"epoch": "1"}))
    with pytest.raises(RunError, match="of another version"):
        train(run.config().train, tmp_path, resume=True, sheet_every=1)


def test_run_resumes_with_the_options_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of the recipe and of the working directory."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    out = ["--out", str(tmp_path / "r")]
    monkeypatch.chdir(tmp_path)
    options = ["--recipe", "jang-bernoulli", "--data", "d.npz", "--epochs", "2", "--width", "4", "--decoder-width", "4"]
    main(["train", *options, *out])
    monkeypatch.chdir("/")
    main(["train", "--resume", *out])
    main(["train", "--resume", "--recipe", "jang-bernoulli", *out])
    main(["train", "--resume", "--data", str(tmp_path / "d.npz"), *out])
    assert Run(tmp_path / "r").data().train.shape == (36, 1, 8, 8)
    with pytest.raises(SystemExit, match="was started with epochs=2, not 3"):
        main(["train", "--resume", "--epochs", "3", *out])
    with pytest.raises(SystemExit, match="was started with kind='gumbel', not 'gaussian'"):
        main(["train", "gaussian", "--resume", *out])


def test_missing_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no run: `reparam train` starts one"):
        main(["train", "--resume", "--out", str(tmp_path / "none")])
