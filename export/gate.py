"""The gate before publication: exported files must compute the same as the network."""

import copy
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from reparam.export.checks import (
    TOLERANCE,
    batch_sizes,
    compare,
    encoder_images,
    open_encoder,
    run_encoder,
    run_sampler,
    temperatures,
    tolerance_of,
    varied_feeds,
)
from reparam.export.errors import GateError
from reparam.export.graph import Encoder, Sampler
from reparam.export.network import Network
from reparam.export.verify import verify
from reparam.models.bodies import to_float16
from reparam.service.artifact.contract import Contract, Precision
from reparam.service.artifact.file import ENCODER_FILE, MODEL_FILE, Artifact, load


def gate(network: Network, folder: Path, *, exact: bool) -> None:
    """Refuse files that compute anything else than the network.

    Both graphs run in onnxruntime and in torch, at batches of 1, 2, 3 and a large batch. The sampler runs at
    temperature 0, 0.5, the default and a large temperature. Latents and images may differ by 1e-4, and pixels by 1.
    With a float16 decoder images may differ by 0.02, and pixels by 5. Parameters from the encoder may differ by 1e-4
    plus 1e-4 of the expected value. `verify` follows.

    network: the original, in float32.
    folder: folder of model.onnx and encoder.onnx.
    exact: also compare the weights, bit for bit (after rounding to float16 for a float16 decoder). Correct for linear
        layers and convolutions; the exporter folds batch normalization and others into neighbouring weights.

    Raises: GateError if a value differs, ArtifactError if a file breaks the contract.
    """
    artifact = load(folder / MODEL_FILE)
    if exact:
        decoder = in_precision(network, artifact.contract.precision).decoder
        _check_weights(decoder, folder / MODEL_FILE, "model.decoder.")
        _check_weights(network.encoder, folder / ENCODER_FILE, "model.encoder.")
    _check_sampler(network, artifact)
    _check_encoder(network, artifact.contract, folder)
    verify(folder)


def in_precision(network: Network, precision: Precision) -> Network:
    """Return the network itself for float32; for float16 a copy with the decoder rounded to float16."""
    if precision == "float32":
        return network
    half = copy.deepcopy(network)
    half.decoder = to_float16(half.decoder)
    return half


@torch.inference_mode()
def torch_outputs(module: nn.Module, inputs: list[Tensor]) -> list[np.ndarray]:
    """Run a graph in torch, in evaluation mode.

    module: a Sampler or an Encoder.
    inputs: the graph's inputs in order.

    Returns: the graph's outputs in order.
    """
    return [output.numpy() for output in module.eval()(*inputs)]


def _check_sampler(network: Network, artifact: Artifact) -> None:
    contract = artifact.contract
    for temperature in temperatures(contract):
        for rows in batch_sizes(contract):
            where = f"for {rows} rows at temperature {temperature:g}, compared with torch"
            feeds = varied_feeds(contract, rows, seed=rows)
            feeds["temperature"] = np.full(rows, temperature, np.float32)
            found = run_sampler(artifact, feeds, where)
            expected = torch_outputs(Sampler(network), [torch.from_numpy(feed) for feed in feeds.values()])
            for name, values in zip(contract.outputs(), expected, strict=True):
                compare(name, found[name], values, where, tolerance_of(name, contract.precision))


def _check_encoder(network: Network, contract: Contract, folder: Path) -> None:
    session = open_encoder(folder)
    for rows in batch_sizes(contract):
        where = f"for {rows} rows through the encoder, compared with torch"
        images = encoder_images(contract, rows)
        expected = torch_outputs(Encoder(network), [torch.from_numpy(images)])
        found = run_encoder(session, images)
        for name, found_values, values in zip(network.family.parameter_names, found, expected, strict=True):
            compare(name, found_values, values, where, relative=TOLERANCE)


def _check_weights(module: nn.Module, path: Path, prefix: str) -> None:
    """Compare the weights in a file with the module's parameters, bit for bit.

    path: the ONNX file.
    prefix: beginning of the weights' names in the file, before the parameter's own name.

    Raises: GateError for a weight with another value, or without an equal weight in the file.
    """
    graph = onnx.load(path, load_external_data=False).graph
    exported = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, parameter in module.named_parameters():
        values = parameter.detach().numpy()
        if prefix + name in exported:
            compare(f"weight {prefix + name}", exported[prefix + name], values, f"in {path.name}", 0)
        # The exporter leaves out biases of zeros, and stores equal tensors once.
        elif values.any() and not any(np.array_equal(array, values) for array in exported.values()):
            raise GateError(f"{path.name} has no weight {prefix + name}, nor an equal one in its place")
