"""Closed-loop load by wrk on one thread: each connection sends the next request after a response."""

import json
import os
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import below, busy_seconds, cpu_seconds
from benchmarks.servers import SEED, Running

SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True)
class Load:
    """Result of a run of wrk. CPU is in seconds per request, of all processes of the server and of wrk."""

    per_second: float
    p50: float
    p99: float
    server_cpu: float
    client_cpu: float
    other_cores: float  # cores used by other programs and the hypervisor


def load(running: Running, rows: int, connections: int, seconds: int) -> Load:
    """Send requests for `rows` rows, each with a new seed.

    Raises: RuntimeError for a response without status 200 or with another length.
    """
    head, tail = running.request(rows).split(SEED)
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
        "-s",
        str(SCRIPT),
        running.url,
        "--",
    ]
    servers = below(os.getpid())[1:]
    before = _clocks(servers)
    output = subprocess.run(
        [*command, head, tail, str(running.answer_bytes(rows))], check=True, capture_output=True, text=True
    ).stdout
    seen = json.loads(output.splitlines()[-1])
    if seen["wrong"] or seen["broken"] or not seen["requests"]:
        raise RuntimeError(f"{running.server.name}: wrong or broken answers: {seen}")
    server, client, all_cores = (after - start for after, start in zip(_clocks(servers), before, strict=True))
    return Load(
        per_second=seen["requests"] / seen["seconds"],
        p50=seen["p50"],
        p99=seen["p99"],
        server_cpu=server / seen["requests"],
        client_cpu=client / seen["requests"],
        other_cores=max(0.0, all_cores - server - client) / seen["seconds"],
    )


def _clocks(servers: list[int]) -> tuple[float, float, float]:
    """CPU seconds so far: of the servers, of finished clients, and of the whole machine."""
    clients = resource.getrusage(resource.RUSAGE_CHILDREN)
    return cpu_seconds(servers), clients.ru_utime + clients.ru_stime, busy_seconds()
