"""The model repository: the files <folder>/<model>/<version>/model.onnx, read once at start."""

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reparam.service.artifact.contract import ArtifactError, Contract
from reparam.service.artifact.file import CPU, MODEL_FILE, NAME, VERSION, Artifact, load
from reparam.service.errors import Unavailable, UnknownModel, clipped
from reparam.service.runtime.devices import CUDA, Device, DeviceError, cuda_fault, with_tensor_cores
from reparam.service.runtime.graphs import Graph, is_out_of_memory
from reparam.service.runtime.sampler import bind_sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """One loaded version of a model.

    name, version: from the names of the folders.
    artifact: the loaded file.
    sampler: the graph that draws and decodes rows.
    """

    name: str
    version: int
    artifact: Artifact
    sampler: Graph

    @property
    def contract(self) -> Contract:
        """The artifact's Contract: kind, shapes, priors."""
        return self.artifact.contract


@dataclass
class Repository:
    """The models served, and the files refused.

    default: model of requests without `model`; None for the first model by name.
    models: models by name and version.
    refused: faults by label. A label is model/version, a model's folder, a setting, or "*" for the whole repository.
    found: cache of `find`, by the name and version in the request.
    """

    default: str | None = None
    models: dict[str, dict[int, Model]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    found: dict[tuple[str | None, int | None], Model] = field(default_factory=dict)

    def find(self, name: str | None, version: int | None) -> Model:
        """Find a version of a model.

        name: name in the request; None for the default model.
        version: version in the request; None for the latest version.

        Raises: Unavailable if no model is served, UnknownModel for another name or version.
        """
        found = self.found.get((name, version))
        if found is None:
            found = self.found[name, version] = self._find(name, version)
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
        """List the versions of each model served, by name."""
        return {name: sorted(versions) for name, versions in sorted(self.models.items())}

    def default_name(self) -> str | None:
        """Return the name of the default model; None without models."""
        return self.default or min(self.models, default=None)

    @property
    def state(self) -> str:
        """The repository's state after `load`, an entry of lifespan.STATES.

        "no model" if no model is served at all; "no default model" if the model named by `default` is not served; else
        "ready".
        """
        if not self.models:
            return "no model"
        return "ready" if self.default_name() in self.models else "no default model"

    def load(self, folder: Path, device: Device, max_rows: int, seconds: float) -> None:
        """Load and warm up every version that keeps its contract; add the others to `refused`.

        On a GPU, the thread that runs the models must also load the models, because onnxruntime keeps CUDA graphs by
        thread.

        folder: the repository, with files <model>/<version>/model.onnx.
        device: device of the models.
        max_rows: largest number of rows in a batch.
        seconds: approximate time of a batch; slower models get smaller batches.

        Raises: DeviceError if a model makes the GPU unusable for this process.
        """
        try:
            models = [path for path in _entries(folder) if os.path.isdir(path)]  # noqa: PTH112  # pathlib's raises for some names
        except OSError as error:
            fault = f"the model repository {folder.absolute()} cannot be read ({error.strerror}): set REPARAM_ARTIFACTS"
            self._refuse("*", fault)
            return
        for path in models:
            try:
                versions = _versions(path)
            except OSError as error:
                if NAME.fullmatch(path.name):  # other folders, such as lost+found, are no models
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
        except Exception as error:  # onnxruntime's errors have no narrower common base
            fault = str(error) if isinstance(error, ArtifactError) else f"{version}: {error!r}"
            self._refuse(f"{name}/{version.name}", fault)
            return
        self.found.clear()
        self.models.setdefault(name, {})[model.version] = model
        about: dict[str, Any] = {"provider": model.artifact.provider, "reason": device.reason}
        about |= {"batch_rows": model.sampler.batch_rows, "runners": device.runners}
        about["load_seconds"] = round(time.perf_counter() - started, 3)
        log.info("model loaded", extra={"model": name, "version": model.version, **about})

    def _refuse(self, label: str, fault: str) -> None:
        # File names may hold bytes that are not UTF-8.
        label, fault = (text.encode(errors="backslashreplace").decode() for text in (label, fault))
        self.refused[label] = fault
        log.error("refused", extra={"model": label, "fault": fault})


def open_model(name: str, version: int, path: Path, device: Device, max_rows: int, seconds: float) -> Model:
    """Load and warm up a version, with the first of `device.attempts` that works.

    name, version: name and version of the model.
    path: path of model.onnx.
    device: device of the model.
    max_rows: largest number of rows in a batch.
    seconds: approximate time of a batch; slower models get smaller batches.

    Raises: ArtifactError; DeviceError if the model makes the GPU unusable for this process; any error of onnxruntime.
    """
    *others, last = device.attempts
    for providers in others:
        try:  # `_open` also warms up, because only the second run shows whether a CUDA graph can be captured
            return _open(name, version, path, device, providers, max_rows, seconds)
        except Exception as error:  # onnxruntime's errors have no narrower common base
            about = {"model": name, "version": version, "providers": repr(providers), "fault": str(error)}
            log.info("the model does not run with these providers", extra=about)
            no_memory = is_out_of_memory(error)
        # Some errors make the GPU unusable for this process. The test runs outside the handler, because the error keeps
        # the model's memory alive.
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
    if artifact.provider == CUDA and artifact.contract.precision == "float16":  # known only once the file is open
        artifact = load(path, with_tensor_cores(providers), device.threads)
    replicas = tuple(bind_sampler(artifact, max_rows) for _ in range(device.runners))
    batch_rows = min(replica.warm_up(seconds) for replica in replicas)
    steady = artifact.steady and artifact.provider == CPU
    return Model(
        name, version, artifact, Graph(name, version, replicas, artifact.contract.row_shapes, batch_rows, steady)
    )


def _entries(folder: Path) -> list[Path]:
    """List the visible entries of a folder by name. Raises: OSError."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _versions(model: Path) -> list[Path]:
    """List the entries with the name of a version, and other entries with a model file. Raises: OSError."""
    return [
        path
        for path in _entries(model)
        if VERSION.fullmatch(path.name) or os.path.exists(path / MODEL_FILE)  # noqa: PTH110  # pathlib's raises for some names
    ]


def _check_names(version: Path) -> None:
    """Check the names of a version's folder and of the model's folder. Raises: ArtifactError."""
    if not NAME.fullmatch(version.parent.name):
        raise ArtifactError(
            f"{version.parent}: a model's name is made of letters, digits, '.', '_' and '-', and begins with a letter "
            "or digit: rename the folder"
        )
    if not VERSION.fullmatch(version.name):
        raise ArtifactError(f"{version}: a version is a whole number, 1 or more, without zeros in front: rename it")


def _inside(path: Path, folder: Path) -> Path:
    """Resolve a path. Raises: ArtifactError for a link out of the repository, or if the path is not a regular file."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{path}: a link leads out of the repository, to {path.resolve()}")
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path}: it is not a regular file")
    return path.resolve()
