"""Graphs in memory: inputs and outputs that stay, bound to a session once for each batch size, and batches computed."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from reparam.service.artifact.contract import Arrays
from reparam.service.artifact.file import open_session
from reparam.service.artifact.outputs import Output, Shape
from reparam.service.errors import ModelFailed, Problem
from reparam.service.runtime.devices import CUDA

log = logging.getLogger(__name__)

# Limits on the inputs and outputs of one graph: on a GPU its share of the memory, on a CPU of the caches.
MAX_BYTES_ON_GPU, MAX_BYTES = 2**28, 2**22
TIMED_RUNS = 5  # runs of a batch size that seems too slow; the fastest counts
_TYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
# What onnxruntime's arenas, CUDA, its libraries and the CPU say; onnxruntime has no exception type of its own for it.
_OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "bad_alloc",
    "bad allocation",
)

Values = dict[str, ort.OrtValue]


class Work(Protocol):
    """Rows of one graph: what the engine runs and the encoders write.

    graph: computes the rows.
    n: number of rows.
    outputs: arrays to return of each row.
    """

    @property
    def graph(self) -> "Graph": ...
    @property
    def n(self) -> int: ...
    @property
    def outputs(self) -> tuple[Output, ...]: ...

    def fill(self, inputs: Any, lo: int, hi: int, at: int) -> None:
        """Write rows lo .. hi - 1 into the graph's inputs, from row `at` on."""

    def facts(self) -> dict[str, Any]:
        """Collect what a response says of the rows, by name in the table of facts."""

    def describe(self, lo: int, hi: int) -> str:
        """Name rows lo .. hi - 1 for a message."""

    def log_fields(self, lo: int, hi: int) -> dict[str, Any]:
        """Name rows lo .. hi - 1 for a log line."""

    def with_defaults(self) -> "Work":
        """Return the same rows without the client's values."""

    def overflow(self) -> Problem:
        """Return the problem of rows that are finite with defaults and not with the client's values."""


Share = tuple[Work, int, int]  # rows lo .. hi - 1 of a work


class Inputs(Protocol):
    """The inputs of a graph, which works fill.

    arrays: by input name, float32 (max_rows, ...)
    """

    arrays: Arrays

    def finish(self, n: int) -> None:
        """Compute what remains for the first n rows, once all works are filled in."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph of one model version with one shape of rows; the engine batches rows of one graph.

    model, version: for logs and metrics.
    replicas: the graph in memory, once for each runner.
    row_shapes: shape of a row of each output that a request can ask for.
    batch_rows: rows of one batch, at most.
    steady: on the CPU, and the time of a run depends on the number of rows alone.
    """

    model: str
    version: int
    replicas: tuple["BoundGraph", ...]
    row_shapes: Mapping[str, Shape]
    batch_rows: int
    steady: bool

    @cached_property
    def labels(self) -> tuple[str, str]:
        """Model and version, as metrics are labelled."""
        return self.model, str(self.version)


class BoundGraph:
    """A graph that runs on 1 .. max_rows rows. Used by one thread at a time.

    session: of onnxruntime.
    inputs: make the inputs' arrays, (max_rows, ...) each, and fill them.
    outputs: type and row shape of each output.
    checked: outputs that hold NaN or infinity in every row that is not finite.
    summed: output, float32 (n, C, H, W), of which only the sum of each row leaves a GPU.
    max_rows: fewer if rows are large; a power of two then, because requests often ask for one.
    apart: inputs and outputs have memory of their own on the device, and the next power of two of rows runs, because
        few sizes mean few CUDA graphs. Otherwise the graph works in place on exactly the rows asked for. Default: what
        suits the session's provider.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        input_shapes: Mapping[str, Shape],
        outputs: Mapping[str, tuple[str, Shape]],
        inputs: Callable[[Arrays], Inputs],
        *,
        checked: Sequence[str],
        summed: str,
        max_rows: int,
        apart: bool | None = None,
    ) -> None:
        self.session = session
        on_gpu = session.get_providers()[0] == CUDA
        self.apart = on_gpu if apart is None else apart
        shapes = [*input_shapes.values(), *(shape for _, shape in outputs.values())]
        fitting = (MAX_BYTES_ON_GPU if on_gpu else MAX_BYTES) // sum(4 * prod(shape) for shape in shapes)
        self.max_rows = max_rows = min(max_rows, 1 << max(0, fitting.bit_length() - 1))
        self.checked = tuple("sums" if self.apart and name == summed else name for name in checked)
        self.arrays: Arrays = {name: np.zeros((max_rows, *shape), np.float32) for name, shape in input_shapes.items()}
        self.inputs = inputs(self.arrays)
        self._outputs: Arrays = {
            name: np.zeros((max_rows, *shape), _TYPES[type_]) for name, (type_, shape) in outputs.items()
        }
        self._summed = summed
        self._device = "cuda" if on_gpu else "cpu"
        self._runs: dict[int, Callable[[], Arrays]] = {}  # by batch size
        self._sums = _sums_session(tuple(session.get_providers())) if self.apart else None

    def compute(self, shares: Sequence[Share]) -> list[Arrays | Problem]:
        """Compute a batch of at most max_rows rows.

        Returns: for each share the outputs it asked for, by name, or its problem

        Raises: whatever onnxruntime raises
        """
        outputs = self._run_shares(shares)
        finite = self._is_finite(outputs)
        selected: Arrays = {}
        results: list[Arrays | Problem] = []
        failed: list[int] = []
        end = 0
        for index, (work, lo, hi) in enumerate(shares):
            begin, end = end, end + hi - lo
            result: Arrays = {}
            results.append(result)
            if not finite and not self._is_finite(outputs, slice(begin, end)):
                failed.append(index)
                continue
            for output in work.outputs:
                array = selected.get(output.name)
                if array is None:
                    array = selected[output.name] = output.read(outputs[output.source])
                result[output.name] = array[begin:end]
        if failed:  # only now, because another run overwrites the outputs
            problems = self._blame([shares[index] for index in failed])
            for index, problem in zip(failed, problems, strict=True):
                results[index] = problem
        return results

    def run(self, n: int) -> Arrays:
        """Run the graph on the first n rows of the inputs.

        Returns: outputs by name, (n, ...), which the next run overwrites; if apart, `sums`, float32 (n,), in place of
        the summed output

        Raises: whatever onnxruntime raises
        """
        size = self.size(n) if self.apart else n
        run = self._runs.get(size)
        if run is None:
            run = self._runs[size] = self._apart(size) if self.apart else self._in_place(size)
        outputs = run()
        return outputs if size == n else {name: array[:n] for name, array in outputs.items()}

    def size(self, n: int) -> int:
        """Return the number of rows that run when n are asked for."""
        return min(1 << (n - 1).bit_length(), self.max_rows) if self.apart else n

    def warm_up(self, seconds: float) -> int:
        """Run every power of two of rows, so that no request waits for memory or for the capture of a CUDA graph.

        seconds: of one batch, at most; larger batches are not run. Other programs only make a run slower, so the
            fastest of a few counts.

        Returns: the first size that takes longer, or the largest that the device has memory for, or max_rows
        """
        self.inputs.finish(self.max_rows)
        rows, fitting = 1, 0
        while True:
            try:
                self.run(rows)  # onnxruntime repeats the first run until a CUDA graph is captured
                slow = not any(self._seconds(rows) <= seconds for _ in range(TIMED_RUNS))
            except Exception as error:  # onnxruntime's errors have no narrower common base
                if fitting and is_out_of_memory(error):
                    return fitting
                raise
            if slow or rows == self.max_rows:
                return rows
            rows, fitting = min(2 * rows, self.max_rows), rows

    def check_device(self) -> None:
        """Raise what onnxruntime raises on a GPU that only a new process can use again."""
        if self._sums is not None:
            self._sums.run(None, {"images": np.zeros((1, 1, 1, 1), np.float32)})

    def _run_shares(self, shares: Sequence[Share]) -> Arrays:
        inputs = self.inputs
        at = 0
        for work, lo, hi in shares:
            work.fill(inputs, lo, hi, at)
            at += hi - lo
        inputs.finish(at)
        return self.run(at)

    def _is_finite(self, outputs: Arrays, rows: slice = slice(None)) -> bool:
        return all(np.isfinite(outputs[name][rows]).all() for name in self.checked)

    def _blame(self, shares: Sequence[Share]) -> list[Problem]:
        """Find out why rows are not finite: the client's values, if the same rows are finite with defaults."""
        outputs = self._run_shares([(work.with_defaults(), lo, hi) for work, lo, hi in shares])
        problems: list[Problem] = []
        end = 0
        for work, lo, hi in shares:
            begin, end = end, end + hi - lo
            if self._is_finite(outputs, slice(begin, end)):
                problems.append(work.overflow())
                continue
            log.error("NaN or infinity", extra=work.log_fields(lo, hi))
            problems.append(
                ModelFailed(
                    f"{work.describe(lo, hi)} are NaN or infinity, also at the default temperature and without "
                    "parameters: ask for other rows, and tell whoever trained the model"
                )
            )
        return problems

    def _in_place(self, rows: int) -> Callable[[], Arrays]:
        """Bind the first rows of the inputs' and outputs' arrays. Returns the function that runs them."""
        outputs = {name: array[:rows] for name, array in self._outputs.items()}
        input_values, output_values = (
            {name: ort.OrtValue.ortvalue_from_numpy(array[:rows]) for name, array in arrays.items()}
            for arrays in (self.arrays, self._outputs)
        )
        _, run_graph = _bind(self.session, input_values, output_values, rows)

        def run() -> Arrays:
            run_graph()
            return outputs

        return run

    def _apart(self, rows: int) -> Callable[[], Arrays]:
        """Bind memory of the device. Returns the function that copies inputs there, runs, and copies outputs back.

        Of the summed output only sums come back: the pixels have a quarter of its bytes.
        """

        def buffers(arrays: Arrays) -> Values:
            return {
                name: ort.OrtValue.ortvalue_from_shape_and_type((rows, *array.shape[1:]), array.dtype, self._device, 0)
                for name, array in arrays.items()
            }

        host = {name: array[:rows] for name, array in self.arrays.items()}
        inputs, outputs = buffers(self.arrays), buffers(self._outputs)
        sums = buffers({"sums": np.zeros(rows, np.float32)})
        binding, run_graph = _bind(self.session, inputs, outputs, rows)
        _, run_sums = _bind(self._sums, {"images": outputs.pop(self._summed)}, sums, rows)
        outputs |= sums

        def run() -> Arrays:
            for name, value in inputs.items():
                value.update_inplace(host[name])
                binding.bind_ortvalue_input(name, value)  # copies inputs of a part of the graph that runs on the CPU
            run_graph()
            run_sums()
            return {name: value.numpy() for name, value in outputs.items()}

        return run

    def _seconds(self, rows: int) -> float:
        started = time.perf_counter()
        self.run(rows)
        return time.perf_counter() - started


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the device had no memory for a run."""
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _bind(
    session: ort.InferenceSession, inputs: Values, outputs: Values, rows: int
) -> tuple[ort.IOBinding, Callable[[], None]]:
    """Bind inputs and outputs to the session. Returns the binding, and the function that runs the session on it."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(rows))
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return binding, partial(session.run_with_iobinding, binding, options)


@cache
def _sums_session(providers: tuple[str, ...]) -> ort.InferenceSession:
    """Open the session that sums images. All graphs share one, because each takes memory on a GPU."""
    return open_session(_SUMS, providers)


# A small ONNX model: sums = ReduceSum(images) over C, H and W, float32 (n, C, H, W) -> (n,).
_SUMS = bytes.fromhex(
    "08083a6c0a3b0a06696d61676573120473756d73220952656475636553756d2a0f0a0461786573400140024003a001072a0f0a086b656570"
    "64696d731800a001021201735a180a06696d61676573120e0a0c080112080a000a000a000a0062100a0473756d7312080a06080112020a00"
    "42040a00100b"
)
