"""The gate before publication: files are compared with the network that they were made from."""

import copy
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from reparam.export.errors import GateError
from reparam.export.graph import Encoder, Sampler
from reparam.export.network import Network
from reparam.export.verify import (
    TOLERANCE,
    batches,
    compare,
    encoder_images,
    open_encoder,
    run,
    run_encoder,
    temperatures,
    tolerance_of,
    varied_feeds,
    verify,
)
from reparam.models.bodies import to_float16
from reparam.service.artifact.contract import Precision
from reparam.service.artifact.file import ENCODER_FILE, MODEL_FILE, load


def gate(network: Network, folder: Path, *, exact: bool) -> None:
    """Refuse files that do not compute what the network computes. Raises GateError, ArtifactError.

    Both graphs, run by onnxruntime, must answer what torch answers in float32 within 1e-4, images of a float16 decoder
    within 0.02, at batches of 1, 2, 3 and a large one, at temperature 0, 0.5, the default and a large one.

    exact: the weights must be the network's too, bit for bit, or rounded to float16. The exporter keeps those of linear
    layers and convolutions; batch normalization and some others it folds into what they follow.
    """
    artifact = load(folder / MODEL_FILE)
    precision = artifact.contract.precision
    if exact:
        _same_weights(in_precision(network, precision).decoder, folder / MODEL_FILE, "model.decoder.")
        _same_weights(network.encoder, folder / ENCODER_FILE, "model.encoder.")
    names = list(artifact.contract.outputs())
    for temperature in temperatures(artifact.contract):
        for rows in batches(artifact.contract):
            where = f"for {rows} rows at temperature {temperature:g}, compared with torch"
            feeds = varied_feeds(artifact.contract, rows, seed=rows)
            feeds["temperature"] = np.full(rows, temperature, np.float32)
            found = run(artifact, feeds, where)
            expected = answer(Sampler(network), [torch.from_numpy(feed) for feed in feeds.values()])
            for name, values in zip(names, expected, strict=True):
                compare(name, found[name], values, where, tolerance_of(name, precision))
    encoder = open_encoder(folder)
    for rows in batches(artifact.contract):
        images = encoder_images(artifact.contract, rows)
        expected = answer(Encoder(network), [torch.from_numpy(images)])
        for name, found_values, values in zip(
            network.family.parameter_names, run_encoder(encoder, images), expected, strict=True
        ):
            where = f"for {rows} rows through the encoder, compared with torch"
            compare(name, found_values, values, where, relative=TOLERANCE)
    verify(folder)


def in_precision(network: Network, precision: Precision) -> Network:
    """The same, or a copy whose decoder is rounded to float16."""
    if precision == "float32":
        return network
    half = copy.deepcopy(network)
    half.decoder = to_float16(half.decoder)
    return half


@torch.inference_mode()
def answer(module: nn.Module, inputs: list[Tensor]) -> list[np.ndarray]:
    """What a graph answers in torch."""
    return [output.numpy() for output in module.eval()(*inputs)]


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
