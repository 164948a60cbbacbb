"""The distribution: the files of its wheel, the packages it needs, and the checkout it is built from."""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from mypy.main import process_options
from packaging.requirements import Requirement

from reparam import __version__

ROOT = Path(__file__).parent.parent
LINKED = ("artifacts", "export", "models", "service")
DATA = {".py", ".toml", ".onnx", ".typed"}


def files_below(folder: Path, suffixes: set[str]) -> Iterator[str]:
    """Names of the files in a folder, with those behind links, relative to the root of the repository."""
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (str((Path(place) / name).relative_to(ROOT)) for name in names if Path(name).suffix in suffixes)


def hatch(target: str, source: Path, out: Path) -> Path:
    """Builds the wheel or the sdist of a source folder. Returns the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the wheel that is built from the checkout."""
    return contents(hatch("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: dict[str, bytes]) -> Message:
    (text,) = (content for name, content in wheel.items() if name.endswith("/METADATA"))
    return message_from_bytes(text)


def test_the_wheel_holds_every_module_recipe_and_demo_model_and_nothing_else(wheel: dict[str, bytes]) -> None:
    about = f"reparam-{__version__}.dist-info/"
    assert {name for name in wheel if not name.startswith(about)} == set(files_below(ROOT / "reparam", DATA))


def test_a_wheel_from_the_sdist_has_the_same_files(wheel: dict[str, bytes], tmp_path: Path) -> None:
    with tarfile.open(hatch("sdist", ROOT, tmp_path / "sdist")) as sdist:
        sdist.extractall(tmp_path, filter="data")
    assert contents(hatch("wheel", tmp_path / f"reparam-{__version__}", tmp_path / "wheel")) == wheel


@pytest.mark.parametrize("folder", LINKED)
def test_the_package_links_to_the_folders_at_the_top(folder: str) -> None:
    assert (ROOT / "reparam" / folder).readlink() == Path("..") / folder


def test_mypy_and_ruff_see_every_module() -> None:
    folders = ("reparam", "export", "models", "service", "tests", "benchmarks")
    written = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    sources, _ = process_options(["--config-file", str(ROOT / "pyproject.toml")])
    assert written - {Path(source.path).resolve() for source in sources if source.path} == set()
    ruff = [sys.executable, "-m", "ruff", "check", "--show-files", str(ROOT)]
    listed = subprocess.run(ruff, check=True, capture_output=True, text=True).stdout
    assert written - {Path(line).resolve() for line in listed.splitlines()} == set()


def test_the_package_alone_needs_httpx_and_numpy(metadata: Message) -> None:
    assert needs(metadata, extra="") == {"httpx", "numpy"}
    assert metadata["Version"] == __version__


def test_torch_is_needed_by_export_only(metadata: Message) -> None:
    extras = metadata.get_all("Provides-Extra", [])
    assert {extra for extra in extras if "torch" in needs(metadata, extra)} == {"export"}


def needs(metadata: Message, extra: str) -> set[str]:
    """Returns the names of the distributions that an extra adds; "" for those of the package itself."""
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    if not extra:
        return {line.name for line in lines if line.marker is None}
    return {line.name for line in lines if line.marker and line.marker.evaluate({"extra": extra})}
