"""Training: resumed or not, the same weights."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reparam.export.__main__ import main
from reparam.export.compute import use_device
from reparam.export.data import load
from reparam.export.errors import RunError
from reparam.export.evaluate import evaluate
from reparam.export.learner import Learner
from reparam.export.prior import fit_prior
from reparam.export.run import Run
from reparam.export.train import train, train_epoch
from reparam.models import GumbelVAE, VAEConfig
from tests.conftest import small

ROOT = Path(__file__).parent.parent

OPTIONS = ["--data", "digits", "--epochs", "4", "--width", "8,8", "--tau-every", "7", "--seed", "3"]
COMMANDS = {
    "gaussian": ["train", "gaussian", "--average", "0.9", *OPTIONS],
    "gumbel": ["train", "gumbel", "--prior-components", "3", *OPTIONS],
}
# Trains each command until the metrics of epoch 3 are written, then kills the process: epoch 3 has no checkpoint.
KILLED_IN_EPOCH_3 = f"""
import os, signal
from pathlib import Path
from reparam.export.__main__ import main
from reparam.export.run import Run

write, commands = Run.log, {COMMANDS}

def write_then_die(run, line):
    write(run, line)
    if line["epoch"] == 3:
        train_next()

def train_next():
    if not commands:
        os.kill(os.getpid(), signal.SIGKILL)
    kind, command = commands.popitem()
    main([*command, "--out", kind])

Run.log = write_then_die
train_next()
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs, killed in epoch 3 of 4."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", KILLED_IN_EPOCH_3], cwd=folder, env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("kind", COMMANDS)
def test_killed_training_resumes_to_the_same_weights(tmp_path: Path, killed: Path, kind: str) -> None:
    main([*COMMANDS[kind], "--out", str(tmp_path / "whole")])
    run = Run(Path(shutil.copytree(killed / kind, tmp_path / "killed")))
    with pytest.raises(RunError, match="finished 2 of 4 epochs: continue it with `train --resume`"):
        run.trained()
    with run.metrics.open("ab") as metrics:
        metrics.write(b'{"epoch": 4, "elbo"\n\xff\n[]\n{"epoch": 99}')
    main(["train", "--out", str(run.folder), "--resume"])
    whole, resumed = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert [json.loads(line)["epoch"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_parallel_shares_train_to_the_same_weights_again(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for name in ("one", "other"):
        train(small(shares=3), tmp_path / name, resume=False, sheet_every=1)
    assert torch.get_num_threads() == threads
    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(RunError, match="was started with shares=3, not 2"):
        train(small(shares=2), tmp_path / "one", resume=True, sheet_every=1)
    # Without an option the run keeps its number of shares, on any machine.
    train(small(), tmp_path / "one", resume=True, sheet_every=1)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    del config["train"]["shares"]
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    train(small(), tmp_path / "one", resume=True, sheet_every=1)


def test_run_writes_metrics_and_a_contact_sheet(runs: dict[str, Path]) -> None:
    (line,) = (runs["tiny-gaussian"] / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["epoch"] == 1
    assert metrics["held_out_elbo"] < 0 < metrics["kl"]
    with Image.open(runs["tiny-gaussian"] / "sheets" / "epoch-0001.png") as sheet:
        assert sheet.size == (2 * (8 * 10 + 2), 8 * 10 + 2)


def test_training_improves_the_bound(tmp_path: Path) -> None:
    train(small(epochs=6, width=(16, 16), batch_size=32), tmp_path / "r", resume=False, sheet_every=9)
    bounds = [json.loads(line)["held_out_elbo"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert bounds[-1] > bounds[0] + 3


def test_binary_images_are_not_binarized_again(tmp_path: Path) -> None:
    images = 255 * np.random.default_rng(0).integers(0, 2, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "binary.npz", images=images)
    for name, binarize in (("drawn", True), ("taken", False)):
        config = small(data=str(tmp_path / "binary.npz"), binarize=binarize)
        train(config, tmp_path / name, resume=False, sheet_every=1)
    drawn, taken = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("drawn", "taken"))
    assert all(torch.equal(drawn[key], taken[key]) for key in drawn)
    assert evaluate(tmp_path / "drawn", samples=1, rows=None, seed=0)["binarization"] == "static"


@pytest.mark.parametrize("grey", ["train", "test"])
def test_images_with_grey_pixels_in_one_part_are_binarized(tmp_path: Path, grey: str) -> None:
    random = np.random.default_rng(0)
    parts = {name: 255 * random.integers(0, 2, (20, 8, 8), np.uint8) for name in ("train", "test")}
    parts[grey] = random.integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(tmp_path / "half.npz", train=parts["train"], test=parts["test"])
    found = []
    for binarize in (True, False):
        run = tmp_path / str(binarize)
        train(small(data=str(tmp_path / "half.npz"), binarize=binarize), run, resume=False, sheet_every=1)
        found.append(json.loads((run / "metrics.jsonl").read_text())["held_out_elbo"])
    assert found[0] != found[1]


def test_mlp_trains(tmp_path: Path) -> None:
    run = train(small(body="mlp", width=(16,), latent_shape=(2, 3)), tmp_path / "r", resume=False, sheet_every=9)
    assert run.trained().config.latent_shape == (2, 3)


@pytest.mark.parametrize("options", [{"learning_rate": 1e30}, {"learning_rate": 1e3, "body": "mlp", "epochs": 2}])
def test_diverging_training_fails(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="lower --learning-rate"):
        train(small(**{"width": (8,), "latent_shape": (2,), **options}), tmp_path, resume=False, sheet_every=1)


def test_variable_below_free_bits_keeps_its_prior(tmp_path: Path) -> None:
    config = small(kind="gumbel", latent_shape=(3, 4), free_bits=9.0)
    model = train(config, tmp_path / "r", resume=False, sheet_every=1).trained()
    assert not model.prior().parameters[0].softmax(-1).sub(0.25).any()


def test_trained_network_has_the_averaged_weights(tmp_path: Path) -> None:
    run = train(small(average=0.9, epochs=2), tmp_path / "r", resume=False, sheet_every=9)
    tensors = load_file(run.checkpoint)
    name = next(name for name in run.trained().state_dict() if name.startswith("decoder"))
    assert torch.equal(run.trained().state_dict()[name], tensors[f"average.{name}"])
    assert not torch.equal(tensors[f"model.{name}"], tensors[f"average.{name}"])


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["gaussian", "gumbel"])
def test_device_trains_resumes_and_evaluates(tmp_path: Path, kind: str, device: str) -> None:
    latent_shape = (4,) if kind == "gaussian" else (4, 3)
    run = train(small(kind=kind, latent_shape=latent_shape, device=device), tmp_path, resume=False, sheet_every=1)
    model = run.config().build().to(device)
    learner = Learner(model, 0.0)
    assert run.restore(learner.load) == 1
    assert {tensor.device.type for tensor in learner.state().values()} == {device}
    pixels = torch.from_numpy(load("digits").test.copy()).to(device)
    assert math.isfinite(train_epoch(learner, pixels, run.config().train, 1)["elbo"])
    fit_prior(tmp_path, components=2, seed=0)
    found = evaluate(tmp_path, samples=3, rows=20, seed=0, device="cuda" if device == "cuda" else "cpu")
    assert -64 < found["elbo"] < found["bound"] < 0
    assert math.isfinite(found["mixture_bound"])


def test_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert use_device(None).type == "cpu"
    with pytest.raises(RunError, match=r"device 'cuda': this torch .* --device cpu"):
        use_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert use_device(None).type == use_device("cuda").type == "cuda"
    assert use_device("cpu").type == "cpu"


def test_training_step_updates_the_prior_of_a_gumbel_vae(tmp_path: Path) -> None:
    """p(z) becomes 0.98 p(z) + 0.02 mean q(z | x), for any weight of the KL term and any number of shares."""
    torch.manual_seed(0)
    model = GumbelVAE(VAEConfig((1, 8, 8), (3, 4), "mlp", (5,)))
    with torch.no_grad():
        model.prior_logits.normal_()
        model.prior_logits.copy_(model.prior_logits.log_softmax(-1))
        for weight in model.encoder.parameters():
            weight.mul_(3)
    pixels = torch.from_numpy(load("digits").train[:11].copy())
    used = model.encode(pixels.float() / 255)[0].softmax(-1).mean(0)
    expected = 0.98 * model.prior_logits.exp() + 0.02 * used
    train_epoch(Learner(model, 0.0), pixels, small(kind="gumbel", binarize=False, shares=2, kl_warm_up=5), 0)
    torch.testing.assert_close(model.prior_logits.exp(), expected)


@pytest.mark.parametrize(
    ("kind", "then"),
    [
        ("gumbel", {"straight_through": True}),
        ("gumbel", {"objective": "vimco", "samples": 2}),
        ("gaussian", {"objective": "dreg", "samples": 2}),
        ("gaussian", {"objective": "iwae", "samples": 3, "resampled": 2}),
    ],
)
def test_objective_begins_after_the_elbo_epochs(tmp_path: Path, kind: str, then: dict[str, Any]) -> None:
    options = {"kind": kind, "latent_shape": (3, 4), "epochs": 2, "shares": 1}
    tail = small(**options, **then, elbo_epochs=1)
    curves = []
    for name, config in ("elbo", small(**options)), ("tail", tail), ("none", small(**options, **then)):
        run = train(config, tmp_path / name, resume=False, sheet_every=2)
        curves.append([json.loads(line)["elbo"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()])
    assert curves[1][0] == curves[0][0] != curves[2][0]
    assert curves[1][1] != curves[0][1]
