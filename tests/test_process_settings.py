"""The settings of `reparam serve`, on the command line and in the environment."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from reparam.service.__main__ import main
from reparam.service.runtime import devices
from reparam.service.runtime.devices import DeviceError
from reparam.service.settings import Settings
from tests.processes import ALONE, process

Refuse = Callable[..., str]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Return what `reparam serve` prints before it ends with this status."""

    def refuse(*arguments: str, status: int = 2, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main(["serve", *arguments])
        assert end.value.code == status
        printed = capsys.readouterr()
        return printed.out if status == 0 else printed.err

    return refuse


def test_help_lists_every_setting(refuse: Refuse) -> None:
    text = refuse("--help", status=0)
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
    assert "REPARAM_PORT=9000" in text


def test_the_command_line_wins_over_the_environment(refuse: Refuse) -> None:
    assert "--port or REPARAM_PORT='70000'" in refuse("--port", "70000", REPARAM_PORT="1234")


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ((), {"REPARAM_PORT": "http"}, "REPARAM_PORT='http': Input should be a valid integer"),
        ((), {"REPARAM_PORT": "tcp://10.0.0.1:80"}, "give the pod `enableServiceLinks: false`"),
        ((), {"REPARAM_DEVICE": "tpu"}, "REPARAM_DEVICE='tpu': Input should be 'auto', 'cpu' or 'cuda'"),
        ((), {"REPARAM_MAX_BATCH_ROWS": "0"}, "REPARAM_MAX_BATCH_ROWS='0'"),
        (("--drain-delay", "inf"), {}, "a finite number"),
        (("--drain-timeout", "2500000"), {}, "less than or equal to 86400"),
        ((), {"REPARAM_API_KEY": "two words"}, "an API key is made of printable ASCII without blanks"),
    ],
)
def test_a_bad_setting_is_named(
    refuse: Refuse, arguments: tuple[str, ...], environment: dict[str, str], says: str
) -> None:
    message = refuse(*arguments, **environment)
    assert says in message
    assert "--help" in message
    assert "two words" not in message


def test_an_unknown_option_is_a_usage_error(refuse: Refuse) -> None:
    assert "--prot" in refuse("--prot", "1")


def test_compose_passes_every_setting_on() -> None:
    compose = (Path(__file__).parent.parent / "docker-compose.yml").read_text()
    of_the_image = {"host", "port", "artifacts"}
    passed_on = re.findall(r"^      REPARAM_([A-Z0-9_]+):$", compose, re.MULTILINE)
    assert sorted(passed_on) == sorted(name.upper() for name in Settings.model_fields.keys() - of_the_image)


def test_auto_takes_a_device_that_works_and_logs_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert devices.choose(Settings(tf32=True)).reason.startswith("REPARAM_DEVICE=auto")
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    assert devices.choose(Settings()).reason.startswith("REPARAM_DEVICE=auto")
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert devices.choose(Settings(device="cpu")).attempts == (("CPUExecutionProvider",),)


def test_cuda_works_or_the_service_refuses_to_start_and_names_what_is_missing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if devices.choose(Settings()).name == "cuda":
        with process(repository, **{**ALONE, "REPARAM_DEVICE": "cuda"}) as service:
            models = service.get("/models").json()["models"]
        assert {model["provider"] for model in models} == {"CUDAExecutionProvider"}
    else:
        monkeypatch.setenv("REPARAM_DEVICE", "cuda")
        with pytest.raises(SystemExit, match=r"=cuda, but .*(libcuda|no GPU|no CUDA provider|cannot be loaded)"):
            main(["serve"])


def test_only_linux_shares_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert devices.choose(Settings(device="cpu")).workers == 1
    with pytest.raises(DeviceError, match="REPARAM_WORKERS=2"):
        devices.choose(Settings(device="cpu", workers=2))
