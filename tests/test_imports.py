"""The layout of docs/architecture.md: which package and which room may import which."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import reparam

PEERS = "benchmarks/peers"
PACKAGES = ("models", "export", "service", "reparam", "benchmarks", PEERS)
# Packages of others, and parts of this distribution, that each package may import.
MAY_IMPORT = {
    "models": {"torch", "reparam.models"},
    "export": {
        "torch", "onnx", "onnxruntime", "safetensors",
        "numpy", "scipy", "pydantic", "pydantic_settings", "PIL", "sklearn", "threadpoolctl", "tqdm",
        "reparam.export", "reparam.models", "reparam.service.artifact", "reparam.service.pictures",
        "reparam._version", "reparam._help",
    },
    "service": {
        "fastapi", "starlette", "uvicorn", "httptools", "pydantic", "pydantic_settings", "numpy", "scipy",
        "onnxruntime", "pydantic_core", "PIL", "orjson", "mimeparse", "prometheus_client", "pythonjsonlogger",
        "reparam.service", "reparam._version", "reparam._help",
    },
    "reparam": {"httpx", "httpx2", "numpy", "PIL"},
    "benchmarks": {"numpy", "benchmarks"},
    PEERS: {
        "benchmarks", "torch", "onnx", "onnxruntime", "numpy", "PIL", "uvicorn", "fastapi", "pydantic",
        "reparam.export", "reparam.models", "reparam.service",
    },
}  # fmt: skip
# The rooms of the service. Each room imports only itself and rooms further down.
RANKS = [
    {"__main__"},
    {"process"},
    {"app"},
    {"wire"},
    {"http"},
    {"lifespan"},
    {"engine", "operations"},
    {"runtime"},
    {"artifact", "telemetry"},
    {"errors", "settings", "pictures"},
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}


def modules(package: str) -> dict[str, Path]:
    """List the modules of a folder by import name. Folders in PEERS belong to environments of their own."""
    found = Path(package).glob("*.py") if package == PEERS else Path(package).rglob("*.py")
    prefix = "" if package in ("reparam", "benchmarks", PEERS) else "reparam."
    return {
        prefix + ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(found)
        if (package == PEERS or Path(PEERS) not in path.parents)
        and not (package == "reparam" and len(path.parts) > 2)  # the links to the other packages
    }


def imports(path: Path) -> Iterator[str]:
    """List the modules that a file imports anywhere; for `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, packages: set[str]) -> bool:
    """Tell whether the name is one of the packages or a module in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_packages_of_its_list(package: str) -> None:
    allowed = MAY_IMPORT[package] | set(sys.stdlib_module_names) | {f"reparam.{name}" for name in reparam.__all__}
    if package == "reparam":
        allowed |= modules("reparam").keys() - {"reparam"}
    for path in modules(package).values():
        foreign = {name for name in imports(path) if name != "reparam" and not is_below(name, allowed)}
        assert not foreign, f"{path} imports {foreign}"


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_no_module_is_imported_by_its_folder(package: str) -> None:
    """`service.app` and `reparam.service.app` would be two modules of one file."""
    for path in modules(package).values():
        short = {name for name in imports(path) if is_below(name, {"service", "export", "models"})}
        assert not short, f"{path} imports {short}: write reparam.service, reparam.export, reparam.models"


def room_of(module: str) -> str | None:
    """Name the room of a module of the service: its first folder, or its file; None for the package itself."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 else None


def test_each_room_of_the_service_imports_only_rooms_below_it() -> None:
    known = modules("service")
    assert {room for name in known if (room := room_of(name))} == RANK.keys()
    for name, path in known.items():
        room = room_of(name)
        for other in {room_of(used) for used in imports(path) if used in known} - {None, room}:
            assert room is None or RANK[str(other)] > RANK[room], f"{path}: {room} may not import {other}"


def test_the_architecture_page_lists_the_rooms_from_the_top_to_the_bottom() -> None:
    page = Path("docs/architecture.md").read_text()
    (table,) = re.findall(r"^\| place \| sentence \|\n((?:\|.*\n)+)", page, re.MULTILINE)
    places = [re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1]) for row in table.splitlines()[1:]]
    rooms = [room for row in places for room in row]
    assert sorted(rooms) == sorted(RANK)
    assert [RANK[room] for room in rooms] == sorted(RANK.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_import_cycles(package: str) -> None:
    known = modules(package)
    # An __init__ imports its parts. Parts that import other parts by the package's name make no cycle.
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    graph = {
        name: {used for used in imports(path) if used in known and used != name and used not in packages}
        for name, path in known.items()
    }
    tuple(TopologicalSorter(graph).static_order())


def test_the_service_runs_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import reparam.service.__main__"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_sdk_imports_neither_torch_nor_onnxruntime() -> None:
    program = "import sys, reparam; assert not {'torch', 'onnxruntime', 'PIL', 'reparam.service'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("module", ["reparam.service.artifact.file", "reparam.export.verify"])
def test_the_telemetry_of_onnxruntime_is_off(module: str, tmp_path: Path) -> None:
    """From 1.29 on onnxruntime sends reports unless CI is set. It keeps an identifier in the home folder."""
    program = f"import {module}, time; time.sleep(0.2)"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment | {"HOME": str(tmp_path)})
    assert list(tmp_path.rglob("*")) == []
