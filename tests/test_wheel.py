"""The wheel is the SDK, and nothing else."""

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

from reparam import __version__


def test_the_wheel_holds_the_sdk_alone_and_needs_httpx_and_numpy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        (metadata,) = (message_from_bytes(wheel.read(name)) for name in names if name.endswith("/METADATA"))
    assert {name.split("/")[0] for name in names} == {"reparam", f"reparam-{__version__}.dist-info"}
    assert "reparam/py.typed" in names
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split("<")[0].split(">")[0] for line in needed) == ["httpx", "numpy"]
    assert metadata["Version"] == __version__
