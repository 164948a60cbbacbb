"""The graph's inputs and outputs, in memory that stays, bound to its session once for each batch size."""

import time
from collections.abc import Callable
from functools import cache, partial
from math import prod

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from reparam.service.artifact import noise
from reparam.service.artifact.contract import Arrays
from reparam.service.artifact.file import Artifact, open_session
from reparam.service.runtime.devices import CUDA

# Of the inputs and outputs of one model: on a GPU what it may take of the memory, on a CPU of its caches.
MOST_BYTES_ON_GPU, MOST_BYTES = 2**28, 2**22
TIMED = 5  # runs of a size that seems to take too long
_TYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}

Values = dict[str, ort.OrtValue]


class Buckets:
    """Runs a sampler on 1 .. max_rows rows; for one thread. Of a model with large rows these are fewer than asked for.

    apart: the graph's memory is another than `inputs`, as on a GPU, and as many rows run as the next power of two, not
    exactly those asked for: there rows that are not needed cost little, and few sizes mean few CUDA graphs. On a CPU
    every row costs its time. By default as the artifact's provider has it.

    inputs: by name, float32 (max_rows, ...); whoever runs the graph writes here first.
    checked: the outputs of `run` that are looked at for NaN and infinity: rows in which they are finite, are.
    """

    def __init__(self, artifact: Artifact, max_rows: int, apart: bool | None = None) -> None:
        contract = artifact.contract
        shapes = [*contract.inputs().values(), *(shape for _, shape in contract.outputs().values())]
        self.artifact = artifact
        on_gpu = artifact.provider == CUDA
        fitting = (MOST_BYTES_ON_GPU if on_gpu else MOST_BYTES) // sum(4 * prod(shape) for shape in shapes)
        # A power of two, as requests often ask for: then those that fill a batch fill it whole.
        self.max_rows = max_rows = min(max_rows, 1 << max(0, fitting.bit_length() - 1))
        self.apart = on_gpu if apart is None else apart
        self.checked = (contract.traits.latents, "sums" if self.apart else "images")
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
        self._bound: dict[int, Callable[[], Arrays]] = {}
        self._sums = _sums_session(tuple(artifact.session.get_providers())) if self.apart else None

    def run(self, n: int) -> Arrays:
        """Run the graph on the first n rows of the inputs.

        Returns its outputs, (n, ...) each, which the next run overwrites; if apart, the sums of the images, (n,), in
        their place. Raises what onnxruntime raises.
        """
        size = self.size(n)
        run = self._bound.get(size)
        if run is None:
            bind = self._in_place if self._sums is None else self._apart
            run = self._bound[size] = bind(size)
        outputs = run()
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
        return min(1 << (n - 1).bit_length(), self.max_rows) if self.apart else n

    def warm_up(self, seconds: float) -> int:
        """Run the powers of two, and with them every bucket there is, so that no request waits for memory or for a CUDA
        graph to be captured.

        Returns the first that takes `seconds`, or all rows if none does; larger ones are not run. Or the last that the
        device has memory for. Other programs can only make a run longer, so the shortest of a few counts.
        """
        self.fill_prior(self.max_rows)
        rows, fitting = 1, 0
        while True:
            try:
                self.run(rows)  # which onnxruntime repeats until it has captured a CUDA graph
                slow = not any(self._seconds(rows) <= seconds for _ in range(TIMED))
            except Exception as error:  # onnxruntime's errors have no common base but this
                if fitting and is_out_of_memory(error):
                    return fitting
                raise
            if slow or rows == self.max_rows:
                return rows
            rows, fitting = min(2 * rows, self.max_rows), rows

    def check_device(self) -> None:
        """Raises what onnxruntime raises if a GPU computes nothing any more, as after an error that only a new process
        gets over."""
        if self._sums is not None:
            self._sums.run(None, {"images": np.zeros((1, 1, 1, 1), np.float32)})

    def _in_place(self, rows: int) -> Callable[[], Arrays]:
        """Runs of so many rows, the first of `inputs` and `_outputs`."""
        outputs = {name: array[:rows] for name, array in self._outputs.items()}
        given, taken = (
            {name: ort.OrtValue.ortvalue_from_numpy(array[:rows]) for name, array in arrays.items()}
            for arrays in (self.inputs, self._outputs)
        )
        _, run_graph = _bind(self.artifact.session, given, taken, rows)

        def run() -> Arrays:
            run_graph()
            return outputs

        return run

    def _apart(self, rows: int) -> Callable[[], Arrays]:
        """Runs of so many rows in the device's memory. Only what a request can ask for comes back, and of the images,
        float32, the sum of each: pixels are a quarter of their bytes."""
        device = "cuda" if self.artifact.provider == CUDA else "cpu"

        def buffers(arrays: Arrays) -> Values:
            return {
                name: ort.OrtValue.ortvalue_from_shape_and_type((rows, *array.shape[1:]), array.dtype, device, 0)
                for name, array in arrays.items()
            }

        host = {name: array[:rows] for name, array in self.inputs.items()}
        inputs, outputs = buffers(self.inputs), buffers(self._outputs)
        sums = buffers({"sums": np.zeros(rows, np.float32)})
        binding, run_graph = _bind(self.artifact.session, inputs, outputs, rows)
        _, run_sums = _bind(self._sums, {"images": outputs.pop("images")}, sums, rows)
        outputs |= sums

        def run() -> Arrays:
            for name, value in inputs.items():
                value.update_inplace(host[name])
                binding.bind_ortvalue_input(name, value)  # copies what a part of the graph on the CPU reads
            run_graph()
            run_sums()
            return {name: value.numpy() for name, value in outputs.items()}

        return run

    def _seconds(self, rows: int) -> float:
        started = time.perf_counter()
        self.run(rows)
        return time.perf_counter() - started


def _bind(
    session: ort.InferenceSession, inputs: Values, outputs: Values, rows: int
) -> tuple[ort.IOBinding, Callable[[], None]]:
    """Bind these to the session. Returns the binding, and what runs it."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(rows))
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return binding, partial(session.run_with_iobinding, binding, options)


def is_out_of_memory(error: Exception) -> bool:
    """onnxruntime has no type for it. Its arenas say `Failed to allocate memory`, CUDA `out of memory`, its libraries
    `ALLOC_FAILED` and `ALLOCATION_FAILED`, the CPU `bad_alloc`."""
    signs = (
        "Failed to allocate memory",
        "out of memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
        "bad_alloc",
        "bad allocation",
    )
    return any(sign in str(error) for sign in signs)


@cache
def _sums_session(providers: tuple[str, ...]) -> ort.InferenceSession:
    """One for all models: on a GPU each takes memory."""
    return open_session(_SUMS, providers)


# A small ONNX model: sums = ReduceSum(images) over C, H and W, float32 (n, C, H, W) -> (n,).
_SUMS = bytes.fromhex(
    "08083a6c0a3b0a06696d61676573120473756d73220952656475636553756d2a0f0a0461786573400140024003a001072a0f0a086b656570"
    "64696d731800a001021201735a180a06696d61676573120e0a0c080112080a000a000a000a0062100a0473756d7312080a06080112020a00"
    "42040a00100b"
)
