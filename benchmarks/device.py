"""Decoders on the device the service would choose, compared with torch there: python -m benchmarks device"""

import json
import subprocess
import sys

from benchmarks.options import Options
from benchmarks.report import Report, ratio

WAYS = ("reparam", "onnxruntime", "torch", "torch.compile")


def measure(options: Options) -> Report:
    """Rows per second from inputs to pixels, both in the memory of the host. Runs in a separate process."""
    command = [sys.executable, "-m", "benchmarks.peers.device", str(options.seconds), str(options.rounds)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    return Report(
        title=f"Decoders on {found['name']}: rows per second",
        columns=["", *WAYS, *(f"/ {way}" for way in WAYS[1:])],
        rows=[
            [
                case,
                *(f"{seen[way]:.0f}" if way in seen else "" for way in WAYS),
                *(ratio(seen[WAYS[0]], seen[way]) if way in seen else "" for way in WAYS[1:]),
            ]
            for case, seen in found["rows_per_second"].items()
        ],
        results=found,
        notes=[
            "From noise and parameters in the host's memory to latents and pixels there; random weights. "
            "reparam: bound buffers, on a GPU a CUDA graph for each size; onnxruntime: the same file, run with arrays; "
            "torch.compile: on a GPU also with CUDA graphs, in some cases only, because compilation is slow. At most "
            "the rows of one batch of the service",
            *([] if found["device"] == "cuda" else ["Not measured on a CPU: a decoder of AutoencoderKL's size"]),
        ],
        faults=[f"Not timed, for pixels differ: {case}: {how}" for case, how in found["differing_pixels"].items()],
    )
