"""Export to ONNX: the sampler (noise to images) and the encoder."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import onnx
import torch
from torch import Tensor, nn

from reparam.export.errors import GateError
from reparam.export.network import Network
from reparam.service.artifact.contract import FAMILIES, IMAGE_OUTPUTS

OPSET = 18
EXAMPLE_ROWS = 2  # torch.export treats a batch of 1 as a constant


class Sampler(nn.Module):
    """The graph of model.onnx.

    Inputs: noise and parameters, each (n, *latent_shape), and temperature (n,); float32.
    Outputs: latents (n, *latent_shape) and images (n, C, H, W) in [0, 1], float32; pixels uint8 (n, C, H, W).
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network  # the attribute gives the weights in the file their names: model.decoder.0.weight

    def forward(self, noise: Tensor, *parameters_and_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *parameters, temperature = parameters_and_temperature
        latents = self.model.family.sample(tuple(parameters), noise, temperature)
        images = self.model.decode(latents)
        return latents, images, (images * 255).round().to(torch.uint8)


class Encoder(nn.Module):
    """The graph of encoder.onnx: images (n, C, H, W) in [0, 1] -> parameters of q(z | x). Nothing is sampled."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network  # the attribute gives the weights in the file their names: model.decoder.0.weight

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.encode(images)


def sampler_inputs(network: Network, rows: int) -> dict[str, Tensor]:
    """Make example inputs of the sampler.

    rows: number of rows.

    Returns: float32 (rows, ...) by name, in the order of the graph's inputs.
    """
    latent = torch.zeros(rows, *network.latent_shape)
    return {
        **{name: latent.clone() for name in ("noise", *network.family.parameter_names)},
        "temperature": torch.ones(rows),
    }


def export_sampler(network: Network) -> onnx.ModelProto:
    """Export the sampler.

    Returns: the ONNX model, without the contract.

    Raises: GateError if torch cannot export the network.
    """
    return _export(
        Sampler(network), sampler_inputs(network, EXAMPLE_ROWS), [FAMILIES[network.kind].latents, *IMAGE_OUTPUTS]
    )


def export_encoder(network: Network) -> onnx.ModelProto:
    """Export the encoder.

    Returns: the ONNX model.

    Raises: GateError if torch cannot export the network.
    """
    images = torch.zeros(EXAMPLE_ROWS, *network.image_shape)
    return _export(Encoder(network), {"images": images}, list(network.family.parameter_names))


def _export(module: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str]) -> onnx.ModelProto:
    batch = {0: torch.export.Dim("batch")}
    first, *others = (batch for _ in inputs)
    # `forward` takes all inputs after the first in one variadic parameter.
    shapes = (first, tuple(others)) if others else (first,)
    with _quiet():
        try:
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=outputs,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            fault = str(error.__cause__ or error).partition("\n")[0]
            raise GateError(f"torch cannot export the {type(module).__name__.lower()}: {fault}") from error
    assert program is not None  # noqa: S101  # None only with dynamo=False
    proto = program.model_proto
    for node in [*proto.graph.node, *proto.graph.value_info]:
        del node.metadata_props[:]  # remove paths and lines of the source code
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's deprecation warnings, and the graphs printed and logged on failure."""
    log = logging.getLogger("torch")
    before = log.level
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(before)
