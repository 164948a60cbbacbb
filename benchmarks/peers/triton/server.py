"""The tritonserver in the nvidia-pytriton wheel, without pytriton. Needs the Python 3.11 of Debian or Ubuntu."""

import os
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
TRITON = SITE / "pytriton" / "tritonserver"


def main() -> None:
    backend = Path(os.environ["SCRATCH"]) / "triton-backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    stub = TRITON / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    for source in [*(TRITON / "backends" / "python").glob("*.*"), stub]:
        link = backend / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    os.environ["LD_LIBRARY_PATH"] = str(SITE / "nvidia_pytriton.libs")
    os.environ["PYTHONPATH"] += f"{os.pathsep}{SITE}"
    options = {
        "model-repository": Path(__file__).parent / "models",
        "backend-directory": backend.parent,
        "http-address": "127.0.0.1",
        "http-port": os.environ["PORT"],
        "http-thread-count": 4,
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    program = str(TRITON / "bin" / "tritonserver")
    os.execv(program, [program, *(f"--{name}={value}" for name, value in options.items())])


if __name__ == "__main__":
    main()
