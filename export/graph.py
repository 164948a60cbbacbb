"""From a trained network to ONNX files: the sampler, noise to images, and the encoder."""

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
from reparam.service.artifact.contract import IMAGE_OUTPUTS, KINDS

OPSET = 18
EXAMPLE_ROWS = 2  # a batch of 1 would be traced as a constant


class Sampler(nn.Module):
    """The graph of model.onnx: noise, parameters and temperature in; latents, images in [0, 1] and uint8 pixels out."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor, *parameters_and_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *parameters, temperature = parameters_and_temperature
        latents = self.model.family.sample(tuple(parameters), noise, temperature)
        images = self.model.decode(latents)
        return latents, images, (images * 255).round().to(torch.uint8)


class Encoder(nn.Module):
    """The graph of encoder.onnx: images in [0, 1] in, the parameters of q(z | x) out; never a sample."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.encode(images)


def sampler_inputs(model: Network, rows: int) -> dict[str, Tensor]:
    """Inputs of the sampler, by name, of the right shapes."""
    latent = torch.zeros(rows, *model.latent_shape)
    return {
        **{name: latent.clone() for name in ("noise", *model.family.parameter_names)},
        "temperature": torch.ones(rows),
    }


def export_sampler(model: Network) -> onnx.ModelProto:
    """Raises GateError where torch cannot."""
    return _export(Sampler(model), sampler_inputs(model, EXAMPLE_ROWS), [KINDS[model.kind].latents, *IMAGE_OUTPUTS])


def export_encoder(model: Network) -> onnx.ModelProto:
    """Raises GateError where torch cannot."""
    images = torch.zeros(EXAMPLE_ROWS, *model.image_shape)
    return _export(Encoder(model), {"images": images}, list(model.family.parameter_names))


def _export(module: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str]) -> onnx.ModelProto:
    batch = {0: torch.export.Dim("batch")}
    first, *others = (batch for _ in inputs)
    # A second argument onwards arrives in one variadic parameter.
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
    assert program is not None  # noqa: S101  # it is only with dynamo=False
    proto = program.model_proto
    for node in [*proto.graph.node, *proto.graph.value_info]:
        del node.metadata_props[:]  # traces of the source code
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's deprecations, and the graphs that it prints and logs where it fails."""
    log = logging.getLogger("torch")
    before = log.level
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(before)
