"""The code that runs models on a GPU, on whatever device there is: the demo models in graph, against plain runs.

On a machine with a GPU and little else: REPARAM_DEVICE=cuda python -m pytest --noconftest tests/test_graph.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch  # noqa: F401  # brings the libraries of CUDA, wherever they lie

from reparam.service.artifact import noise
from reparam.service.artifact.file import CPU, load
from reparam.service.runtime.devices import CUDA, choose, cuda_attempts, with_tensor_cores
from reparam.service.runtime.graphs import BoundGraph
from reparam.service.runtime.sampler import bind_sampler
from reparam.service.settings import Settings

MOST = 50
DEMOS = sorted(Path("artifacts").glob("*/*/model.onnx"))
DEVICE = choose(Settings())  # REPARAM_DEVICE=cuda: no GPU, no test
APART = [True] if DEVICE.name == "cuda" else [False, True]


def bound(path: Path, apart: bool) -> BoundGraph:
    graph = bind_sampler(load(path, DEVICE.attempts[0]), MOST, apart)
    graph.warm_up(seconds=1)
    return graph


def agree(name: str, found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert found.shape == expected.shape
    if DEVICE.name == "cpu":
        assert np.array_equal(found, expected)
    else:
        relative = 1e-4 if name == "sums" else 1e-7
        np.testing.assert_allclose(found.astype(float), expected, relative, atol=1 if name == "pixels" else 1e-4)


@pytest.mark.parametrize("apart", APART, ids=lambda apart: "apart" if apart else "in place")
@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.parts[1])
def test_rows_are_those_of_a_plain_run_at_and_beside_the_edge_of_a_bucket(path: Path, apart: bool) -> None:
    """On the CPU bit for bit; a GPU may round otherwise, but rows do not depend on the bucket's other rows."""
    graph = bound(path, apart)
    plain = load(path)
    contract = plain.contract
    for n in (1, 2, 3, 4, 5, 31, 32, 33, MOST):
        feeds = contract.feeds(noise.words(4, 0, n, contract.latent_shape), 0.5)
        for name, array in feeds.items():
            graph.arrays[name][:n] = array
            graph.arrays[name][n:] = 7
        outputs = {name: array.copy() for name, array in graph.run(n).items()}
        for name in graph.arrays:
            graph.arrays[name][n:] = 0
        for name, array in graph.run(n).items():
            agree(name, array, outputs[name])
        expected = plain.run(feeds)
        if DEVICE.name == "cuda":  # in float32, not rounded to TF32
            on_device = load(path, DEVICE.attempts[0]).run(feeds)
            np.testing.assert_allclose(on_device["images"], expected["images"], atol=1e-4)
        if apart:
            sums = expected.pop("images").sum((1, 2, 3))
            np.testing.assert_allclose(outputs.pop("sums"), sums, rtol=1e-4)
        assert outputs.keys() == expected.keys()
        for name, array in expected.items():
            agree(name, outputs[name], array)


@pytest.mark.parametrize("apart", APART)
def test_what_is_checked_is_finite_for_the_rows_that_are(apart: bool) -> None:
    graph = bound(DEMOS[0], apart)
    graph.arrays["mu"][1] = 3e38  # the network overflows
    graph.arrays["mu"][2] = np.nan
    outputs = graph.run(4)
    latents, images = (np.isfinite(outputs[name].reshape(4, -1)).all(1).tolist() for name in graph.checked)
    assert latents == [True, True, False, True]
    assert images == [True, False, False, True]


def test_a_bucket_is_a_power_of_two_or_all_there_is() -> None:
    apart = bound(DEMOS[0], apart=True)
    assert [apart.size(n) for n in (1, 2, 3, 31, 32, 33, MOST)] == [1, 2, 4, 32, 32, MOST, MOST]
    assert [bind_sampler(load(DEMOS[0]), MOST).size(n) for n in (1, 3, MOST)] == [1, 3, MOST]


def test_a_graph_is_captured_unless_that_is_not_wanted_or_not_possible() -> None:
    exact = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    plain, captured = ((CUDA, exact), CPU), ((CUDA, exact | {"enable_cuda_graph": "1"}), CPU)
    assert cuda_attempts(Settings(cuda_graphs=True, tf32=False)) == (captured, plain)
    assert cuda_attempts(Settings(cuda_graphs=False, tf32=False)) == (plain,)
    assert cuda_attempts(Settings(cuda_graphs=False, tf32=True)) == (((CUDA, exact | {"use_tf32": "1"}), CPU),)


def test_float16_has_the_tensor_cores_whatever_float32_may_use() -> None:
    assert with_tensor_cores(((CUDA, {"use_tf32": "0", "a": "b"}), CPU)) == ((CUDA, {"use_tf32": "1", "a": "b"}), CPU)


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.parts[1])
def test_the_same_batch_has_the_same_rows_bit_for_bit(path: Path) -> None:
    """Also where the libraries have algorithms that add up in any order."""
    graph = bound(path, apart=True)
    contract = load(path).contract
    for n in (1, 8, 32):
        for name, array in contract.feeds(noise.words(4, 0, n, contract.latent_shape), 0.5).items():
            graph.arrays[name][:n] = array
        first = {name: array.copy() for name, array in graph.run(n).items()}
        for _ in range(20):
            for name, array in graph.run(n).items():
                assert np.array_equal(array, first[name]), (n, name)


def test_a_gpu_runs_the_demo_models_where_there_is_one() -> None:
    expected = CUDA if DEVICE.name == "cuda" else "CPUExecutionProvider"
    assert {bound(path, apart=True).session.get_providers()[0] for path in DEMOS} == {expected}


def test_bound_large_rows_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load(DEMOS[0])
    row = sum(4 * int(np.prod(shape)) for shape in artifact.contract.inputs().values())
    row += sum(4 * int(np.prod(shape)) for _, shape in artifact.contract.outputs().values())
    for most in ("MAX_BYTES", "MAX_BYTES_ON_GPU"):
        monkeypatch.setattr(f"reparam.service.runtime.graphs.{most}", 13 * row)
    assert bind_sampler(artifact, 1024).max_rows == 8
    assert bind_sampler(artifact, 5).max_rows == 5
    for most in ("MAX_BYTES", "MAX_BYTES_ON_GPU"):
        monkeypatch.setattr(f"reparam.service.runtime.graphs.{most}", row - 1)
    assert bind_sampler(artifact, 1024).max_rows == 1
