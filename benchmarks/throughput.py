"""Throughput of each server over 64 connections, and of onnxruntime alone: python -m benchmarks throughput"""

from statistics import median

from benchmarks.alone import alone
from benchmarks.load import Load, load
from benchmarks.options import Options
from benchmarks.report import Report, ratio
from benchmarks.servers import serving

CONNECTIONS = 64
ROWS = (1, 64)
WARM_UP = 2  # seconds, before each point
THREADS = (1, 2)


def measure(options: Options) -> Report:
    """Servers take turns in every round, one at a time, so that slow phases of the machine affect all servers."""
    loads: dict[tuple[str, int], list[Load]] = {(name, rows): [] for name in options.only for rows in ROWS}
    runs: dict[int, list[float]] = {threads: [] for threads in THREADS}
    for _ in range(options.rounds):
        for name in options.only:
            with serving(name) as running:
                for rows in ROWS:
                    load(running, rows, CONNECTIONS, WARM_UP)
                    loads[name, rows].append(load(running, rows, CONNECTIONS, options.seconds))
        for threads in THREADS:
            runs[threads].append(alone(64, threads, options.seconds)["rows_per_second"])
    servers = {name: {str(rows): _medians(rows, loads[name, rows]) for rows in ROWS} for name in options.only}
    return _report(servers, {str(threads): median(runs[threads]) for threads in THREADS})


def _medians(rows: int, loads: list[Load]) -> dict[str, float]:
    """Medians over the rounds, and the lowest and highest throughput."""
    speeds = [load.per_second for load in loads]
    return {
        "requests_per_second": median(speeds),
        "rows_per_second": rows * median(speeds),
        "lowest_requests_per_second": min(speeds),
        "highest_requests_per_second": max(speeds),
        "p50_seconds": median(load.p50 for load in loads),
        "p99_seconds": median(load.p99 for load in loads),
        "server_cpu_seconds_per_request": median(load.server_cpu for load in loads),
        "client_cpu_seconds_per_request": median(load.client_cpu for load in loads),
        "other_cores": median(load.other_cores for load in loads),
    }


def _report(servers: dict[str, dict[str, dict[str, float]]], runs: dict[str, float]) -> Report:
    ours = {point: seen["rows_per_second"] for point, seen in servers.get("reparam", {}).items()}
    rows = []
    for name, points in servers.items():
        cells = [name]
        for point, seen in points.items():
            cells += [
                f"{seen['rows_per_second']:.0f}",
                ratio(ours.get(point, 0), seen["rows_per_second"]),
                f"{1e3 * seen['p99_seconds']:.1f}",
                f"{1e6 * seen['server_cpu_seconds_per_request']:.0f}",
                f"{1e6 * seen['client_cpu_seconds_per_request']:.0f}",
            ]
        rows.append(cells)
    for threads, speed in runs.items():
        name = f"onnxruntime alone, {threads} thread(s)"
        rows.append([name, *[""] * 5, f"{speed:.0f}", ratio(ours.get("64", 0), speed), *[""] * 3])
    others = [seen["other_cores"] for points in servers.values() for seen in points.values()]
    shared = ("Reparam is x", "p99 ms", "server CPU us", "wrk CPU us")
    return Report(
        title=f"Throughput over {CONNECTIONS} connections, at 1 and at 64 rows a request",
        columns=["", "requests/s", *shared, "images/s", *shared],
        rows=rows,
        results={"servers": servers, "onnxruntime_rows_per_second_by_threads": runs},
        notes=(
            "`Reparam is x` times as fast as this line. CPU is per request, of all processes of the server and of wrk.",
            "A server and wrk (one thread) share all cores without pinning; onnxruntime alone has all cores.",
            f"Other programs and the hypervisor used {min(others):.2f} .. {max(others):.2f} cores.",
        ),
    )
