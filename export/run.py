"""A run: the folder of one training.

config.json             configuration; `--resume` must agree with it
checkpoint.safetensors  weights and optimizer after the last finished epoch, replaced atomically
metrics.jsonl           one line per epoch
prior.safetensors       mixture found by `fit-prior`
evaluation.json         result of `evaluate`
sheets/                 samples and reconstructions
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from reparam.export.config import WIDTHS, TrainConfig
from reparam.export.data import Dataset, load
from reparam.export.errors import RunError
from reparam.export.files import READ_ERRORS, read_tensors, write_atomically, write_tensors
from reparam.export.learner import sub_state
from reparam.models import MODELS, VAE, Mixture, VAEConfig

if sys.platform != "win32":
    import fcntl


class RunConfig(BaseModel):
    """The contents of config.json.

    train: configuration of the training.
    data_name, data_sha256: name of the data set, SHA-256 of the training and held-out images.
    image_shape: (C, H, W).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: TrainConfig
    data_name: str
    data_sha256: str
    image_shape: tuple[int, int, int]

    @classmethod
    def of(cls, train: TrainConfig, data: Dataset) -> Self:
        """Make the configuration of a training on these images."""
        digest = hashlib.sha256(data.train.tobytes() + data.test.tobytes()).hexdigest()
        return cls(train=train, data_name=data.name, data_sha256=digest, image_shape=data.image_shape)

    def build(self) -> VAE:
        """Build the network with its initial weights.

        Raises: RunError for a configuration that no network has.
        """
        train = self.train
        try:
            config = VAEConfig(
                image_shape=self.image_shape,
                latent_shape=train.latent,
                body=train.body,
                width=WIDTHS[train.body] if train.width is None else train.width,
                dense=train.dense,
                activation=train.activation,
                decoder_width=train.decoder_width,
                prior_components=train.prior_components,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(train.seed)
                return MODELS[train.kind](config)
        except ValueError as error:
            raise RunError(str(error)) from error


class Run:
    """The files of one run.

    folder: folder of the run.
    checkpoint, prior_file, metrics: paths of files in the folder; each file may be missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.safetensors"
        self.prior_file = folder / "prior.safetensors"
        self.metrics = folder / "metrics.jsonl"

    def start(self, config: RunConfig) -> None:
        """Write config.json into a new folder.

        Raises: RunError if the folder already holds a run.
        """
        if (self.folder / "config.json").exists() or self.checkpoint.exists():
            raise RunError(f"{self.folder} already holds a run: add --resume to continue it, or choose another --out")
        (self.folder / "sheets").mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.json", config.model_dump_json(indent=2).encode())

    def resume(self, config: RunConfig) -> None:
        """Compare the configuration of the resumed training with config.json. The path of the images may differ.

        Raises: RunError naming a field with another value, or if config.json is missing or damaged.
        """
        before = self.config()
        for name, now in _flat(config).items():
            # The path may differ from the recorded path, because data_sha256 identifies the images.
            if name != "data" and _flat(before)[name] != now:
                raise RunError(f"{self.folder} was started with {name}={_flat(before)[name]!r}, not {now!r}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the folder while the block runs, on systems with `flock`.

        Raises: RunError if another process holds the lock.
        """
        if sys.platform == "win32":
            yield
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"another process works in {self.folder}: wait until that process has ended") from error
            yield
        finally:
            os.close(folder)

    def config(self) -> RunConfig:
        """Read config.json.

        Raises: RunError if the file is missing or damaged.
        """
        path = self.folder / "config.json"
        try:
            return RunConfig.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise RunError(f"{self.folder} holds no run: `reparam train` starts one") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise RunError(f"{path} is damaged or of another version: {where}{first['msg']}") from error

    def data(self) -> Dataset:
        """Load the images of the training.

        Raises: DataError; RunError if the images have changed since the training.
        """
        config = self.config()
        data = load(config.train.data)
        if RunConfig.of(config.train, data) != config:
            raise RunError(f"{config.train.data} has changed since {self.folder} was trained on it")
        return data

    def save(self, epoch: int, state: Mapping[str, Tensor]) -> None:
        """Write the state after `epoch` epochs atomically.

        state: tensors by name, as from `Learner.state`.
        """
        write_tensors(self.checkpoint, state, epoch=str(epoch))

    def restore(self, load: Callable[[dict[str, Tensor]], object]) -> int:
        """Pass the last saved state to `load`.

        load: called with tensors by name; raises one of READ_ERRORS for a state of another network.

        Returns: the number of finished epochs; 0 without a checkpoint, then `load` is not called.

        Raises: RunError if the checkpoint is damaged.
        """
        if not self.checkpoint.exists():
            return 0
        try:
            state, about = read_tensors(self.checkpoint)
            epoch = int(about["epoch"])
            if epoch < 0:
                raise ValueError(f"the epoch is {epoch}")
            load(state)
        except READ_ERRORS as error:
            fault = str(error).partition("\n")[0]
            raise RunError(
                f"{self.checkpoint} is damaged or of another version ({fault}): train again, into another folder"
            ) from error
        return epoch

    def trained(self) -> VAE:
        """Build the network with the weights of the last epoch, in evaluation mode, on the CPU. With a running average,
        the averaged weights.

        Raises: RunError before the training has finished, or if a file is missing or damaged.
        """
        config = self.config()
        model, evaluated = config.build(), "average" if config.train.average else "model"
        done = self.restore(lambda state: model.load_state_dict(sub_state(evaluated, state)))
        if done < config.train.epochs:
            raise RunError(
                f"{self.folder} has finished {done} of {config.train.epochs} epochs: continue it with `train --resume`"
            )
        return model.eval()

    def save_prior(self, mixture: Mixture) -> None:
        """Write a fitted mixture to prior.safetensors; `mixture` reads the file."""
        names = MODELS[self.config().train.kind].parameter_names
        tensors = {"log_weights": mixture.log_weights, **dict(zip(names, mixture.parameters, strict=True))}
        write_tensors(self.prior_file, tensors, checkpoint_sha256=_sha256(self.checkpoint))

    def drop_stale_prior(self) -> None:
        """Remove prior.safetensors if the file is damaged or was fitted to other weights. A usable file stays."""
        try:
            self.mixture()
        except RunError:
            self.prior_file.unlink()

    def priors(self, model: VAE) -> dict[str, Mixture]:
        """Priors available for sampling.

        model: the trained network.

        Returns: `standard`, a mixture with a single component, and `mixture` if a mixture was learned or fitted.

        Raises: RunError if the fitted prior is damaged or belongs to other weights.
        """
        learned = model.prior()
        if len(learned.log_weights) > 1:
            nearest = tuple(parameter.unsqueeze(0) for parameter in model.nearest(learned))
            return {"standard": Mixture(learned.log_weights.new_zeros(1), nearest), "mixture": learned}
        fitted = self.mixture()
        return {"standard": learned} | ({} if fitted is None else {"mixture": fitted})

    def mixture(self) -> Mixture | None:
        """Read the prior fitted to the weights of the last epoch; None without a fitted prior.

        Raises: RunError if the file is damaged or was fitted to other weights.
        """
        if not self.prior_file.exists():
            return None
        try:
            tensors, about = read_tensors(self.prior_file)
            if about["checkpoint_sha256"] != _sha256(self.checkpoint):
                raise RunError(f"{self.prior_file} was fitted to other weights: `reparam fit-prior {self.folder}`")
            names = MODELS[self.config().train.kind].parameter_names
            mixture = Mixture(tensors["log_weights"], tuple(tensors[name] for name in names))
            self._check(mixture)
        except READ_ERRORS as error:
            raise RunError(f"{self.prior_file} is damaged ({error}): `reparam fit-prior {self.folder}`") from error
        return mixture

    def _check(self, mixture: Mixture) -> None:
        """Check a mixture read from a file. Raises: ValueError for wrong shapes, dtypes or weights."""
        latent_shape = self.config().train.latent
        components = (len(mixture.log_weights),)
        for tensor, shape in ((mixture.log_weights, ()), *((each, latent_shape) for each in mixture.parameters)):
            if tensor.shape != components + shape or tensor.dtype != torch.float32:
                raise ValueError(f"a tensor is {tensor.dtype}{list(tensor.shape)}, not float32{[*components, *shape]}")
        if not (mixture.log_weights.exp() > 0).all():
            raise ValueError("a component has no weight")

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        line: metrics by name, with the member `epoch`.
        """
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def drop_metrics_after(self, epoch: int) -> None:
        """Drop metrics of epochs later than `epoch`, and damaged lines.

        A killed training may have written metrics of an epoch without a checkpoint.
        """
        lines = self.metrics.read_text(errors="replace").splitlines() if self.metrics.exists() else []
        kept = [line for line in lines if 0 < _epoch_of(line) <= epoch]
        write_atomically(self.metrics, "".join(f"{line}\n" for line in kept).encode())

    def fingerprint(self) -> str:
        """SHA-256 of checkpoint and fitted prior, in hexadecimal. Ties an evaluation to the evaluated files."""
        return _sha256(self.checkpoint, *([self.prior_file] if self.prior_file.exists() else []))


def _sha256(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _epoch_of(line: str) -> int:
    """Epoch of a line of metrics.jsonl; 0 for a damaged line."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 0


def _flat(config: RunConfig) -> dict[str, Any]:
    fields = config.model_dump()
    return {**fields.pop("train"), **fields}
