"""This build beside another one, alternating: python -m benchmarks.versus CHECKOUT

Throughput, latency, memory and fairness of the services of two checkouts, as ratios of medians. Prints JSON last.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from benchmarks.alone import alone
from benchmarks.fairness import measure_round
from benchmarks.latency import ask, percentile
from benchmarks.load import load
from benchmarks.options import Options
from benchmarks.processes import below, resident_bytes
from benchmarks.report import Report, record
from benchmarks.servers import ROOT, serving
from benchmarks.stream import reader, seen

CONNECTIONS = 64
WARM_UP = 1  # seconds, before each point
STREAM_ROWS = 1_000_000
# Measures of which less is better; of all others more is.
LOWER = ("seconds", "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a folder with another commit of this repository")
    parser.add_argument("--seconds", type=int, default=5, help="of each measured point (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are taken over these (default: 5)")
    parser.add_argument("--only", choices=["throughput", "latency", "memory", "fairness"], action="append")
    parser.add_argument("--save", action="store_true", help="write the JSON to benchmarks/results/versus.json")
    arguments = parser.parse_args()
    report = measure(
        arguments.checkout.resolve(),
        Options(["reparam"], arguments.seconds, arguments.rounds, None),
        arguments.only or ["throughput", "latency", "memory", "fairness"],
    )
    print(report)
    text = json.dumps(record("versus", report))
    if arguments.save:
        (ROOT / "benchmarks" / "results" / "versus.json").write_text(f"{text}\n")
    print(text)


def measure(checkout: Path, options: Options, parts: list[str]) -> Report:
    """Measure both builds in every round, the first one first in every other round."""
    builds = {"this": ROOT, "other": checkout}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
    batch = alone(64, 1, options.seconds)["p50"]
    for turn in range(options.rounds):
        for name in list(builds)[:: 1 if turn % 2 else -1]:
            rounds[name].append(_measure_build(builds[name], options, parts, batch))
    medians = {name: {what: median(found[what] for found in each) for what in each[0]} for name, each in rounds.items()}
    ratios = {what: medians["this"][what] / medians["other"][what] for what in medians["this"]}
    return Report(
        title=f"This build beside the build in {checkout.name}, medians of {options.rounds} rounds",
        columns=["", "this", "other", "this / other", "better is"],
        rows=[
            [what, *(f"{medians[name][what]:.6g}" for name in builds), f"{ratio:.3f}", _better(what)]
            for what, ratio in ratios.items()
        ],
        results={"medians": medians, "ratios": ratios, "rounds": rounds},
    )


def _measure_build(checkout: Path, options: Options, parts: list[str], batch: float) -> dict[str, float]:
    found: dict[str, float] = {}
    with serving("reparam", checkout) as running:
        pids = below(running.process.pid)
        if "latency" in parts:
            ask(running, WARM_UP)
            times = ask(running, options.seconds)
            found |= {
                "lone request p50 seconds": percentile(times, 50),
                "lone request p99 seconds": percentile(times, 99),
            }
        if "throughput" in parts:
            for rows in (1, 64):
                load(running, rows, CONNECTIONS, WARM_UP)
                point = load(running, rows, CONNECTIONS, options.seconds)
                found[f"{rows} rows a request, requests per s"] = point.per_second
                found[f"{rows} rows a request, p99 seconds"] = point.p99
                found[f"{rows} rows a request, server CPU seconds"] = point.server_cpu
        if "fairness" in parts:
            for case, values in measure_round(running, options, batch).items():
                found[f"beside {case}: p99 seconds"] = values["p99"]
        if "memory" in parts:
            idle = resident_bytes(pids)
            stream = reader(running, STREAM_ROWS)
            peak = idle
            while stream.poll() is None:
                peak = max(peak, resident_bytes(pids))
            seen(stream)
            found |= {"resident after load, bytes": idle, "resident while streaming, bytes": peak}
    return found


def _better(what: str) -> str:
    return "lower" if what.endswith(LOWER) else "higher"


if __name__ == "__main__":
    main()
