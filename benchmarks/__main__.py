"""python -m benchmarks throughput|latency|fairness|memory|scaling|training|device|all [--help]"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import device, fairness, latency, memory, scaling, throughput, training
from benchmarks.options import Options
from benchmarks.report import Report, record
from benchmarks.servers import SERVERS

BENCHMARKS: dict[str, Callable[[Options], Report]] = {
    "throughput": throughput.measure,
    "latency": latency.measure,
    "fairness": fairness.measure,
    "memory": memory.measure,
    "scaling": scaling.measure,
    "training": training.measure,
    "device": device.measure,
}
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Reparam and its peers.")
    parser.add_argument("name", choices=[*BENCHMARKS, "all"], help="prints a table for each, then the JSON of all")
    parser.add_argument("--only", type=_servers, default=list(SERVERS), help=f"some of {','.join(SERVERS)}")
    parser.add_argument("--seconds", type=int, default=5, help="seconds per measured point (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are over rounds (default: 3)")
    parser.add_argument("--rows", type=int, help="rows of the large requests (default: depends on the benchmark)")
    parser.add_argument("--save", action="store_true", help="write the JSON to benchmarks/results/NAME.json")
    parser.add_argument("--label", help="save as NAME-LABEL.json")
    arguments = parser.parse_args()
    options = Options(arguments.only, arguments.seconds, arguments.rounds, arguments.rows)
    records: dict[str, dict[str, Any]] = {}
    faults = 0
    try:
        for name in BENCHMARKS if arguments.name == "all" else [arguments.name]:
            report = BENCHMARKS[name](options)
            faults += len(report.faults)
            print(f"{report}\n", flush=True)
            records[name] = record(name, report)
            if arguments.save:
                RESULTS.mkdir(exist_ok=True)
                file = "-".join(filter(None, [name, arguments.label]))
                (RESULTS / f"{file}.json").write_text(f"{json.dumps(records[name])}\n")
    finally:  # also print the results before a failure
        print(json.dumps(records if arguments.name == "all" else records.get(arguments.name)))
    sys.exit(1 if faults else 0)


def _servers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - SERVERS.keys():
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(SERVERS)}")
    return names


if __name__ == "__main__":
    main()
