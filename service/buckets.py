"""The graph's inputs and outputs, in memory that stays, bound to its session once for each batch size."""

import time
from math import prod

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service import noise
from service.artifact import Artifact
from service.contract import Arrays
from service.devices import CUDA

# Of the inputs and outputs of one model: on a GPU what it may take of the memory, on a CPU of its caches.
MOST_BYTES_ON_GPU, MOST_BYTES = 2**28, 2**22
TIMED = 5  # runs of a size that seems to take too long
_TYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class Buckets:
    """Runs a sampler on 1 .. max_rows rows; for one thread. Of a model with large rows these are fewer than asked for.

    powers: run as many rows as the next power of two instead of exactly those asked for. On a GPU, where rows that are
    not needed cost little, few sizes mean few CUDA graphs; on a CPU every row costs its time.

    inputs: by name, float32 (max_rows, ...); whoever runs the graph writes here first.
    """

    def __init__(self, artifact: Artifact, max_rows: int, powers: bool | None = None) -> None:
        contract = artifact.contract
        shapes = [*contract.inputs().values(), *(shape for _, shape in contract.outputs().values())]
        self.artifact = artifact
        self.on_gpu = artifact.provider == CUDA
        fitting = (MOST_BYTES_ON_GPU if self.on_gpu else MOST_BYTES) // sum(4 * prod(shape) for shape in shapes)
        # A power of two, as requests often ask for: then those that fill a batch fill it whole.
        self.max_rows = max_rows = min(max_rows, 1 << max(0, fitting.bit_length() - 1))
        self.powers = self.on_gpu if powers is None else powers
        self.prior = contract.prior_arrays()
        self.weights, components = contract.mixture_arrays()
        # Last of all the standard prior, component -1.
        self.components = {name: np.concatenate([components[name], array[None]]) for name, array in self.prior.items()}
        self.source = noise.Source()
        self.noise = contract.traits.noise
        self.blocks = noise.blocks_of(contract.elements)
        self.inputs: Arrays = {
            name: np.zeros((max_rows, *shape), np.float32) for name, shape in contract.inputs().items()
        }
        self._outputs: Arrays = {
            name: np.zeros((max_rows, *shape), _TYPES[type_]) for name, (type_, shape) in contract.outputs().items()
        }
        self._with_prior = 0  # rows of the inputs whose parameters are the prior's
        self._bound: dict[int, _Bound] = {}

    def run(self, n: int) -> Arrays:
        """Run the graph on the first n rows of the inputs.

        Returns its outputs, (n, ...) each, which the next run overwrites. Raises what onnxruntime raises.
        """
        size = self.size(n)
        bound = self._bound.get(size)
        if bound is None:
            bound = self._bound[size] = _Bound(self.artifact, self.inputs, self._outputs, size, self.on_gpu)
        outputs = bound.run()
        return outputs if size == n else {name: array[:n] for name, array in outputs.items()}

    def fill_prior(self, n: int) -> None:
        """Let the first n rows of the inputs hold the parameters of the prior; most do, from the batch before."""
        if n > self._with_prior:
            for name, array in self.prior.items():
                self.inputs[name][self._with_prior : n] = array
            self._with_prior = n

    def spoil_prior(self, first: int) -> None:
        """Rows from this one on will hold other parameters."""
        self._with_prior = min(self._with_prior, first)

    def fill_components(self, components: noise.Int64) -> None:
        """Let the first rows of the inputs hold the parameters of these components, -1 for those of the standard
        prior."""
        for name, table in self.components.items():
            np.take(table, components, 0, out=self.inputs[name][: len(components)], mode="wrap")

    def size(self, n: int) -> int:
        """Rows that are run when n are asked for."""
        return min(1 << (n - 1).bit_length(), self.max_rows) if self.powers else n

    def warm_up(self, seconds: float) -> int:
        """Run the powers of two, and with them every bucket there is, so that no request waits for memory or for a CUDA
        graph to be captured.

        Returns the first that takes `seconds`, or all rows if none does; larger ones are not run. Other
        programs can only make a run longer, so the shortest of a few counts.
        """
        self.fill_prior(self.max_rows)
        rows = 1
        while True:
            self.run(rows)
            self.run(rows)  # onnxruntime captures a CUDA graph in the second run of a size
            if rows == self.max_rows or not any(self._seconds(rows) <= seconds for _ in range(TIMED)):
                return rows
            rows = min(2 * rows, self.max_rows)

    def _seconds(self, rows: int) -> float:
        started = time.perf_counter()
        self.run(rows)
        return time.perf_counter() - started


class _Bound:
    """One batch size. On the CPU the graph uses the given arrays themselves, on a GPU buffers of its own."""

    def __init__(self, artifact: Artifact, inputs: Arrays, outputs: Arrays, rows: int, on_gpu: bool) -> None:
        self._session = artifact.session
        self._on_gpu = on_gpu
        self._host = {name: array[:rows] for name, array in (inputs | outputs).items()}
        self._inputs = {name: _value(self._host[name], on_gpu) for name in inputs}
        self._outputs = {name: _value(self._host[name], on_gpu) for name in outputs}
        self._arrays = {name: self._host[name] for name in outputs}
        self._binding = self._session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(rows))

    def run(self) -> Arrays:
        if self._on_gpu:
            for name, value in self._inputs.items():
                value.update_inplace(self._host[name])
        self._session.run_with_iobinding(self._binding, self._options)
        if self._on_gpu:
            return {name: value.numpy() for name, value in self._outputs.items()}
        return self._arrays


def _value(array: npt.NDArray[np.generic], on_gpu: bool) -> ort.OrtValue:
    if on_gpu:
        return ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, "cuda", 0)
    return ort.OrtValue.ortvalue_from_numpy(array)  # the array's own memory
