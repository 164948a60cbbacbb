"""The model repository: <folder>/<model>/<version>/model.onnx, read once at start."""

import logging
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from reparam.service.artifact.contract import ArtifactError, Contract
from reparam.service.artifact.file import CPU, MODEL_FILE, NAME, VERSION, Artifact, load
from reparam.service.errors import Unavailable, UnknownModel, clipped
from reparam.service.runtime.devices import CUDA, Device, DeviceError, cuda_fault, with_tensor_cores
from reparam.service.runtime.graphs import Buckets, is_out_of_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """One version of a model, loaded."""

    name: str
    version: int
    artifact: Artifact
    buckets: tuple[Buckets, ...]  # one for each runner
    batch_rows: int  # rows of one batch

    @property
    def contract(self) -> Contract:
        return self.artifact.contract

    @cached_property
    def steady(self) -> bool:
        """It runs on the CPU, and how long depends on its rows alone."""
        return self.artifact.steady and self.artifact.provider == CPU


@dataclass
class Repository:
    """The models that are served, and the files that are not, each with its fault."""

    default: str | None = None
    models: dict[str, dict[int, Model]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _found: dict[tuple[str | None, int | None], Model] = field(default_factory=dict)  # what was asked for before

    def find(self, name: str | None, version: int | None) -> Model:
        """Raises UnknownModel, Unavailable."""
        found = self._found.get((name, version))
        if found is None:
            found = self._found[name, version] = self._find(name, version)
        return found

    def _find(self, name: str | None, version: int | None) -> Model:
        if not self.models:
            raise Unavailable("no model is served: /readyz says why", retry_after=5)
        if name is None:
            name = self.default_name()
        versions = self.models.get(name or "")
        if versions is None:
            refused = any(label.partition("/")[0] == name for label in self.refused)
            shown, available = clipped(name or ""), self.available()
            fault = f"refused model {shown!r}: /readyz says why" if refused else f"unknown model {shown!r}"
            raise UnknownModel(f"{fault}; this server has: {', '.join(available)}", available=available)
        if version is None:
            return versions[max(versions)]
        if version not in versions:
            why = ": it is refused, /readyz says why" if f"{name}/{version}" in self.refused else ""
            has = ", ".join(map(str, sorted(versions)))
            raise UnknownModel(
                f"model {name!r} has no version {version}{why}; this server has: {has}", available=self.available()
            )
        return versions[version]

    def available(self) -> dict[str, list[int]]:
        """The versions of each model that is served."""
        return {name: sorted(versions) for name, versions in sorted(self.models.items())}

    def default_name(self) -> str | None:
        """The model of a request that names none: the one that was chosen, else the first by name."""
        return self.default or min(self.models, default=None)

    @property
    def state(self) -> str:
        """Whether every request finds a model."""
        if not self.models:
            return "no model"
        return "ready" if self.default_name() in self.models else "no default model"

    def load(self, folder: Path, device: Device, max_rows: int, seconds: float) -> None:
        """Load and warm up every version that keeps the contract; the others are noted in `refused` and hurt nobody.

        Batches will have at most `max_rows` rows, and as few as take about `seconds`. On a GPU this is for the thread
        that will run them: onnxruntime keeps CUDA graphs for each thread apart. Raises DeviceError if one of them
        leaves a GPU that computes nothing any more.
        """
        try:
            models = [path for path in _entries(folder) if os.path.isdir(path)]  # noqa: PTH112  # pathlib's raises for some
        except OSError as error:
            fault = f"the model repository {folder.absolute()} cannot be read ({error.strerror}): set REPARAM_ARTIFACTS"
            self._refuse("*", fault)
            return
        for path in models:
            try:
                versions = _versions(path)
            except OSError as error:
                if NAME.fullmatch(path.name):  # others may be anything
                    self._refuse(path.name, f"{path} cannot be read: {error.strerror}")
                continue
            for version in versions:
                self._load(version, folder, device, max_rows, seconds)
        if not self.models and not self.refused:
            fault = f"the model repository {folder.absolute()} holds no <model>/<version>/{MODEL_FILE}"
            self._refuse("*", f"{fault}: set REPARAM_ARTIFACTS")
        if self.state == "no default model":
            has = ", ".join(sorted(self.models))
            self._refuse("REPARAM_DEFAULT_MODEL", f"{self.default} is not served; there are: {has}")

    def _load(self, version: Path, folder: Path, device: Device, max_rows: int, seconds: float) -> None:
        name, started = version.parent.name, time.perf_counter()
        try:
            _check_names(version)
            model = open_model(
                name, int(version.name), _inside(version / MODEL_FILE, folder), device, max_rows, seconds
            )
        except DeviceError:
            raise
        except Exception as error:  # onnxruntime's errors have no common base but this
            fault = str(error) if isinstance(error, ArtifactError) else f"{version}: {error!r}"
            self._refuse(f"{name}/{version.name}", fault)
            return
        self._found.clear()
        self.models.setdefault(name, {})[model.version] = model
        about: dict[str, Any] = {"provider": model.artifact.provider, "reason": device.reason}
        about |= {"batch_rows": model.batch_rows, "runners": device.runners}
        about["load_seconds"] = round(time.perf_counter() - started, 3)
        log.info("model loaded", extra={"model": name, "version": model.version, **about})

    def _refuse(self, label: str, fault: str) -> None:
        """A name of a file may hold bytes that are no text."""
        label, fault = (text.encode(errors="backslashreplace").decode() for text in (label, fault))
        self.refused[label] = fault
        log.error("refused", extra={"model": label, "fault": fault})


def open_model(name: str, version: int, path: Path, device: Device, max_rows: int, seconds: float) -> Model:
    """Load a version and warm it up, with the first of the device's lists of providers that takes it; whether a graph
    can be captured as a CUDA graph shows only in the second run.

    Raises ArtifactError, DeviceError, and what onnxruntime raises.
    """
    *others, last = device.attempts
    for providers in others:
        try:
            return _open(name, version, path, device, providers, max_rows, seconds)
        except Exception as error:  # onnxruntime's errors have no common base but this
            about = {"model": name, "version": version, "providers": repr(providers), "fault": str(error)}
            log.info("model does not run so", extra=about)
            no_memory = is_out_of_memory(error)
        # What it held is free now. Some errors leave nothing that works in the whole process.
        if device.name == "cuda" and not no_memory and cuda_fault():
            raise DeviceError(
                f"no CUDA graph could be made of model {name!r} version {version}, and since then the GPU computes "
                "nothing: set REPARAM_CUDA_GRAPHS=false, or take the model out of the repository"
            )
    return _open(name, version, path, device, last, max_rows, seconds)


def _open(
    name: str, version: int, path: Path, device: Device, providers: tuple[Any, ...], max_rows: int, seconds: float
) -> Model:
    artifact = load(path, providers, device.threads)
    if artifact.provider == CUDA and artifact.contract.precision == "float16":  # known only now that it is open
        artifact = load(path, with_tensor_cores(providers), device.threads)
    buckets = tuple(Buckets(artifact, max_rows) for _ in range(device.runners))
    return Model(name, version, artifact, buckets, min(each.warm_up(seconds) for each in buckets))


def _entries(folder: Path) -> list[Path]:
    """Raises OSError."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _versions(model: Path) -> list[Path]:
    """What is named like a version, or holds a model. Raises OSError."""
    return [
        path
        for path in _entries(model)
        if VERSION.fullmatch(path.name) or os.path.exists(path / MODEL_FILE)  # noqa: PTH110  # as above
    ]


def _check_names(version: Path) -> None:
    """Raises ArtifactError."""
    if not NAME.fullmatch(version.parent.name):
        raise ArtifactError(
            f"{version.parent}: a model's name is made of letters, digits, '.', '_' and '-', and begins with a letter "
            "or digit: rename the folder"
        )
    if not VERSION.fullmatch(version.name):
        raise ArtifactError(f"{version}: a version is a whole number, 1 or more, without zeros in front: rename it")


def _inside(path: Path, folder: Path) -> Path:
    """The path, unless a link on the way leaves the repository."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{path}: a link leads out of the repository, to {path.resolve()}")
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path}: it is no regular file")
    return path.resolve()
