"""Bound graphs of the demo models, compared with plain runs, on a GPU if there is one and on the CPU otherwise.

On a machine with a GPU and few packages: REPARAM_DEVICE=cuda python -m pytest --noconftest tests/test_graphs.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch  # noqa: F401  # loads the libraries of CUDA from where pip has put them

from reparam.service.artifact import noise
from reparam.service.artifact.file import CPU, load
from reparam.service.runtime.devices import CUDA, choose, cuda_attempts, with_tensor_cores
from reparam.service.runtime.graphs import BoundGraph
from reparam.service.runtime.sampler import bind_sampler
from reparam.service.settings import Settings

MOST = 50
DEMOS = sorted(Path("artifacts").glob("*/*/model.onnx"))
DEVICE = choose(Settings())  # with REPARAM_DEVICE=cuda the tests fail without a GPU
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
def test_rows_equal_those_of_a_plain_run_for_sizes_around_powers_of_two(path: Path, apart: bool) -> None:
    """On the CPU bit for bit. A GPU may round otherwise, but rows do not depend on other rows of the run."""
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
def test_checked_outputs_are_finite_in_exactly_the_finite_rows(apart: bool) -> None:
    graph = bound(DEMOS[0], apart)
    graph.arrays["mu"][1] = 3e38  # the network overflows
    graph.arrays["mu"][2] = np.nan
    outputs = graph.run(4)
    latents, images = (np.isfinite(outputs[name].reshape(4, -1)).all(1).tolist() for name in graph.checked)
    assert latents == [True, True, False, True]
    assert images == [True, False, False, True]


def test_the_size_of_a_run_apart_is_a_power_of_two_or_the_maximum() -> None:
    apart = bound(DEMOS[0], apart=True)
    assert [apart.size(n) for n in (1, 2, 3, 31, 32, 33, MOST)] == [1, 2, 4, 32, 32, MOST, MOST]
    assert [bind_sampler(load(DEMOS[0]), MOST).size(n) for n in (1, 3, MOST)] == [1, 3, MOST]


def test_cuda_graphs_are_tried_first_unless_a_setting_turns_them_off() -> None:
    exact = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    plain, captured = ((CUDA, exact), CPU), ((CUDA, exact | {"enable_cuda_graph": "1"}), CPU)
    assert cuda_attempts(Settings(cuda_graphs=True, tf32=False)) == (captured, plain)
    assert cuda_attempts(Settings(cuda_graphs=False, tf32=False)) == (plain,)
    assert cuda_attempts(Settings(cuda_graphs=False, tf32=True)) == (((CUDA, exact | {"use_tf32": "1"}), CPU),)


def test_float16_uses_tensor_cores_with_and_without_tf32() -> None:
    assert with_tensor_cores(((CUDA, {"use_tf32": "0", "a": "b"}), CPU)) == ((CUDA, {"use_tf32": "1", "a": "b"}), CPU)


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.parts[1])
def test_equal_batches_have_equal_rows_bit_for_bit(path: Path) -> None:
    """Some algorithms of the libraries add numbers up in any order."""
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


def test_graphs_with_large_rows_have_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
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
