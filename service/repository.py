"""The model repository: <folder>/<model>/<version>/model.onnx, read once at start."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from service.artifact import MODEL_FILE, NAME, VERSION, Artifact, load
from service.buckets import Buckets
from service.contract import ArtifactError, Contract
from service.devices import CPU, CUDA, Device, with_tensor_cores
from service.errors import Unavailable, UnknownModel

log = logging.getLogger(__name__)

PROMPT = 64  # so many times as many rows fill a batch, and take milliseconds


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
    def prompt_rows(self) -> int:
        """Rows that take less time to run than another thread to wake up."""
        steady = self.artifact.steady and self.artifact.provider == CPU
        return self.batch_rows // PROMPT if steady else 0

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """What a request may ask for."""
        return ("images", "latents") if self.contract.kind == "gaussian" else ("images", "codes", "indices")


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
            available = self._available()
            raise UnknownModel(f"unknown model {name!r}; this server has: {', '.join(available)}", available=available)
        if version is None:
            return versions[max(versions)]
        if version not in versions:
            raise UnknownModel(
                f"model {name!r} has no version {version}; this server has: {', '.join(map(str, sorted(versions)))}",
                available=self._available(),
            )
        return versions[version]

    def _available(self) -> dict[str, list[int]]:
        return {name: sorted(versions) for name, versions in sorted(self.models.items())}

    def default_name(self) -> str | None:
        """The model of a request that names none: the one that was chosen, else the first by name."""
        return self.default or min(self.models, default=None)

    def load(self, folder: Path, device: Device, max_rows: int, seconds: float) -> None:
        """Load and warm up every version that keeps the contract; the others are noted in `refused` and hurt nobody.

        Batches will have at most `max_rows` rows, and as few as take about `seconds`. On a GPU this is for the thread
        that will run them: onnxruntime keeps CUDA graphs for each thread apart.
        """
        if not folder.is_dir():
            self.refused["*"] = f"the model repository {folder.absolute()} is no folder: set REPARAM_ARTIFACTS"
            log.error("no model repository", extra={"folder": str(folder.absolute())})
            return
        for name, version, path in _versions(folder):
            started = time.perf_counter()
            try:
                model = open_model(name, version, _inside(path, folder), device, max_rows, seconds)
            except Exception as error:  # onnxruntime's errors have no common base but this
                fault = str(error) if isinstance(error, ArtifactError) else f"{path}: {error!r}"
                self.refused[f"{name}/{version}"] = fault
                log.error("model refused", extra={"model": name, "version": version, "fault": fault})
                continue
            self._found.clear()
            self.models.setdefault(name, {})[version] = model
            about: dict[str, Any] = {"provider": model.artifact.provider, "reason": device.reason}
            about |= {"batch_rows": model.batch_rows, "runners": device.runners}
            about["load_seconds"] = round(time.perf_counter() - started, 3)
            log.info("model loaded", extra={"model": name, "version": version, **about})
        if self.default and self.default not in self.models:
            log.error("the default model is not served", extra={"model": self.default})


def open_model(name: str, version: int, path: Path, device: Device, max_rows: int, seconds: float) -> Model:
    """Load a version and warm it up, with the first of the device's lists of providers that takes it; whether a graph
    can be captured as a CUDA graph shows only in the second run.

    Raises ArtifactError, and what onnxruntime raises.
    """
    *others, last = device.attempts
    for providers in others:
        try:
            return _open(name, version, path, device, providers, max_rows, seconds)
        except Exception as error:  # onnxruntime's errors have no common base but this
            about = {"model": name, "version": version, "providers": repr(providers), "fault": str(error)}
            log.info("model does not run so", extra=about)
    return _open(name, version, path, device, last, max_rows, seconds)


def _open(
    name: str, version: int, path: Path, device: Device, providers: tuple[Any, ...], max_rows: int, seconds: float
) -> Model:
    artifact = load(path, providers, device.threads)
    if artifact.provider == CUDA and artifact.contract.precision == "float16":  # known only now that it is open
        artifact = load(path, with_tensor_cores(providers), device.threads)
    buckets = tuple(Buckets(artifact, max_rows) for _ in range(device.runners))
    return Model(name, version, artifact, buckets, min(each.warm_up(seconds) for each in buckets))


def _versions(folder: Path) -> Iterator[tuple[str, int, Path]]:
    for model in sorted(folder.iterdir()):
        if model.is_dir() and NAME.fullmatch(model.name):
            for version in sorted(path for path in model.iterdir() if VERSION.fullmatch(path.name)):
                yield model.name, int(version.name), version / MODEL_FILE


def _inside(path: Path, folder: Path) -> Path:
    """The path, unless a link on the way leaves the repository."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{path}: a link leads out of the repository, to {path.resolve()}")
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path}: it is no regular file")
    return path.resolve()
