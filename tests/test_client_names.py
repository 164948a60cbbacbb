"""Public names of the package, their types and their documentation."""

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

import reparam
from reparam._cli import _parser
from reparam._options import CHECKS

ERRORS = {
    "BadRequest", "ConnectionFailed", "DeadlineExceeded", "Invalid", "MethodNotAllowed", "NotAcceptable", "NotFound",
    "Overloaded", "ReparamError", "ServerError", "StatusError", "TimedOut", "TooLarge", "Unauthorized", "Unavailable",
    "UnsupportedMediaType",
}  # fmt: skip
PUBLIC = {"AsyncClient", "Client", "Model", "SampleOptions", "Samples", "__version__"} | ERRORS
PARAMETERS = {"mu", "log_var", "logits"}


def test_these_names_are_public_and_no_others() -> None:
    assert set(reparam.__all__) == set(dir(reparam)) == PUBLIC
    assert reparam.__all__ == sorted(PUBLIC)
    modules = {path.stem for path in Path(reparam.__file__).parent.glob("*.py")}
    assert all(name.startswith("_") for name in modules)


def test_everything_public_is_documented() -> None:
    for name in PUBLIC - {"__version__"}:
        value = getattr(reparam, name)
        assert value.__doc__, name
        for member, function in inspect.getmembers(value, inspect.isfunction):
            assert member.startswith("_") or function.__doc__, f"{name}.{member}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'reparam' has no attribute 'Cleint'"):
        reparam.Cleint  # type: ignore[attr-defined]  # noqa: B018  # a wrong name on purpose


def test_errors_and_samples_are_named_by_the_package() -> None:
    assert str(reparam.NotFound) == "<class 'reparam.NotFound'>"
    samples = reparam.Samples(
        images=np.zeros((2, 1, 2, 2), np.uint8), model="m", version=1, seed=1, start=0, noise_version=1
    )
    assert repr(pickle.loads(pickle.dumps(samples))) == repr(samples)


@pytest.mark.parametrize("module", ["reparam.service.app", "reparam._commands"])
def test_the_other_parts_load_no_client(module: str) -> None:
    script = f"import sys, {module}; print(*(name for name, loaded in sys.modules.items() if loaded))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"httpx", "httpx2", "reparam._client"} & set(ran.stdout.split())


def test_the_clients_load_little() -> None:
    heavy = {
        "PIL",
        "argparse",
        "asyncio",
        "importlib.metadata",
        "numpy.random",
        "torch",
        "onnxruntime",
        "reparam.service",
    }
    libraries = "import sys, numpy, reparam; from reparam._http import httpx"
    script = f"{libraries}; before = set(sys.modules); reparam.Client; print(*(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "reparam._client" in loaded
    assert not heavy & loaded


def test_the_command_line_has_every_option_but_the_parameters() -> None:
    defaults = vars(_parser().parse_args(["sample", "-o", "x.png"]))
    assert defaults.keys() & CHECKS.keys() == CHECKS.keys() - PARAMETERS
    assert get_type_hints(reparam.SampleOptions).keys() == CHECKS.keys()


def test_the_documentation_names_every_option() -> None:
    documented = re.findall(r"^(\w+(?:, \w+)*): ", inspect.getdoc(reparam.SampleOptions) or "", re.MULTILINE)
    assert ", ".join(documented).split(", ") == list(CHECKS)


def test_type_checkers_know_every_name_and_option(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TYPED)
    options = [
        "--strict",
        "--config-file=",
        "--cache-dir=.mypy_cache/tests",
    ]  # the cache of `make check` stays as it is
    command = [sys.executable, "-m", "mypy", *options, str(program)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(reparam.__file__).parents[1])
    found = re.findall(r"program\.py:(\d+): error: (.*)", ran.stdout)
    errors = {int(number): message for number, message in found}
    expected = {number: line.split("# ")[1] for number, line in enumerate(TYPED.splitlines(), 1) if "# " in line}
    assert errors.keys() == expected.keys(), ran.stdout
    for number, message in expected.items():
        assert message in errors[number]


TYPED = """
from typing import Any, assert_type
import numpy as np
import reparam

with reparam.Client() as client:
    samples = client.sample(3, model="m", temperature=1, hard=True, seed=None, mu=np.zeros(3), outputs="codes")
    client.sample(**samples.request)
    options: reparam.SampleOptions = {"seed": 3, "temperature": 0.5}
    for batch in client.iter_samples(2, output="codes", **options):
        assert_type(batch[0], reparam.Samples)
    client.sample(temprature=1)  # Unexpected keyword argument "temprature"
    client.sample(hard="yes")  # incompatible type "str"; expected "bool | None"
    client.iter_samples(outputs="images")  # Unexpected keyword argument "outputs"
reparam.Cleint  # Module has no attribute "Cleint"

async def main() -> None:
    async with reparam.AsyncClient() as client:
        assert_type(await client.sample(3, seed=7), reparam.Samples)
        await client.sample(sed=7)  # Unexpected keyword argument "sed"
"""
