"""The command `reparam`: its help, its exit status, recipes and options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reparam._commands import COMMANDS
from reparam.export import recipes
from reparam.export.__main__ import main
from reparam.export.config import TrainConfig
from reparam.export.run import Run

ROOT = Path(__file__).parent.parent


def reparam(*words: str, cwd: Path | None = None, blocked: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs `reparam` in a process of its own.

    words: the command and its options.
    blocked: a package that cannot be imported there, as if it were not installed.
    """
    block = f"sys.modules[{blocked!r}] = None" if blocked else ""
    program = f"import sys; {block}\nfrom reparam._commands import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = reparam(command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: reparam {command} ")


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.extra])
def test_the_help_has_an_example(command: str) -> None:
    assert f"\nExample: reparam {command} " in reparam(command, "--help").stdout


def test_the_help_lists_every_command() -> None:
    result = reparam("--help")
    assert (result.returncode, result.stderr) == (0, "")
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ") and "reparam" not in line]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "usage: reparam COMMAND"),
        (("srve",), "unknown command 'srve'; did you mean serve?"),
        (("frobnicate",), "unknown command 'frobnicate'; `reparam --help` lists the commands"),
        (("publish", "runs/x"), "required: --name"),
        (("publish", "runs/x", "--name"), "expected one argument"),
        (("train", "gaussian", "--data", "digits", "--out", "x", "--epochs", "0"), "--epochs '0'"),
        (("serve", "--port", "70000"), "--port or REPARAM_PORT='70000'"),
        (("serve", "here", "--artifacts", "there"), "leave out here or --artifacts"),
    ],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...], says: str) -> None:
    result = reparam(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "blocked", "extra"),
    [
        (("serve",), "fastapi", "serve"),
        (("train", "gaussian", "--data", "digits", "--out", "x"), "torch", "export"),
        (("inspect", "x"), "onnxruntime", "artifact"),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(words: tuple[str, ...], blocked: str, extra: str) -> None:
    result = reparam(*words, blocked=blocked)
    assert result.returncode == 1
    assert result.stderr == f"reparam {words[0]} needs the package {blocked}: pip install 'reparam[{extra}]'\n"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_published_model_is_checked_without_torch(command: str) -> None:
    result = reparam(command, "artifacts/gumbel-mnist/3", cwd=ROOT, blocked="torch")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("folder", "command"), [("service", "reparam serve"), ("export", "reparam train")])
def test_a_folder_run_as_a_module_says_what_to_type(folder: str, command: str) -> None:
    result = subprocess.run([sys.executable, "-m", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert command in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_serve_takes_the_folder_named_else_the_artifacts_here_else_the_demo_models(tmp_path: Path) -> None:
    assert served_from(tmp_path) == ROOT / "reparam" / "artifacts"
    (tmp_path / "artifacts").mkdir()
    assert served_from(tmp_path) == tmp_path / "artifacts"
    assert served_from(tmp_path, "mine") == tmp_path / "mine"
    assert served_from(tmp_path, REPARAM_ARTIFACTS="theirs") == tmp_path / "theirs"
    assert served_from(tmp_path, "--artifacts", "mine", REPARAM_ARTIFACTS="theirs") == tmp_path / "mine"


def served_from(cwd: Path, *options: str, **environment: str) -> Path:
    """Returns the folder of models that `reparam serve` logs first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "reparam", "serve", "--port", "0", "--workers", "1", *options],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    line = json.loads(process.stderr.readline())
    process.kill()
    process.communicate()
    return Path(line["folder"])


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
        (["train", "gaussian", "--data", "digits", "--out", "x", "--resampled", "2"], "leave resampled out, or set 0"),
        (
            ["train", "gaussian", "--data", "digits", "--out", "x", "--objective", "iwae", "--samples", "4",
             "--resampled", "4"], "4 of 4 samples: choose a smaller number, or 0 for all",
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
        (["train", "--out", "x"], "kind is missing: --help describes it\ndata is missing"),
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
def test_a_message_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr().err
    assert says in (
        printed if end.value.code == 2 else str(end.value.code)
    )  # Python itself prints a message and exits with 1


def test_a_failure_exits_with_1(tmp_path: Path) -> None:
    result = reparam("evaluate", "nowhere", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("nowhere holds no run")
