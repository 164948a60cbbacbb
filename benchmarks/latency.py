"""Latency of a lone request, and CPU use of an idle server: python -m benchmarks latency"""

import os
import time
from statistics import median

from benchmarks.alone import alone
from benchmarks.options import Options
from benchmarks.processes import below, scheduled_seconds
from benchmarks.report import Report, ratio
from benchmarks.servers import Running, seeded, serving

WARM_UP = 1  # seconds
IDLE = 10  # seconds


def measure(options: Options) -> Report:
    """One connection, one row per request, each request sent after the response to the previous request."""
    times: dict[str, list[list[float]]] = {name: [] for name in options.only}
    idle: dict[str, float] = {}
    runs = []
    for turn in range(options.rounds):
        for name in options.only:
            with serving(name) as running:
                ask(running, WARM_UP)
                times[name].append(ask(running, options.seconds))
                if turn == 0:
                    idle[name] = _idle_share()
        runs.append(alone(1, 1, options.seconds)["p50"])
    servers = {
        name: {
            "p50_seconds": median(percentile(turn, 50) for turn in turns),
            "p99_seconds": median(percentile(turn, 99) for turn in turns),
            "idle_cpu_share": idle[name],
        }
        for name, turns in times.items()
    }
    return _report(servers, median(runs))


def ask(running: Running, seconds: float) -> list[float]:
    """Send one-row requests over one connection, one after the other, for some seconds.

    Returns: seconds of each request.
    """
    request = running.request(1)
    times: list[float] = []
    with running.connect() as connection:
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            connection.ask(seeded(request, len(times)))
            times.append(time.perf_counter() - start)
    return times


def percentile(times: list[float], percent: float) -> float:
    """The value at `percent` of the sorted times."""
    return sorted(times)[min(len(times) - 1, int(len(times) * percent / 100))]


def _idle_share() -> float:
    """CPU use of an idle server, as a share of one core."""
    time.sleep(1)
    servers = below(os.getpid())[1:]
    used = scheduled_seconds(servers)
    time.sleep(IDLE)
    return (scheduled_seconds(servers) - used) / IDLE


def _report(servers: dict[str, dict[str, float]], run: float) -> Report:
    """A table with each server beside the sums of a server without a model and a run of the model.

    `route` is a FastAPI route, `noop` an ASGI application without a route, `bare` is `noop` with a run of the model.
    """
    beside = {"bare": servers.get("bare", {}).get("p50_seconds", 0.0)}
    for name in ("route", "noop"):
        beside[f"{name} + run"] = servers[name]["p50_seconds"] + run if name in servers else 0.0
    rows = [
        [
            name,
            f"{1e6 * seen['p50_seconds']:.0f}",
            f"{1e6 * seen['p99_seconds']:.0f}",
            *(ratio(seen["p50_seconds"], seconds) for seconds in beside.values()),
            f"{100 * seen['idle_cpu_share']:.1f} %",
        ]
        for name, seen in servers.items()
    ]
    return Report(
        title="Latency of a lone one-row request, over one connection",
        columns=["", "p50 us", "p99 us", *(f"/ ({name})" for name in beside), "CPU while idle"],
        rows=[*rows, ["one run of the model", f"{1e6 * run:.0f}", *[""] * 5]],
        results={"servers": servers, "model_run_seconds": run, "beside_seconds": beside},
        notes=(
            "route: a FastAPI route without a model. noop: an ASGI application without a route. bare: noop with a run "
            "of the model. The added run has all CPU caches to itself. Every line includes the client's own time.",
        ),
    )
