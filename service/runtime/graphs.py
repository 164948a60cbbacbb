"""Graphs in memory: permanent input and output buffers, bound to a session once for each batch size."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from reparam.service.artifact.contract import Arrays
from reparam.service.artifact.outputs import Output, Shape
from reparam.service.errors import ModelFailed, Problem
from reparam.service.runtime.binding import Bound, bind_apart, bind_in_place, check_device
from reparam.service.runtime.devices import CUDA

log = logging.getLogger(__name__)

# Limits in bytes on the input and output buffers of one graph: 256 MiB on a GPU, and 4 MiB on a CPU, where the
# buffers should stay in the caches. The limits bound the number of rows in a batch.
MAX_BYTES_ON_GPU, MAX_BYTES = 2**28, 2**22
TIMED_RUNS = 5  # number of timed runs; a batch size is too slow if every run exceeds the time limit
_TYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
# Messages of onnxruntime's arenas, CUDA, CUDA's libraries and the CPU. onnxruntime has no exception type for a lack of
# memory.
_OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "bad_alloc",
    "bad allocation",
)


class Work(Protocol):
    """The rows of one request. The engine runs the rows, and the encoders write the results.

    graph: the graph that computes the rows.
    n: number of rows.
    outputs: arrays to return.
    """

    @property
    def graph(self) -> "Graph": ...
    @property
    def n(self) -> int: ...
    @property
    def outputs(self) -> tuple[Output, ...]: ...

    def fill(self, inputs: Any, lo: int, hi: int, at: int) -> None:
        """Write rows lo .. hi - 1 of the work into the graph's inputs, starting at input row `at`.

        inputs: the inputs of one replica, made by the `inputs` of its BoundGraph.
        """

    def facts(self) -> dict[str, Any]:
        """Return the values that describe the rows in a response, by name in the table FACTS."""

    def describe(self, lo: int, hi: int) -> str:
        """Describe rows lo .. hi - 1 for a message."""

    def log_fields(self, lo: int, hi: int) -> dict[str, Any]:
        """Describe rows lo .. hi - 1 as fields of a log line."""

    def with_defaults(self) -> "Work":
        """Return the same rows without the client's values."""

    def overflow(self) -> Problem:
        """Return the problem of rows that are finite with defaults but not with the client's values."""


Share = tuple[Work, int, int]  # rows lo .. hi - 1 of a work


class Inputs(Protocol):
    """The inputs of a graph, filled by works.

    arrays: input arrays by name, float32 (max_rows, ...).
    """

    arrays: Arrays

    def begin(self) -> None:
        """Begin a batch, and forget rows of a batch that has failed."""

    def finish(self, n: int) -> None:
        """Complete the first n rows after all works have written their rows."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph of one model version. The engine batches rows of one graph together.

    model, version: name and version of the model, for logs and metrics.
    replicas: copies of the buffers, one for each runner.
    row_shapes: shape of a row of each output available to requests.
    batch_rows: largest number of rows in a batch.
    steady: the graph runs on the CPU, and the time of a run depends on the number of rows alone.
    """

    model: str
    version: int
    replicas: tuple["BoundGraph", ...]
    row_shapes: Mapping[str, Shape]
    batch_rows: int
    steady: bool

    @cached_property
    def labels(self) -> tuple[str, str]:
        """Model and version, the labels of metrics."""
        return self.model, str(self.version)


class BoundGraph:
    """A session with permanent buffers for 1 .. max_rows rows. Used by one thread at a time.

    session: session of onnxruntime.
    input_shapes: row shape of each input. All inputs are float32.
    outputs: ONNX type and row shape of each output.
    inputs: called with the input arrays, (max_rows, ...) each; returns the Inputs that fill the arrays.
    checked: names of outputs checked for NaN and infinity. If these outputs are finite, so are all outputs of the row.
    summed: name of an output, float32 (n, C, H, W). With `apart`, only the sum of each row is copied from the device.
    max_rows: largest number of rows in a batch. Reduced to a power of two if the buffers would exceed MAX_BYTES, or
        MAX_BYTES_ON_GPU.
    apart: the buffers have a copy on the device. A run then has the next power of two of rows, because few sizes mean
        few CUDA graphs. Otherwise the session reads and writes the buffers in place, with exactly the rows requested.
        Default: True on CUDA.
    arrays: input arrays by name, float32 (max_rows, ...).
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
        self._bound: dict[int, Bound] = {}  # by number of rows

    def compute(self, shares: Sequence[Share]) -> list[Arrays | Problem]:
        """Compute a batch of at most max_rows rows.

        shares: rows of works, each as (work, lo, hi); all works are of this graph.

        Returns: for each share the requested outputs by name, new arrays (hi - lo, ...), or the problem of the share.

        Raises: any error of onnxruntime.
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
        if failed:  # after all results are copied, because `_blame` overwrites the output buffers
            problems = self._blame([shares[index] for index in failed])
            for index, problem in zip(failed, problems, strict=True):
                results[index] = problem
        return results

    def run(self, n: int) -> Arrays:
        """Run the graph on the first n rows of the inputs.

        Returns: outputs by name, (n, ...); the next run overwrites the arrays. With `apart`, `sums`, float32 (n,),
            replaces the summed output.

        Raises: any error of onnxruntime.
        """
        size = self.size(n) if self.apart else n
        bound = self._bound.get(size)
        if bound is None:
            bind = partial(bind_apart, summed=self._summed) if self.apart else bind_in_place
            bound = self._bound[size] = bind(self.session, self.arrays, self._outputs, size)
        run, outputs = bound
        run()
        return outputs if size == n else {name: array[:n] for name, array in outputs.items()}

    def size(self, n: int) -> int:
        """Return the number of rows in a run for n requested rows: with `apart`, the next power of two."""
        return min(1 << (n - 1).bit_length(), self.max_rows) if self.apart else n

    def warm_up(self, seconds: float) -> int:
        """Run every power of two of rows, so that no request waits for memory or for the capture of a CUDA graph.

        Larger sizes are skipped once a size is too slow. A size is too slow if all of TIMED_RUNS runs are too slow. A
        single slow run is no proof, because other programs on the machine can slow down some runs.

        seconds: time limit of one batch.

        Returns: the first size slower than the limit, or the largest size that fits into memory, or max_rows.

        Raises: any error of onnxruntime.
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
        """Check that the GPU still computes.

        Raises: an error of onnxruntime if the GPU has become unusable for this process.
        """
        if self.apart:
            check_device(self.session)

    def _run_shares(self, shares: Sequence[Share]) -> Arrays:
        inputs = self.inputs
        inputs.begin()
        at = 0
        for work, lo, hi in shares:
            work.fill(inputs, lo, hi, at)
            at += hi - lo
        inputs.finish(at)
        return self.run(at)

    def _is_finite(self, outputs: Arrays, rows: slice = slice(None)) -> bool:
        return all(np.isfinite(outputs[name][rows]).all() for name in self.checked)

    def _blame(self, shares: Sequence[Share]) -> list[Problem]:
        """Find out why rows are not finite. If the rows are finite with defaults, the client's values are to blame.

        Returns: the problem of each share.
        """
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

    def _seconds(self, rows: int) -> float:
        started = time.perf_counter()
        self.run(rows)
        return time.perf_counter() - started


def is_out_of_memory(error: Exception) -> bool:
    """Return True if an error of onnxruntime means that the device had no memory for a run."""
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)
