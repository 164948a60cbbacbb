"""From a network to an artifact: export, gate, and a rename, so that a reader sees a whole version or none."""

import contextlib
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from pydantic import ValidationError
from torch import Tensor

from reparam._version import __version__
from reparam.export.errors import GateError
from reparam.export.evaluate import read_evaluation
from reparam.export.files import write_atomically
from reparam.export.gate import answer, gate, in_precision
from reparam.export.graph import Sampler, export_encoder, export_sampler
from reparam.export.network import Network
from reparam.export.run import Run
from reparam.export.verify import reference, reference_feeds
from reparam.models import Mixture
from reparam.service.artifact.contract import ArtifactError, Contract, Precision
from reparam.service.artifact.file import ENCODER_FILE, MODEL_FILE, NAME, VERSION
from reparam.service.artifact.noise import NOISE_VERSION

Facts = Mapping[str, str | int | float]

READABLE = 0o755  # by the service, which may run as another user
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime")


def publish_run(folder: Path, name: str, repository: Path, precision: Precision = "float32") -> Path:
    """`publish` the network that was trained in `folder`, whose weights the files must hold bit for bit, or rounded to
    float16. Raises RunError too."""
    _check_name(name)
    network, contract = network_of(Run(folder), precision)
    return _publish(network, contract, name, repository, exact=True)


def publish(
    network: Network,
    name: str,
    repository: Path,
    precision: Precision = "float32",
    *,
    mixture: Mixture | None = None,
    trained_on: Facts | None = None,
    evaluation: Facts | None = None,
) -> Path:
    """Write `repository`/`name`/<next version>/, if it passes the gate.

    precision: that the decoder will compute in.
    mixture: the prior to sample from, as `fit_mixture` returns it; else N(0, I), or categories that are equally likely.
    trained_on, evaluation: what `/models` shall tell of the network's origin, and of what was measured on it.

    Returns the new folder. Raises GateError, OSError; then nothing is written.
    """
    _check_name(name)
    network.check()
    contract = describe(
        network, network.prior(), mixture, trained_on=trained_on or {}, evaluation=evaluation or {}, precision=precision
    )
    return _publish(network, contract, name, Path(repository), exact=False)


def _check_name(name: str) -> None:
    """Raises GateError."""
    if not NAME.fullmatch(name):
        allowed = "letters, digits, '.', '_' and '-', first a letter or digit"
        raise GateError(f"{name!r} cannot be a model's name: {allowed}")


def _publish(network: Network, contract: Contract, name: str, repository: Path, *, exact: bool) -> Path:
    made = _make_readable(repository / name)
    try:
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=repository / name))
        try:
            _write_checked(network, contract, partial, exact=exact)
            for file in partial.iterdir():
                file.chmod(0o644)
            partial.chmod(READABLE)
            return _claim(partial, repository / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds what was published
                folder.rmdir()


def _make_readable(folder: Path) -> list[Path]:
    """Make the folder and what is missing on the way to it, for the service may run as another user; those made,
    innermost first."""
    if folder.is_dir():
        return []
    made = _make_readable(folder.parent)
    folder.mkdir(exist_ok=True)
    folder.chmod(READABLE)
    return [folder, *made]


def _write_checked(network: Network, contract: Contract, folder: Path, *, exact: bool) -> None:
    """Raises GateError."""
    try:
        write(network, contract, folder)
        gate(network, folder, exact=exact)
    except (GateError, ArtifactError) as error:
        fault = str(error).replace(f"{folder}/", "")
        if contract.precision == "float16":
            fault = f"this decoder does not fit float16, publish it in float32: {fault}"
        raise GateError(fault) from error


def network_of(source: Run, precision: Precision = "float32") -> tuple[Network, Contract]:
    """The network of a run, and the contract of its artifact. Raises RunError."""
    vae, config = source.trained(), source.config()
    network, priors = Network.of(vae), source.priors(vae)
    contract = describe(
        network,
        priors["standard"],
        priors.get("mixture"),
        trained_on={"data": config.data_name, "sha256": config.data_sha256, "epochs": config.train.epochs},
        evaluation=read_evaluation(source),
        precision=precision,
    )
    return network, contract


def describe(
    network: Network,
    standard: Mixture,
    mixture: Mixture | None,
    *,
    trained_on: Facts,
    evaluation: Facts,
    precision: Precision,
) -> Contract:
    """The contract of an artifact, with the reference rows computed by the network itself. Raises GateError."""
    names = network.family.parameter_names
    try:
        contract = Contract(
            kind=network.kind,
            latent_shape=network.latent_shape,
            image_shape=network.image_shape,  # type: ignore[arg-type]  # C is 1 or 3
            prior={
                key: _compact(parameter.detach()[0]) for key, parameter in zip(names, standard.parameters, strict=True)
            },
            mixture=None if mixture is None else _mixture(names, mixture),
            precision=precision,
            default_temperature=network.family.default_temperature,
            noise_version=NOISE_VERSION,  # type: ignore[arg-type]  # Literal[1]
            trained_on=dict(trained_on),
            evaluation=dict(evaluation),
            tools={
                "python": platform.python_version(),
                "reparam": __version__,
                **{tool: _version(tool) for tool in TOOLS},
            },
            reference={},
        )
        contract.mixture_arrays()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:2]))
        wanted = first["msg"].lower() if len(first["loc"]) == 1 else "names stand for text or finite numbers"
        raise GateError(f"{where} cannot be {first['input']!r}: {wanted}") from error
    except ArtifactError as error:
        raise GateError(str(error)) from error
    latents, images, _ = answer(
        Sampler(network), [torch.from_numpy(feed) for feed in reference_feeds(contract).values()]
    )
    return contract.model_copy(update={"reference": reference(latents, images)})


def write(network: Network, contract: Contract, folder: Path) -> None:
    """Export both graphs into the folder."""
    sampler = export_sampler(in_precision(network, contract.precision))
    onnx.helper.set_model_props(sampler, contract.to_metadata())
    write_atomically(folder / MODEL_FILE, sampler.SerializeToString())
    write_atomically(folder / ENCODER_FILE, export_encoder(network).SerializeToString())


def _claim(partial: Path, model: Path) -> Path:
    """Rename to the next free version, also if another publication is faster."""
    while True:
        taken = [int(path.name) for path in model.iterdir() if VERSION.fullmatch(path.name)]
        target = model / str(max(taken, default=0) + 1)
        if not VERSION.fullmatch(target.name):
            raise GateError(f"{model} has no version left after {max(taken)}: remove it, or take another name")
        try:
            return partial.rename(target)
        except OSError:
            if not target.exists():
                raise


def _mixture(names: Sequence[str], mixture: Mixture) -> dict[str, Any]:
    """Raises GateError."""
    if len(mixture.parameters) != len(names):
        raise GateError(f"the mixture has {len(mixture.parameters)} parameters, not {' and '.join(names)}")
    weights = mixture.log_weights.double().softmax(0)
    parameters = dict(zip(names, mixture.parameters, strict=True))
    # As text a float32 has as few digits as tell it from the next one.
    shortest = {name: values.detach().numpy().astype(str).astype(np.float64) for name, values in parameters.items()}
    return {"weights": weights.tolist(), **{name: values.tolist() for name, values in shortest.items()}}


def _compact(parameter: Tensor) -> float | list[object]:
    """One number where every element is the same."""
    values: list[object] = parameter.tolist()
    first = parameter.flatten()[0]
    return first.item() if bool((parameter == first).all()) else values


def _version(tool: str) -> str:
    for distribution in (tool, f"{tool}-gpu"):
        try:
            return version(distribution)
        except ModuleNotFoundError:
            continue
    raise LookupError(tool)
