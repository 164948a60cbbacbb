"""onnxruntime without a server, in a process of its own."""

import json
import os
import subprocess
import sys

from benchmarks.servers import ROOT, model_path


def alone(rows: int, threads: int, seconds: float) -> dict[str, float]:
    """Run the model repeatedly on `rows` rows.

    threads: of onnxruntime.
    seconds: duration.

    Returns: rows_per_second, and p50, the median time of a run in seconds.
    """
    command = [sys.executable, "-m", "benchmarks.peers.alone", str(rows), str(threads), str(seconds)]
    environment = {**os.environ, "MODEL": str(model_path())}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout
    seen: dict[str, float] = json.loads(output)
    return seen
