"""Publication: export a network, pass the gate, and rename the folder, so that readers see only whole versions."""

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
from reparam.export.checks import REFERENCE_ROWS, REFERENCE_SEED, reference_words, thinned
from reparam.export.errors import GateError
from reparam.export.evaluate import read_evaluation
from reparam.export.files import write_atomically
from reparam.export.gate import gate, in_precision, torch_outputs
from reparam.export.graph import Sampler, export_encoder, export_sampler
from reparam.export.network import Network
from reparam.export.run import Run
from reparam.models import Mixture
from reparam.service.artifact.contract import FAMILIES, ArtifactError, Contract, Precision
from reparam.service.artifact.file import ENCODER_FILE, MODEL_FILE, NAME, VERSION
from reparam.service.artifact.noise import NOISE_VERSION

Facts = Mapping[str, str | int | float]

READABLE = 0o755  # the service may run as another user
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime")


def publish_run(folder: Path, name: str, repository: Path, precision: Precision = "float32") -> Path:
    """Publish the network of a run as the next version of a model.

    The files must hold the run's weights bit for bit, or rounded to float16.

    folder: folder of the run, trained and evaluated.
    name: name of the model.
    repository: the model repository.
    precision: precision of the decoder.

    Returns: the new folder, `repository`/`name`/<version>.

    Raises: RunError if the run has not finished or has no evaluation, GateError if a file differs from the network or
        `name` cannot name a model, OSError. After an error nothing is written.
    """
    _check_name(name)
    network, contract = network_and_contract(Run(folder), precision)
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
    """Publish a network as the next version of a model, if the files pass the gate.

    name: name of the model.
    repository: the model repository.
    precision: precision of the decoder.
    mixture: prior to sample from, as returned by `fit_mixture`; default: N(0, I), or uniform categories.
    trained_on, evaluation: names and values shown by `/models`: the origin of the network, measurements.

    Returns: the new folder, `repository`/`name`/<version>.

    Raises: GateError if the network or an argument cannot be published, or a file differs from the network; OSError.
        After an error nothing is written.
    """
    _check_name(name)
    network.check()
    contract = build_contract(
        network, network.prior(), mixture, trained_on=trained_on or {}, evaluation=evaluation or {}, precision=precision
    )
    return _publish(network, contract, name, Path(repository), exact=False)


def _check_name(name: str) -> None:
    """Check the name of a model. Raises: GateError if no model can have this name."""
    if not NAME.fullmatch(name):
        allowed = "letters, digits, '.', '_' and '-', first a letter or digit"
        raise GateError(f"{name!r} cannot be a model's name: {allowed}")


def _publish(network: Network, contract: Contract, name: str, repository: Path, *, exact: bool) -> Path:
    """Write the files into a hidden folder, check the files, and rename the folder to the next version.

    exact: as in `gate`.

    Returns: the new folder.

    Raises: GateError, OSError.
    """
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
            with contextlib.suppress(OSError):  # not empty after a success
                folder.rmdir()


def _make_readable(folder: Path) -> list[Path]:
    """Make a folder and the missing folders above, readable for the service's user.

    Returns: the new folders, innermost first.
    """
    if folder.is_dir():
        return []
    made = _make_readable(folder.parent)
    folder.mkdir(exist_ok=True)
    folder.chmod(READABLE)
    return [folder, *made]


def _write_checked(network: Network, contract: Contract, folder: Path, *, exact: bool) -> None:
    """Write both files and pass them through the gate.

    Raises: GateError, with paths relative to the folder.
    """
    try:
        write_files(network, contract, folder)
        gate(network, folder, exact=exact)
    except (GateError, ArtifactError) as error:
        fault = str(error).replace(f"{folder}/", "")
        if contract.precision == "float16":
            fault = f"this decoder does not fit float16, publish in float32: {fault}"
        raise GateError(fault) from error


def network_and_contract(run: Run, precision: Precision = "float32") -> tuple[Network, Contract]:
    """Build the network of a run, and the contract of the run's artifact.

    Raises: RunError if the run has not finished or has no evaluation; GateError for values that no contract holds.
    """
    vae, config = run.trained(), run.config()
    network, priors = Network.of(vae), run.priors(vae)
    contract = build_contract(
        network,
        priors["standard"],
        priors.get("mixture"),
        trained_on={"data": config.data_name, "sha256": config.data_sha256, "epochs": config.train.epochs},
        evaluation=read_evaluation(run),
        precision=precision,
    )
    return network, contract


def build_contract(
    network: Network,
    standard: Mixture,
    mixture: Mixture | None,
    *,
    trained_on: Facts,
    evaluation: Facts,
    precision: Precision,
) -> Contract:
    """Build the contract of an artifact.

    standard: the standard prior, a mixture of a single component.
    mixture: a second prior, the default for sampling; None for no second prior.
    trained_on, evaluation: names and values shown by `/models`.
    precision: precision of the decoder.

    Raises: GateError for values that no contract holds.
    """
    names = network.family.parameter_names
    prior = {name: parameter.detach()[0] for name, parameter in zip(names, standard.parameters, strict=True)}
    try:
        contract = Contract(
            kind=network.kind,
            latent_shape=network.latent_shape,
            image_shape=network.image_shape,  # type: ignore[arg-type]  # C is 1 or 3
            prior={name: _compact(parameter) for name, parameter in prior.items()},
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
            reference=_reference(network, list(prior.values())),
        )
        contract.mixture_arrays()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:2]))
        expected = first["msg"].lower() if len(first["loc"]) == 1 else "values must be text or finite numbers"
        raise GateError(f"{where} cannot be {first['input']!r}: {expected}") from error
    except ArtifactError as error:
        raise GateError(str(error)) from error
    return contract


def _reference(network: Network, prior: list[Tensor]) -> dict[str, Any]:
    """Compute latents and images of the reference rows by the network itself. `verify` recomputes these values.

    prior: the parameters of the standard prior, each (*latent_shape).

    Returns: `seed` and `rows` of the reference rows, and the `thinned` values of `latents` and `images`.
    """
    noise = torch.from_numpy(FAMILIES[network.kind].noise(reference_words(network.latent_shape)))
    parameters = [parameter.expand_as(noise).contiguous() for parameter in prior]
    temperature = torch.full((REFERENCE_ROWS,), network.family.default_temperature)
    latents, images, _ = torch_outputs(Sampler(network), [noise, *parameters, temperature])
    return {
        "seed": REFERENCE_SEED,
        "rows": REFERENCE_ROWS,
        "latents": thinned(latents).tolist(),
        "images": thinned(images).tolist(),
    }


def write_files(network: Network, contract: Contract, folder: Path) -> None:
    """Export both graphs into the folder: model.onnx with the contract as metadata, and encoder.onnx.

    Raises: GateError if torch cannot export the network; OSError.
    """
    sampler = export_sampler(in_precision(network, contract.precision))
    onnx.helper.set_model_props(sampler, contract.to_metadata())
    write_atomically(folder / MODEL_FILE, sampler.SerializeToString())
    write_atomically(folder / ENCODER_FILE, export_encoder(network).SerializeToString())


def _claim(partial: Path, model: Path) -> Path:
    """Rename a folder to the next free version. Tries again if another publication takes the version first.

    partial: the folder with the finished files.
    model: folder of the model.

    Returns: the new path.

    Raises: GateError if no version is left; OSError.
    """
    while True:
        taken = [int(path.name) for path in model.iterdir() if VERSION.fullmatch(path.name)]
        target = model / str(max(taken, default=0) + 1)
        if not VERSION.fullmatch(target.name):
            raise GateError(
                f"{model} has no version left after {max(taken)}: remove this version, or choose another name"
            )
        try:
            return partial.rename(target)
        except OSError:
            if not target.exists():
                raise


def _mixture(names: Sequence[str], mixture: Mixture) -> dict[str, Any]:
    """Convert the mixture to the form of the metadata.

    names: names of the family's parameters.

    Returns: `weights` (C) and each parameter (C, *latent_shape) as nested lists, by name.

    Raises: GateError for a wrong number of parameters.
    """
    if len(mixture.parameters) != len(names):
        raise GateError(f"the mixture has {len(mixture.parameters)} parameters, not {' and '.join(names)}")
    weights = mixture.log_weights.double().softmax(0)
    parameters = dict(zip(names, mixture.parameters, strict=True))
    # The text of a float32 has the fewest digits that identify the number: half as many as a float64.
    shortest = {name: values.detach().numpy().astype(str).astype(np.float64) for name, values in parameters.items()}
    return {"weights": weights.tolist(), **{name: values.tolist() for name, values in shortest.items()}}


def _compact(parameter: Tensor) -> float | list[object]:
    """Convert a parameter to the form of the metadata: nested lists, or one number if all elements are equal."""
    values: list[object] = parameter.tolist()
    first = parameter.flatten()[0]
    return first.item() if bool((parameter == first).all()) else values


def _version(tool: str) -> str:
    """Return the installed version of a tool, also under the name of the GPU build.

    Raises: LookupError if the tool is not installed.
    """
    for distribution in (tool, f"{tool}-gpu"):
        try:
            return version(distribution)
        except ModuleNotFoundError:
            continue
    raise LookupError(tool)
