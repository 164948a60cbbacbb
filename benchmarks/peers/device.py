"""Time decoders on the device the service would choose, and print JSON.

python -m benchmarks.peers.device SECONDS ROUNDS
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from benchmarks.peers.decoders import DEMOS, autoencoder, demo
from reparam.export.graph import Sampler, export_sampler, sampler_inputs
from reparam.export.network import Network
from reparam.service.artifact.contract import Contract, Precision
from reparam.service.runtime.devices import choose
from reparam.service.runtime.repository import Model, open_model
from reparam.service.settings import Settings

LARGE = "autoencoder-kl"
ROWS, LARGE_ROWS = (1, 64, 1024), (1, 8)
COMPILED = (64, 8)  # rows; each compilation takes up to a minute
TOLERANCE = 5  # levels of a pixel: float16 and TF32 round

Arrays = dict[str, npt.NDArray[np.float32]]
Pixels = npt.NDArray[np.uint8]
Way = Callable[[], Pixels]


def main(seconds: float, rounds: int) -> None:
    """Measure all cases.

    seconds: time for each way in each case, all rounds together.
    """
    device = choose(Settings())
    on_gpu = device.name == "cuda"
    if not on_gpu:
        torch.set_num_threads(device.threads)  # as in a run of the service
    torch.backends.cudnn.allow_tf32 = False  # as in the service
    networks: dict[str, Network] = {name: demo(name) for name in DEMOS}
    cases = [(name, rows) for name in DEMOS for rows in ROWS]
    if on_gpu:
        networks[LARGE] = autoencoder()
        cases += [(LARGE, rows) for rows in LARGE_ROWS]
    seen: dict[str, dict[str, float]] = {}
    differing: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        artifacts = {
            name: _artifact(network, Path(folder) / name, "float16" if name == LARGE else "float32")
            for name, network in networks.items()
        }
        for name, most in cases:
            served = open_model(name, 1, artifacts[name], device, most, seconds=inf)
            rows = served.sampler.replicas[0].max_rows
            ways = dict(_ways(networks[name], served, rows, device.name))
            if most not in COMPILED:
                del ways["torch.compile"]
            case = f"{name}, {rows} rows"
            try:
                seen[case] = _rows_per_second(ways, rows, seconds / rounds, rounds)
            except AssertionError as error:
                differing[case] = str(error)
            print(case, seen.get(case, "differ"), file=sys.stderr, flush=True)  # progress, in case of a timeout
    where = torch.cuda.get_device_name() if on_gpu else "the CPU"
    found = {"device": device.name, "name": where, "reason": device.reason, "rows_per_second": seen}
    print(json.dumps(found | {"differing_pixels": differing}))


def _artifact(model: Network, path: Path, precision: Precision) -> Path:
    """Write an artifact the service can load, without an evaluation."""
    contract = Contract(
        kind=model.kind,
        latent_shape=model.latent_shape,
        image_shape=model.image_shape,  # type: ignore[arg-type]  # C is 1 or 3
        prior=dict.fromkeys(model.family.parameter_names, 0.0),
        precision=precision,
        default_temperature=model.family.default_temperature,
        noise_version=1,
        trained_on={},
        evaluation={},
        tools={},
        reference={},
    )
    graph = export_sampler(model)
    onnx.helper.set_model_props(graph, contract.to_metadata())
    path.write_bytes(graph.SerializeToString())
    return path


def _ways(model: Network, served: Model, rows: int, device: str) -> Iterator[tuple[str, Way]]:
    where = torch.device(device)
    graph, inputs = served.sampler.replicas[0], _inputs(model, rows)
    for name, array in inputs.items():
        graph.arrays[name][:rows] = array
    yield "reparam", lambda: graph.run(rows)["pixels"]
    asked = (served.contract.family.latents, "pixels")
    yield "onnxruntime", lambda: served.artifact.run(inputs, asked)["pixels"]
    sampler = Sampler(model).to(where).eval()
    yield "torch", lambda: _through(sampler, inputs, where)
    torch.compiler.reset()  # torch.compile gives up after eight compilations of a function
    compiled = torch.compile(sampler, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)
    yield "torch.compile", lambda: _through(compiled, inputs, where)


def _inputs(model: Network, rows: int) -> Arrays:
    random = np.random.default_rng(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in sampler_inputs(model, rows).items()}
    return {
        name: np.ones(shape, np.float32) if name == "temperature" else random.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


@torch.inference_mode()
def _through(sampler: Callable[..., tuple[Tensor, ...]], inputs: Arrays, where: torch.device) -> Pixels:
    """Copy the inputs to the device, run the network, and copy the outputs back, which waits for the device."""
    latents, _, pixels = sampler(*(torch.from_numpy(array).to(where) for array in inputs.values()))
    latents.cpu()
    return pixels.cpu().numpy()


def _rows_per_second(ways: dict[str, Way], rows: int, seconds: float, rounds: int) -> dict[str, float]:
    """Medians of rows per second; the ways take turns, because the speed of the machine varies.

    Raises: AssertionError if the pixels differ.
    """
    expected = ways["torch"]()
    for way in ways.values():
        np.testing.assert_allclose(way(), expected, atol=TOLERANCE)
        way()  # torch.compile captures its CUDA graph in the second run
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(rows * _per_second(way, seconds))
    return {name: median(values) for name, values in found.items()}


def _per_second(way: Way, seconds: float) -> float:
    runs, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not runs:
        way()
        runs += 1
    return runs / spent


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
