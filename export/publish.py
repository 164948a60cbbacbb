"""From a network to an artifact: export, gate, and a rename, so that a reader sees a whole version or none."""

import contextlib
import copy
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.errors import GateError
from export.evaluate import read_evaluation
from export.graph import Encoder, Sampler, export_encoder, export_sampler
from export.network import Network
from export.run import Run, write_atomically
from export.verify import (
    batches,
    compare,
    encoder_images,
    open_encoder,
    reference,
    reference_feeds,
    run,
    run_encoder,
    temperatures,
    tolerance_of,
    varied_feeds,
    verify,
)
from models import Mixture
from models.bodies import halved
from service import __version__
from service.artifact import ENCODER_FILE, MODEL_FILE, NAME, VERSION, load
from service.contract import ArtifactError, Contract, Precision
from service.noise import NOISE_VERSION

Origin = Mapping[str, str | int]
Evaluation = Mapping[str, str | int | float]

READABLE = 0o755  # by the service, which may run as another user
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime")


def publish_run(folder: Path, name: str, repository: Path, precision: Precision = "float32") -> Path:
    """`publish` the network that was trained in `folder`, whose weights the files must hold bit for bit, or rounded to
    float16. Raises RunError too."""
    network, contract = described(Run(folder), precision)
    return _publish(network, contract, name, repository, exact=True)


def publish(
    network: Network,
    name: str,
    repository: Path,
    precision: Precision = "float32",
    *,
    mixture: Mixture | None = None,
    trained_on: Origin | None = None,
    evaluation: Evaluation | None = None,
) -> Path:
    """Write `repository`/`name`/<next version>/, if it passes the gate.

    precision: that the decoder will compute in.
    mixture: the prior to sample from, as `fit_mixture` returns it; else N(0, I), or categories that are equally likely.
    trained_on, evaluation: what `/models` shall tell of the network's origin, and of what was measured on it.

    Returns the new folder. Raises GateError, ArtifactError; then nothing is written.
    """
    network.check()
    contract = describe(network, network.prior(), mixture, trained_on or {}, evaluation or {}, precision)
    return _publish(network, contract, name, repository, exact=False)


def _publish(network: Network, contract: Contract, name: str, repository: Path, *, exact: bool) -> Path:
    if not NAME.fullmatch(name):
        raise GateError(f"{name!r} is no name of a model: letters, digits, '.', '_' and '-', first a letter or digit")
    _make_readable(repository / name)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=repository / name))
    try:
        write(network, contract, partial)
        _pass(network, contract, partial, exact=exact)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.chmod(READABLE)
        return _claim(partial, repository / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds other versions
            (repository / name).rmdir()


def _make_readable(folder: Path) -> None:
    """The folder and what is missing on the way to it, for the service may run as another user."""
    if not folder.is_dir():
        _make_readable(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(READABLE)


def _pass(network: Network, contract: Contract, folder: Path, *, exact: bool) -> None:
    try:
        gate(network, folder, exact=exact)
    except (GateError, ArtifactError) as error:
        if contract.precision == "float32":
            raise
        raise GateError(f"this decoder does not fit float16, publish it in float32: {error}") from error


def described(source: Run, precision: Precision = "float32") -> tuple[Network, Contract]:
    """The network of a run, and the contract of its artifact. Raises RunError."""
    vae, config = source.trained(), source.config()
    network, priors = Network.of(vae), source.priors(vae)
    origin: Origin = {"data": config.data_name, "sha256": config.data_sha256, "epochs": config.train.epochs}
    evaluation = read_evaluation(source)
    return network, describe(network, priors["standard"], priors.get("mixture"), origin, evaluation, precision)


def describe(
    network: Network,
    standard: Mixture,
    mixture: Mixture | None,
    trained_on: Origin,
    evaluation: Evaluation,
    precision: Precision,
) -> Contract:
    """The contract of an artifact, with the reference rows computed by the network itself."""
    family = network.family
    contract = Contract(
        kind=network.kind,
        latent_shape=network.latent_shape,
        image_shape=network.image_shape,  # type: ignore[arg-type]  # C is 1 or 3: checked here
        prior={
            key: _compact(parameter.detach()[0])
            for key, parameter in zip(family.parameter_names, standard.parameters, strict=True)
        },
        mixture=_mixture(network, mixture),
        precision=precision,
        default_temperature=family.default_temperature,
        noise_version=NOISE_VERSION,  # type: ignore[arg-type]  # Literal[1], checked here
        trained_on=dict(trained_on),
        evaluation=dict(evaluation),
        tools={"python": platform.python_version(), "reparam": __version__, **{tool: _version(tool) for tool in TOOLS}},
        reference={},
    )
    latents, images, _ = _answer(
        Sampler(network), [torch.from_numpy(feed) for feed in reference_feeds(contract).values()]
    )
    return contract.model_copy(update={"reference": reference(latents, images)})


def write(network: Network, contract: Contract, folder: Path) -> None:
    """Export both graphs into the folder."""
    sampler = export_sampler(_in_precision(network, contract.precision))
    onnx.helper.set_model_props(sampler, contract.to_metadata())
    write_atomically(folder / MODEL_FILE, sampler.SerializeToString())
    write_atomically(folder / ENCODER_FILE, export_encoder(network).SerializeToString())


def gate(network: Network, folder: Path, *, exact: bool) -> None:
    """Refuse files that do not compute what the network computes. Raises GateError, ArtifactError.

    Both graphs, run by onnxruntime, must answer what torch answers in float32 within 1e-4, images of a float16 decoder
    within 0.02, at batches of 1, 2, 3 and a large one, at temperature 0, the default and a large one.

    exact: the weights must be the network's too, bit for bit, or rounded to float16. The exporter keeps those of linear
    layers and convolutions; batch normalization and some others it folds into what they follow.
    """
    artifact = load(folder / MODEL_FILE)
    precision = artifact.contract.precision
    if exact:
        _same_weights(_in_precision(network, precision).decoder, folder / MODEL_FILE, "model.decoder.")
        _same_weights(network.encoder, folder / ENCODER_FILE, "model.encoder.")
    names = list(artifact.contract.outputs())
    for temperature in temperatures(artifact.contract):
        for rows in batches(artifact.contract):
            where = f"for {rows} rows at temperature {temperature:g}, compared with torch"
            feeds = varied_feeds(artifact.contract, rows, seed=rows)
            feeds["temperature"] = np.full(rows, temperature, np.float32)
            found = run(artifact, feeds, where)
            expected = _answer(Sampler(network), [torch.from_numpy(feed) for feed in feeds.values()])
            for name, values in zip(names, expected, strict=True):
                compare(name, found[name], values, where, tolerance_of(name, precision))
    encoder = open_encoder(folder)
    for rows in batches(artifact.contract):
        images = encoder_images(artifact.contract, rows)
        expected = _answer(Encoder(network), [torch.from_numpy(images)])
        for name, found_values, values in zip(
            network.family.parameter_names, run_encoder(encoder, images), expected, strict=True
        ):
            compare(name, found_values, values, f"for {rows} rows through the encoder, compared with torch")
    verify(folder)


def _in_precision(network: Network, precision: Precision) -> Network:
    if precision == "float32":
        return network
    half = copy.deepcopy(network)
    half.decoder = halved(half.decoder)
    return half


def _same_weights(module: nn.Module, path: Path, prefix: str) -> None:
    graph = onnx.load(path, load_external_data=False).graph
    exported = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, parameter in module.named_parameters():
        values = parameter.detach().numpy()
        if prefix + name in exported:
            compare(f"weight {prefix + name}", exported[prefix + name], values, f"in {path.name}", 0)
        # The exporter leaves out biases of zeros, and keeps one of two tensors that are alike.
        elif values.any() and not any(np.array_equal(array, values) for array in exported.values()):
            raise GateError(f"{path.name} has no weight {prefix + name}, nor an equal one in its place")


@torch.inference_mode()
def _answer(module: nn.Module, inputs: list[Tensor]) -> list[np.ndarray]:
    return [output.numpy() for output in module.eval()(*inputs)]


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


def _mixture(network: Network, mixture: Mixture | None) -> dict[str, Any] | None:
    if mixture is None:
        return None
    weights = mixture.log_weights.double().softmax(0)
    parameters = dict(zip(network.family.parameter_names, mixture.parameters, strict=True))
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
