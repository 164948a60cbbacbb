"""`reparam`: recipes and options, and what it says of those that cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reparam.export import recipes
from reparam.export.__main__ import main
from reparam.export.config import TrainConfig
from reparam.export.run import Run


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_a_whole_configuration(name: str) -> None:
    TrainConfig(**recipes.recipe(name))


def test_a_recipe_trains_and_options_win_over_it(tmp_path: Path) -> None:
    small = ["--data", "digits", "--epochs", "1", "--elbo-epochs", "0", "--out", str(tmp_path / "r")]
    command = [sys.executable, "-m", "reparam", "train", "--recipe", "dreg-50", *small]
    subprocess.run(command, check=True, timeout=120)
    config = Run(tmp_path / "r").config().train
    assert (config.objective, config.samples, config.data, config.epochs) == ("dreg", 50, "digits", 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "gaussian", "--data", "nowhere", "--out", "x"], "no data at 'nowhere'"),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--epochs", "0"], "--epochs"),
        (["train", "flow", "--data", "digits", "--out", "x"], "flow"),
        (["train", "gumbel", "--data", "digits", "--out", "x", "--latent-shape", "4"], "D x K, got [4]"),
        (["train", "gumbel", "--data", "digits", "--out", "x", "--objective", "dreg"], "needs a latent with a density"),
        (["train", "gumbel", "--data", "digits", "--out", "x", "--objective", "vimco"], "compares samples: at least 2"),
        (
            ["train", "gumbel", "--data", "digits", "--out", "x", "--objective", "vimco", "--samples", "2",
             "--straight-through"], "leave out one or the other",
        ),
        (
            ["train", "gaussian", "--data", "digits", "--out", "x", "--free-bits", "1", "--shares", "2"],
            "leave out shares",
        ),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--resampled", "2"], "leave it out, or 0, for others"),
        (
            ["train", "gaussian", "--data", "digits", "--out", "x", "--objective", "iwae", "--samples", "4",
             "--resampled", "4"], "4 of 4 samples: take fewer of more, or 0 to follow all",
        ),
        (["fit-prior", "x", "--seed", "4294967296"], "less than 4294967296"),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--straight-through"], "is for a Gumbel latent"),
        (["train", "gumbel", "--data", "digits", "--out", "x", "--elbo-epochs", "3"], "Add another objective"),
        (
            ["train", "gumbel", "--data", "digits", "--out", "x", "--straight-through", "--elbo-epochs", "30"],
            "30 of 30 epochs: leave some",
        ),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--objective", "iwae", "--free-bits", "1"], "elbo"),
        (
            ["train", "gaussian", "--data", "digits", "--out", "x", "--prior-components", "2", "--free-bits", "1"],
            "which a mixture couples",
        ),
        (
            ["train", "gaussian", "--data", "digits", "--out", "x", "--prior-components", "2", "--kl-warm-up", "30"],
            "30 of 30 epochs: leave some",
        ),
        (["train", "--recipe", "none", "--out", "x"], "no recipe 'none'; there are: dreg-50"),
        (["train", "--out", "x"], "kind is missing: --help says what it is\ndata is missing"),
        (["train", "gumbel", "--data", "digits", "--out", "x", "--tau-start", "inf"], "--tau-start 'inf'"),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--free-bits", "inf"], "--free-bits 'inf'"),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--width", "1" + 12 * "0"], "not enough memory"),
        (["train", "gumbel", "--data", "digits", "--out", "x", "--body", "mlp", "--dense", "8"], "all its layers in"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["inspect", "nowhere"], "cannot be read"),
        (["train", "gaussian", "--data", "digits", "--out", "/dev/null/x"], "Not a directory"),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--width", "8,x"], "--width 'x'"),
        (["train", "gaussian", "--data", "digits", "--out", "x", "--learning-rate", "0"], "--learning-rate '0'"),
    ],
)  # fmt: skip
def test_the_command_line_says_what_is_wrong_without_a_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit) as end:  # with what Python prints then, or 2 after having printed it
        main()
    printed = capsys.readouterr().err
    assert says in (printed if end.value.code == 2 else str(end.value.code))


def test_a_fault_ends_the_command_with_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reparam", "evaluate", "nowhere"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("nowhere holds no run")
