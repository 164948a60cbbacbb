"""Bindings of a session to buffers: in place, or to memory of the device."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import onnxruntime as ort

from reparam.service.artifact.contract import Arrays
from reparam.service.artifact.file import open_session
from reparam.service.runtime.devices import CUDA

Values = dict[str, ort.OrtValue]
# A function that runs the graph and fills the outputs, and the outputs by name, (rows, ...).
Bound = tuple[Callable[[], None], Arrays]


def bind_in_place(session: ort.InferenceSession, inputs: Arrays, outputs: Arrays, rows: int) -> Bound:
    """Bind the first rows of the buffers to the session.

    inputs, outputs: buffers by name, (max_rows, ...).
    rows: number of rows in each run.

    Returns: the function that runs these rows, and the outputs by name, (rows, ...).
    """
    output_rows = {name: array[:rows] for name, array in outputs.items()}
    input_values, output_values = (
        {name: ort.OrtValue.ortvalue_from_numpy(array[:rows]) for name, array in arrays.items()}
        for arrays in (inputs, outputs)
    )
    _, run_graph = _bind(session, input_values, output_values, rows)
    return run_graph, output_rows


def bind_apart(session: ort.InferenceSession, inputs: Arrays, outputs: Arrays, rows: int, summed: str) -> Bound:
    """Bind memory of the device to the session.

    The summed output stays on the device, and only its sums are copied back. The uint8 pixels carry the same images in
    a quarter of the bytes.

    inputs, outputs: buffers by name, (max_rows, ...). Only dtype and row shape of the outputs are used.
    rows: number of rows in each run.
    summed: name of an output, float32 (n, C, H, W).

    Returns: the function that copies inputs to the device, runs the graph and copies outputs back; and the outputs by
        name, (rows, ...), with `sums`, float32 (rows,), in place of the summed output.
    """
    device = "cuda" if session.get_providers()[0] == CUDA else "cpu"

    def buffers(arrays: Arrays) -> Values:
        return {
            name: ort.OrtValue.ortvalue_from_shape_and_type((rows, *array.shape[1:]), array.dtype, device, 0)
            for name, array in arrays.items()
        }

    host = {name: array[:rows] for name, array in inputs.items()}
    input_values, output_values = buffers(inputs), buffers(outputs)
    sums = buffers({"sums": np.zeros(rows, np.float32)})
    binding, run_graph = _bind(session, input_values, output_values, rows)
    _, run_sums = _bind(_sums_session_of(session), {"images": output_values.pop(summed)}, sums, rows)
    output_values |= sums

    copies: Arrays = {}

    def run() -> None:
        for name, value in input_values.items():
            value.update_inplace(host[name])
            binding.bind_ortvalue_input(name, value)  # if a part of the graph runs on the CPU, copies its inputs
        run_graph()
        run_sums()
        copies.update({name: value.numpy() for name, value in output_values.items()})

    return run, copies


def check_device(session: ort.InferenceSession) -> None:
    """Check that the device of a session still computes.

    Raises: an error of onnxruntime if the GPU has become unusable for this process.
    """
    _sums_session_of(session).run(None, {"images": np.zeros((1, 1, 1, 1), np.float32)})


def _bind(
    session: ort.InferenceSession, inputs: Values, outputs: Values, rows: int
) -> tuple[ort.IOBinding, Callable[[], None]]:
    """Bind inputs and outputs to the session.

    rows: number of rows; onnxruntime keeps a CUDA graph for each number.

    Returns: the binding, and the function that runs the session with the binding.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(rows))
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return binding, partial(session.run_with_iobinding, binding, options)


def _sums_session_of(session: ort.InferenceSession) -> ort.InferenceSession:
    return _sums_session(tuple(session.get_providers()))


@cache
def _sums_session(providers: tuple[str, ...]) -> ort.InferenceSession:
    """Open the session that sums images. All graphs share the session, because each session takes GPU memory."""
    return open_session(_SUMS, providers)


# A small ONNX model: sums = ReduceSum(images) over C, H and W, float32 (n, C, H, W) -> (n,).
_SUMS = bytes.fromhex(
    "08083a6c0a3b0a06696d61676573120473756d73220952656475636553756d2a0f0a0461786573400140024003a001072a0f0a086b656570"
    "64696d731800a001021201735a180a06696d61676573120e0a0c080112080a000a000a000a0062100a0473756d7312080a06080112020a00"
    "42040a00100b"
)
