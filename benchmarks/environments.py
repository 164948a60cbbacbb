"""A virtual environment for each peer, made from pinned requirements."""

import shutil
import subprocess
import sys
from pathlib import Path


def environment(requirements: Path, folder: Path) -> Path:
    """The `bin` folder of an environment. Makes the environment if missing, or if the requirements have changed."""
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        print(f"making {folder} ...", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "-r", requirements], check=True)
        shutil.copy(requirements, stamp)
    return folder / "bin"
