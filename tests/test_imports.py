"""Who may import whom: docs/architecture.md, held."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PEERS = "benchmarks/peers"
PACKAGES = ("models", "export", "service", "reparam", "benchmarks", PEERS)
MAY_IMPORT = {
    "models": {"torch"},
    "export": {
        "models", "service", "torch", "onnx", "onnxruntime", "safetensors",
        "numpy", "scipy", "pydantic", "pydantic_settings", "PIL", "sklearn", "threadpoolctl", "tqdm",
    },
    "service": {
        "fastapi", "starlette", "uvicorn", "httptools", "pydantic", "pydantic_settings", "numpy", "scipy",
        "onnxruntime", "pydantic_core", "PIL", "orjson", "mimeparse", "prometheus_client", "pythonjsonlogger",
    },
    "reparam": {"httpx", "numpy", "PIL"},
    "benchmarks": {"reparam", "numpy"},
    PEERS: {
        "benchmarks", "export", "models", "service", "torch", "onnx", "onnxruntime", "numpy", "PIL", "uvicorn",
        "fastapi", "pydantic",
    },
}  # fmt: skip
# Of the service, export shares what the artifact is made of, and the contact sheet.
SHARED_WITH_EXPORT = {"service", "service.artifact", "service.contract", "service.noise", "service.pictures"}


def modules(package: str) -> dict[str, Path]:
    """Those in the folders of PEERS are programs for environments of their own."""
    found = Path(package).glob("*.py") if package == PEERS else Path(package).rglob("*.py")
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(found)
        if package == PEERS or Path(PEERS) not in path.parents
    }


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it; for `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package} | set(sys.stdlib_module_names)
    for path in modules(package).values():
        foreign = {name for name in imports(path) if name.split(".")[0] not in allowed}
        assert not foreign, f"{path} imports {foreign}"


def test_export_uses_of_the_service_only_the_artifact() -> None:
    known = modules("service")
    for path in modules("export").values():
        used = {name for name in imports(path) if name in known}
        assert used <= SHARED_WITH_EXPORT, f"{path} imports {used}"


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_import_cycles(package: str) -> None:
    known = modules(package)
    # A package's __init__ names its parts; that they import the package's name for other parts is no cycle.
    graph = {
        name: {used for used in imports(path) if used in known and used not in (name, package)}
        for name, path in known.items()
    }
    tuple(TopologicalSorter(graph).static_order())


def test_the_service_runs_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import service.__main__"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_sdk_imports_neither_torch_nor_onnxruntime() -> None:
    program = "import sys, reparam; assert not {'torch', 'onnxruntime', 'PIL', 'service'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("module", ["service.artifact", "export.verify"])
def test_onnxruntime_reports_nothing_to_its_makers(module: str, tmp_path: Path) -> None:
    """As it does from 1.29 on, unless it takes itself to be tested. An identifier and what is still to be sent lie then
    in the home folder."""
    program = f"import {module}, time; time.sleep(0.2)"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment | {"HOME": str(tmp_path)})
    assert list(tmp_path.rglob("*")) == []
