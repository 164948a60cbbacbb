"""Cost of a row by the length of the request and the number of connections: python -m benchmarks scaling"""

from statistics import median

from benchmarks.load import load
from benchmarks.options import Options
from benchmarks.report import Report, ratio
from benchmarks.servers import serving
from benchmarks.stream import reader, seen

ROWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
MEASURED = 1_000_000  # least rows of each length in a round, about ten seconds: the speed of the machine varies
CONNECTIONS = (1, 4, 16, 64, 256, 1000)


def measure(options: Options) -> Report:
    """Requests for 1e3 to 1e7 rows, all lengths in turn in every round; then one-row requests over 1 to 1000
    connections.

    Reparam only.
    """
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS if rows <= (options.rows or max(ROWS))}
    with serving("reparam") as running:
        for _ in range(options.rounds):
            for rows, turns in seconds.items():
                turns.append(seen(reader(running, rows, times=max(1, MEASURED // rows)))["seconds"])
        loads = {connections: load(running, 1, connections, options.seconds) for connections in CONNECTIONS}
    lengths = {rows: median(turns) for rows, turns in seconds.items()}
    shortest, slowest = lengths[min(ROWS)] / min(ROWS), loads[1].per_second
    return Report(
        title="Cost of a row by the length of a request; throughput by the number of connections",
        columns=["", "us per row", "requests/s", "p99 ms", "relative to the first"],
        rows=[
            *(
                [f"{rows} rows", f"{1e6 * took / rows:.2f}", "", "", ratio(took / rows, shortest)]
                for rows, took in lengths.items()
            ),
            *(
                [
                    f"{connections} connections",
                    "",
                    f"{seen.per_second:.0f}",
                    f"{1e3 * seen.p99:.1f}",
                    ratio(seen.per_second, slowest),
                ]
                for connections, seen in loads.items()
            ),
        ],
        results={
            "seconds_by_rows": lengths,
            "by_connections": {
                connections: {"requests_per_second": seen.per_second, "p50_seconds": seen.p50, "p99_seconds": seen.p99}
                for connections, seen in loads.items()
            },
        },
    )
