"""From a run to an artifact: export, gate, and a rename, so that a reader sees a whole version or none."""

import contextlib
import copy
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.errors import GateError, RunError
from export.evaluate import read_evaluation
from export.graph import Encoder, Sampler, export_encoder, export_sampler
from export.objectives import VAE
from export.run import Run, write_atomically
from export.verify import (
    BATCHES,
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

READABLE = 0o755  # by the service, which may run as another user
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime")


def publish(folder: Path, name: str, repository: Path, precision: Precision = "float32") -> Path:
    """Write `repository`/`name`/<next version>/ from the run in `folder`, if it passes the gate.

    precision: that the decoder will compute in.

    Returns the new folder. Raises RunError, GateError, ArtifactError; then nothing is written.
    """
    if not NAME.fullmatch(name):
        raise RunError(f"{name!r} cannot be a model's name: letters, digits, '.', '_' and '-', first a letter or digit")
    source = Run(folder)
    model = source.trained()
    contract = describe(model, source, precision)
    _make_readable(repository / name)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=repository / name))
    try:
        write(model, contract, partial)
        _pass(model, contract, partial)
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


def _pass(model: VAE, contract: Contract, folder: Path) -> None:
    try:
        gate(model, folder)
    except (GateError, ArtifactError) as error:
        if contract.precision == "float32":
            raise
        raise GateError(f"this decoder does not fit float16, publish it in float32: {error}") from error


def describe(model: VAE, source: Run, precision: Precision = "float32") -> Contract:
    """The contract of the artifact, with the reference rows computed by the network itself."""
    config, priors = source.config(), source.priors(model)
    contract = Contract(
        kind=config.train.kind,
        latent_shape=model.config.latent_shape,
        image_shape=model.config.image_shape,  # type: ignore[arg-type]  # C is 1 or 3: checked here
        prior={
            key: _compact(parameter.detach()[0])
            for key, parameter in zip(model.parameter_names, priors["standard"].parameters, strict=True)
        },
        mixture=_mixture(model, priors.get("mixture")),
        precision=precision,
        default_temperature=model.default_temperature,
        noise_version=NOISE_VERSION,  # type: ignore[arg-type]  # Literal[1], checked here
        trained_on={"data": config.data_name, "sha256": config.data_sha256, "epochs": config.train.epochs},
        evaluation=read_evaluation(source),
        tools={"python": platform.python_version(), "reparam": __version__, **{tool: _version(tool) for tool in TOOLS}},
        reference={},
    )
    latents, images, _ = _answer(
        Sampler(model), [torch.from_numpy(feed) for feed in reference_feeds(contract).values()]
    )
    return contract.model_copy(update={"reference": reference(latents, images)})


def write(model: VAE, contract: Contract, folder: Path) -> None:
    """Export both graphs into the folder."""
    sampler = export_sampler(_in_precision(model, contract.precision))
    onnx.helper.set_model_props(sampler, contract.to_metadata())
    write_atomically(folder / MODEL_FILE, sampler.SerializeToString())
    write_atomically(folder / ENCODER_FILE, export_encoder(model).SerializeToString())


def gate(model: VAE, folder: Path) -> None:
    """Refuse files that do not compute what the network computes. Raises GateError, ArtifactError.

    The weights must be the network's, bit for bit, or rounded to float16; and both graphs, run by onnxruntime, must
    answer what torch answers in float32 within 1e-4, images of a float16 decoder within 0.02, at batches of 1, 2, 3 and
    64, at temperature 0, the default and a large one.
    """
    artifact = load(folder / MODEL_FILE)
    precision = artifact.contract.precision
    _same_weights(_in_precision(model, precision).decoder, folder / MODEL_FILE, "model.decoder.")
    _same_weights(model.encoder, folder / ENCODER_FILE, "model.encoder.")
    names = list(artifact.contract.outputs())
    for temperature in temperatures(artifact.contract):
        for rows in BATCHES:
            where = f"for {rows} rows at temperature {temperature:g}, compared with torch"
            feeds = varied_feeds(artifact.contract, rows, seed=rows)
            feeds["temperature"] = np.full(rows, temperature, np.float32)
            found = run(artifact, feeds, where)
            expected = _answer(Sampler(model), [torch.from_numpy(feed) for feed in feeds.values()])
            for name, values in zip(names, expected, strict=True):
                compare(name, found[name], values, where, tolerance_of(name, precision))
    encoder = open_encoder(folder)
    for rows in BATCHES:
        images = encoder_images(artifact.contract, rows)
        expected = _answer(Encoder(model), [torch.from_numpy(images)])
        for name, found_values, values in zip(
            model.parameter_names, run_encoder(encoder, images), expected, strict=True
        ):
            compare(name, found_values, values, f"for {rows} rows through the encoder, compared with torch")
    verify(folder)


def _in_precision(model: VAE, precision: Precision) -> VAE:
    if precision == "float32":
        return model
    half = copy.deepcopy(model)
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


def _mixture(model: VAE, mixture: Mixture | None) -> dict[str, Any] | None:
    if mixture is None:
        return None
    weights = mixture.log_weights.double().softmax(0)
    parameters = dict(zip(model.parameter_names, mixture.parameters, strict=True))
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
