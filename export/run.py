"""A run: the folder in which one training writes its configuration, checkpoint, metrics and contact sheets.

config.json             how it was started; what `--resume` must agree with
checkpoint.safetensors  weights and optimizer after the last finished epoch, replaced in one rename
metrics.jsonl           one line an epoch
prior.safetensors       the mixture that `fit-prior` found
evaluation.json         what `evaluate` found
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
from reparam.export.files import DAMAGED, read_tensors, write_atomically, write_tensors
from reparam.export.learner import under
from reparam.models import MODELS, VAE, Mixture, VAEConfig

if sys.platform != "win32":
    import fcntl


class RunConfig(BaseModel):
    """The contents of config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: TrainConfig
    data_name: str
    data_sha256: str
    image_shape: tuple[int, int, int]

    @classmethod
    def of(cls, train: TrainConfig, data: Dataset) -> Self:
        digest = hashlib.sha256(data.train.tobytes() + data.test.tobytes()).hexdigest()
        return cls(train=train, data_name=data.name, data_sha256=digest, image_shape=data.image_shape)

    def build(self) -> VAE:
        """The network with its initial weights. Raises RunError for a configuration that fits no network."""
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
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.safetensors"
        self.prior_file = folder / "prior.safetensors"
        self.metrics = folder / "metrics.jsonl"

    def start(self, config: RunConfig) -> None:
        if (self.folder / "config.json").exists() or self.checkpoint.exists():
            raise RunError(f"{self.folder} already holds a run: add --resume to continue it, or choose another --out")
        (self.folder / "sheets").mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.json", config.model_dump_json(indent=2).encode())

    def resume(self, config: RunConfig) -> None:
        before = self.config()
        for name, now in _flat(config).items():
            # Where the images lie decides nothing; what they are, data_sha256 tells.
            if name != "data" and _flat(before)[name] != now:
                raise RunError(f"{self.folder} was started with {name}={_flat(before)[name]!r}, not {now!r}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process writes into the folder meanwhile (where the system has such locks). Raises RunError."""
        if sys.platform == "win32":
            yield
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"another process works in {self.folder}: wait until it has ended") from error
            yield
        finally:
            os.close(folder)

    def config(self) -> RunConfig:
        path = self.folder / "config.json"
        try:
            return RunConfig.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise RunError(f"{self.folder} holds no run: `reparam train` makes one") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise RunError(f"{path} is damaged or of another version: {where}{first['msg']}") from error

    def data(self) -> Dataset:
        """The images that it was trained on. Raises DataError; RunError if they have changed since."""
        config = self.config()
        data = load(config.train.data)
        if RunConfig.of(config.train, data) != config:
            raise RunError(f"{config.train.data} has changed since {self.folder} was trained on it")
        return data

    def save(self, epoch: int, state: Mapping[str, Tensor]) -> None:
        """Write the state after `epoch` epochs; a reader sees the old file or the new one, never a part."""
        write_tensors(self.checkpoint, state, epoch=str(epoch))

    def restore(self, load: Callable[[dict[str, Tensor]], object]) -> int:
        """Let `load` have the last state. Returns the number of finished epochs, 0 without one. Raises RunError."""
        if not self.checkpoint.exists():
            return 0
        try:
            state, about = read_tensors(self.checkpoint)
            epoch = int(about["epoch"])
            if epoch < 0:
                raise ValueError(f"its epoch is {epoch}")
            load(state)
        except DAMAGED as error:
            fault = str(error).partition("\n")[0]
            raise RunError(
                f"{self.checkpoint} is damaged or of another version ({fault}): train anew, into another folder"
            ) from error
        return epoch

    def trained(self) -> VAE:
        """The network with the weights of the last epoch. Raises RunError before training is finished."""
        config = self.config()
        model, evaluated = config.build(), "average" if config.train.average else "model"
        done = self.restore(lambda state: model.load_state_dict(under(evaluated, state)))
        if done < config.train.epochs:
            raise RunError(
                f"{self.folder} has finished {done} of {config.train.epochs} epochs: continue it with `train --resume`"
            )
        return model.eval()

    def keep_prior(self, mixture: Mixture) -> None:
        """Write what `mixture` reads."""
        names = MODELS[self.config().train.kind].parameter_names
        tensors = {"log_weights": mixture.log_weights, **dict(zip(names, mixture.parameters, strict=True))}
        write_tensors(self.prior_file, tensors, checkpoint_sha256=_sha256(self.checkpoint))

    def drop_stale_prior(self) -> None:
        """Remove a fitted prior that `mixture` would refuse."""
        try:
            self.mixture()
        except RunError:
            self.prior_file.unlink()

    def priors(self, model: VAE) -> dict[str, Mixture]:
        """What the artifact of its network can be sampled from, by name: `standard`, one distribution, and `mixture` if
        one was learned with the weights or fitted afterwards. Raises RunError."""
        learned = model.prior()
        if len(learned.log_weights) > 1:
            nearest = tuple(parameter.unsqueeze(0) for parameter in model.nearest(learned))
            return {"standard": Mixture(learned.log_weights.new_zeros(1), nearest), "mixture": learned}
        fitted = self.mixture()
        return {"standard": learned} | ({} if fitted is None else {"mixture": fitted})

    def mixture(self) -> Mixture | None:
        """The prior that was fitted to the weights of the last epoch, if one was. Raises RunError."""
        if not self.prior_file.exists():
            return None
        try:
            tensors, about = read_tensors(self.prior_file)
            if about["checkpoint_sha256"] != _sha256(self.checkpoint):
                raise RunError(f"{self.prior_file} was fitted to other weights: `reparam fit-prior {self.folder}`")
            names = MODELS[self.config().train.kind].parameter_names
            mixture = Mixture(tensors["log_weights"], tuple(tensors[name] for name in names))
            self._check(mixture)
        except DAMAGED as error:
            raise RunError(f"{self.prior_file} is damaged ({error}): `reparam fit-prior {self.folder}`") from error
        return mixture

    def _check(self, mixture: Mixture) -> None:
        """Raises ValueError."""
        latent_shape = self.config().train.latent
        components = (len(mixture.log_weights),)
        for tensor, shape in ((mixture.log_weights, ()), *((each, latent_shape) for each in mixture.parameters)):
            if tensor.shape != components + shape or tensor.dtype != torch.float32:
                raise ValueError(f"it holds {tensor.dtype}{list(tensor.shape)}, not float32{[*components, *shape]}")
        if not (mixture.log_weights.exp() > 0).all():
            raise ValueError("a component has no weight")

    def log(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, epoch: int) -> None:
        """Drop the metrics of an epoch that was killed before its checkpoint."""
        lines = self.metrics.read_text(errors="replace").splitlines() if self.metrics.exists() else []
        kept = [line for line in lines if 0 < _epoch_of(line) <= epoch]
        write_atomically(self.metrics, "".join(f"{line}\n" for line in kept).encode())

    def fingerprint(self) -> str:
        """SHA-256 of weights and fitted prior: ties an evaluation to what it is of."""
        return _sha256(self.checkpoint, *([self.prior_file] if self.prior_file.exists() else []))


def _sha256(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _epoch_of(line: str) -> int:
    """0 for a line that was cut short."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 0


def _flat(config: RunConfig) -> dict[str, Any]:
    fields = config.model_dump()
    return {**fields.pop("train"), **fields}
