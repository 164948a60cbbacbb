"""Latency of small requests beside a greedy client: python -m benchmarks fairness"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from statistics import median
from urllib.request import urlopen

from benchmarks.alone import alone
from benchmarks.latency import percentile
from benchmarks.load import load
from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.servers import Running, seeded, serving
from benchmarks.stream import reader, seen

ROWS = 1_000_000
RATE = 50  # one-row requests a second
PROBERS = 32  # threads for these requests, each with a connection
GREEDY_CONNECTIONS = 8


def measure(options: Options) -> Report:
    """One-row requests at a fixed rate, on an idle server and beside a client with as much load as possible."""
    batch = alone(64, 1, options.seconds)["p50"]
    cases: dict[str, dict[str, float]] = {}
    for name in options.only:
        with serving(name) as running:
            probe(running, _after(1))
            rounds = [measure_round(running, options, batch) for _ in range(options.rounds)]
        cases |= {f"{name}, {case}": _medians([seen[case] for seen in rounds]) for case in rounds[0]}
    return _report(cases, batch)


def measure_round(running: Running, options: Options, batch: float) -> dict[str, dict[str, float]]:
    """Latencies on an idle server, beside a stream (Reparam only), and beside many requests."""
    seen = {"nothing else": _percentiles(probe(running, _after(options.seconds)))}
    quiet = seen["nothing else"]["p99"]
    if running.server.name == "reparam":
        rows = options.rows or ROWS
        streaming = _beside_a_stream(running, rows)
        seen[f"one request for {rows} rows"] = streaming | {"bound": quiet + 2 * streaming["batch"]}
    beside = _beside_many(running, options.seconds)
    return seen | {f"64-row requests over {GREEDY_CONNECTIONS}": beside | {"bound": quiet + 2 * batch}}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds; `requests` is the sum."""
    medians = {name: median(seen[name] for seen in rounds) for name in rounds[0]}
    return medians | {"requests": sum(seen["requests"] for seen in rounds)}


def _beside_a_stream(running: Running, rows: int) -> dict[str, float]:
    before = _batches(running)
    stream = reader(running, rows)
    times = probe(running, lambda: stream.poll() is not None)
    seconds, batches = (after - start for after, start in zip(_batches(running), before, strict=True))
    found = {"greedy_rows_per_second": rows / seen(stream)["seconds"], "batch": seconds / batches}
    return _percentiles(times) | found


def _batches(running: Running) -> tuple[float, float]:
    """Total duration of Reparam's batches in seconds, and their number, since the start."""
    with urlopen(f"http://127.0.0.1:{running.port}/metrics") as response:
        lines = response.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("reparam_infer_duration_seconds_"))

    def total(part: str) -> float:
        return sum(float(value) for name, value in values.items() if f"_{part}{{" in name)

    return total("sum"), total("count")


def _beside_many(running: Running, seconds: int) -> dict[str, float]:
    with ThreadPoolExecutor(1) as pool:
        greedy = pool.submit(load, running, 64, GREEDY_CONNECTIONS, seconds)
        times = probe(running, greedy.done)
        return _percentiles(times) | {"greedy_rows_per_second": 64 * greedy.result().per_second}


def probe(running: Running, done: Callable[[], bool]) -> list[float]:
    """Send one-row requests at RATE until `done` returns True.

    Requests are due at fixed times: a late response does not delay the next request.

    Returns: seconds from the due time to the response, for each request.
    """
    request, begin, number = running.request(1), time.perf_counter(), count()

    def ask() -> list[float]:
        times = []
        with running.connect() as connection:
            while not done():
                turn = next(number)
                due = begin + turn / RATE
                if (early := due - time.perf_counter()) > 0:
                    time.sleep(early)
                    due = time.perf_counter()  # a late wake-up of this thread must not count
                connection.ask(seeded(request, turn))
                times.append(time.perf_counter() - due)
        return times

    with ThreadPoolExecutor(PROBERS) as pool:
        return [seconds for asked in [pool.submit(ask) for _ in range(PROBERS)] for seconds in asked.result()]


def _after(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def _percentiles(times: list[float]) -> dict[str, float]:
    return {"requests": len(times), "p50": percentile(times, 50), "p99": percentile(times, 99)}


def _report(cases: dict[str, dict[str, float]], batch: float) -> Report:
    rows = []
    for name, case in cases.items():
        cells = [name, f"{case['requests']:.0f}", f"{1e3 * case['p50']:.2f}", f"{1e3 * case['p99']:.2f}"]
        if "bound" in case:
            verdict = "held" if case["p99"] < case["bound"] else "missed"
            cells += [f"{1e3 * case['bound']:.2f}", verdict, f"{case['greedy_rows_per_second']:.0f}"]
        rows.append([*cells, *[""] * (7 - len(cells))])
    own = ", ".join(f"{1e3 * case['batch']:.2f} ms each" for case in cases.values() if "batch" in case)
    return Report(
        title=f"Latency of one-row requests at {RATE}/s, beside a greedy client",
        columns=["", "requests", "p50 ms", "p99 ms", "bound ms", "", "greedy rows/s"],
        rows=rows,
        results={"cases": cases, "batch_seconds": batch},
        notes=(
            "Medians of the rounds. The bound on p99 is the p99 of an idle server plus two batches. Beside the stream: "
            f"Reparam's own batches, {own}; otherwise 64 rows in onnxruntime alone, {1e3 * batch:.2f} ms each.",
            "Only Reparam streams a request of any length. Every server also gets 64-row requests back to back from "
            f"one client over {GREEDY_CONNECTIONS} connections.",
        ),
    )
