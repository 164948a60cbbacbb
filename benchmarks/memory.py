"""Memory of the service during a large streamed response, and equality with the parts of the response:
python -m benchmarks memory
"""

import subprocess
import time
from dataclasses import replace

from benchmarks.latency import ask
from benchmarks.options import Options
from benchmarks.processes import below, resident_bytes
from benchmarks.report import Report
from benchmarks.servers import PIXELS, Running, serving
from benchmarks.stream import reader, seen

ROWS = 10_000_000
SLOW = 1_000_000  # bytes per second
WATCHED = 6  # measured points with the slow reader
PARTS = 10
MB = 1e6


def measure(options: Options) -> Report:
    """A reader at full speed, a reader at 1 MB/s, then the parts of the response by `start`; Reparam only."""
    rows = options.rows or ROWS
    parts, watched = min(PARTS, rows), WATCHED * options.seconds
    part = rows // parts
    with serving("reparam") as running:
        ask(running, 1)
        idle = resident_bytes(below(running.process.pid))
        fast = reader(running, rows, part=part * PIXELS)
        fast_peak = _peak(running, fast, float("inf"))
        whole = seen(fast)
        slow = reader(running, rows, SLOW)
        slow_peak = _peak(running, slow, watched)
        slow.kill()
        slow.wait()
        apart = [
            seen(reader(_from(running, number * part), part, part=part * PIXELS))["digests"][0]
            for number in range(parts)
        ]
    if whole["digests"][:parts] != apart:
        raise RuntimeError(f"{rows} rows at once differ from {parts} parts: {whole['digests']}, {apart}")
    seconds = whole["seconds"]
    peaks = {"fast reader": fast_peak, "slow reader": slow_peak}
    return Report(
        title=f"Memory of Reparam while it streams {rows} rows, {rows * 784 / 1e9:.2f} GB",
        columns=["", "resident MB", "above idle MB"],
        rows=[
            ["idle", f"{idle / MB:.1f}", ""],
            *([name, f"{peak / MB:.1f}", f"{(peak - idle) / MB:.1f}"] for name, peak in peaks.items()),
        ],
        results={"rows": rows, "idle_bytes": idle, "peak_bytes": peaks, "fast_reader_seconds": seconds},
        notes=(
            f"The fast reader took {seconds:.1f} s, {rows / seconds:.0f} rows/s; the slow reader took 1 MB/s for "
            f"{watched} s. Resident memory was sampled 50 times a second.",
            f"The response equals {parts} requests for a part each (SHA-256 of each part, taken while reading).",
        ),
    )


def _from(running: Running, start: int) -> Running:
    """The server with requests for rows from `start` on."""
    body = running.server.body.replace("}", f',"start":{start}}}')
    return replace(running, server=replace(running.server, body=body))


def _peak(running: Running, process: subprocess.Popen[str], seconds: float) -> int:
    """Largest resident memory of the server in bytes, until the reader ends or `seconds` have passed."""
    end, peak = time.monotonic() + seconds, 0
    while process.poll() is None and time.monotonic() < end:
        peak = max(peak, resident_bytes(below(running.process.pid)))
        time.sleep(0.02)
    return peak
