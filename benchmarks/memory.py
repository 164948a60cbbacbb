"""How much memory one large answer takes while it is streamed, and whether its parts are the same by themselves:
python -m benchmarks memory"""

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
WATCHED = 6  # points that the slow reader is watched for
PARTS = 10
MB = 1e6


def measure(options: Options) -> Report:
    """A reader as fast as it can be, then one that takes 1 MB/s of the same answer for a while, then the parts of it by
    their `start`; of Reparam only."""
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
        raise RuntimeError(f"{rows} rows at once are others than in {parts} parts: {whole['digests']}, {apart}")
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
            f"The fast reader took {seconds:.1f} s, {rows / seconds:.0f} rows/s; the slow one takes 1 MB/s and was "
            f"watched for {watched} s. Resident memory was sampled 50 times a second.",
            f"The answer equals {parts} requests for a part each (SHA-256 of each part, taken while it is read).",
        ),
    )


def _from(running: Running, start: int) -> Running:
    """Asked for rows from this one on."""
    body = running.server.body.replace("}", f',"start":{start}}}')
    return replace(running, server=replace(running.server, body=body))


def _peak(running: Running, process: subprocess.Popen[str], seconds: float) -> int:
    """The most memory the server held until the reader ended, or for so long."""
    end, peak = time.monotonic() + seconds, 0
    while process.poll() is None and time.monotonic() < end:
        peak = max(peak, resident_bytes(below(running.process.pid)))
        time.sleep(0.02)
    return peak
