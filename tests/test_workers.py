"""Several processes on one port, which a client cannot tell from one."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from benchmarks.processes import below
from tests.conftest import metric, wait_until
from tests.load import NPY, TLS
from tests.processes import PATIENCE, QUIET, TWO, Process, process, start
from tests.raw import connect, request, whole_response

DRAIN = {"REPARAM_DRAIN_DELAY": "0", "REPARAM_DRAIN_TIMEOUT": "3"}


@pytest.fixture(scope="module")
def shared(repository: Path) -> Iterator[Process]:
    """A service that no test changes for the next test."""
    with process(repository, **TWO, **DRAIN, **QUIET) as service:
        yield service


@pytest.fixture
def own(repository: Path) -> Iterator[Process]:
    with process(repository, **TWO, **{**DRAIN, "REPARAM_DRAIN_TIMEOUT": "60"}, **QUIET) as service:
        yield service


def workers(service: Process) -> list[int]:
    """List the process ids of both workers."""
    pids = below(service.popen.pid)
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def worker_of(request_id: str) -> str:
    """Read the part of a request id that all request ids of a worker begin with."""
    return request_id[:-12]


def test_both_workers_return_the_same_rows_and_each_reports_for_both(shared: Process) -> None:
    count = {"path": "/sample", "status": "200"}
    before = metric(shared.url, "requests_total", **count)
    responses = [shared.post({"n": 3, "seed": 7}, headers=NPY) for _ in range(30)]
    assert len({response.content for response in responses}) == 1
    assert len({worker_of(response.headers["x-request-id"]) for response in responses}) == len(workers(shared)) == 2
    for _ in range(10):  # either worker may take the connection
        wait_until(lambda: metric(shared.url, "requests_total", **count) == before + 30)
        assert metric(shared.url, "noise_version_info", noise_version="1") == 1
        assert metric(shared.url, "request_duration_seconds_bucket", le="+Inf", path="/sample") == before + 30
        assert metric(shared.url, "requests_in_flight") == 1


def test_a_worker_that_hangs_is_reported_by_the_other(shared: Process) -> None:
    stopped, _ = workers(shared)

    def ask(path: str) -> httpx.Response | None:
        """Return None if the kernel gave the connection to the worker that hangs."""
        try:
            return shared.get(path, timeout=4)
        except httpx.TimeoutException:
            return None

    def response(path: str) -> httpx.Response:
        """Ask by several connections at a time until one has a response."""
        with ThreadPoolExecutor(6) as pool:
            return next(found for _ in range(20) for found in pool.map(ask, [path] * 6) if found is not None)

    os.kill(stopped, signal.SIGSTOP)
    try:
        assert "does not answer" in response("/livez").json()["failure"]
        assert response("/readyz").json()["status"] == "failed"
        assert response("/metrics").status_code == 503
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: response("/readyz").status_code == 200)


def test_many_probes_at_a_time_find_no_fault(shared: Process) -> None:
    with ThreadPoolExecutor(24) as pool:
        assert set(pool.map(lambda _: shared.get("/livez").status_code, range(96))) == {200}


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_port_of_another_process_is_refused(shared: Process, count: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = shared.url.rpartition(":")[2], str(other.getsockname()[1])
        for port in ports:
            refused = start(REPARAM_PORT=port, REPARAM_WORKERS=count, REPARAM_DEVICE="cpu")
            _, message = refused.communicate(timeout=PATIENCE)
            assert refused.returncode == 1
            assert f"REPARAM_PORT={port}: [Errno" in message
            assert "Traceback" not in message


def test_a_worker_that_dies_ends_the_service_after_requests_in_flight(own: Process) -> None:
    """Each connection sends a request, so that its worker is known, and a second one that lacks a byte."""
    by_worker: dict[str, list[tuple[socket.socket, BufferedReader]]] = {}
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(connect(own))
            stream = stack.enter_context(connection.makefile("rb"))
            connection.sendall(request({}))
            _, headers, _ = whole_response(stream)
            by_worker.setdefault(worker_of(headers[b"x-request-id"].decode()), []).append((connection, stream))
            connection.sendall(request({})[:-1])
            if (count := sum(map(len, by_worker.values()))) >= 8 and len(by_worker) == 2:
                break
        own.await_in_flight(count)
        os.kill(workers(own)[0], signal.SIGKILL)
        outcomes = [{finish(*held) for held in connections} for connections in by_worker.values()]
        log = own.end()
    assert sorted(map(sorted, outcomes)) == [[0], [200]]
    assert own.popen.returncode == 1
    assert "a worker ended, and with it the service" in log


def finish(connection: socket.socket, stream: BufferedReader) -> int:
    """Send the last byte of a request. Returns the status of the response, 0 if the connection breaks."""
    try:
        connection.sendall(request({})[-1:])
        return whole_response(stream)[0]
    except (OSError, IndexError):
        return 0


def test_a_worker_that_does_not_end_is_killed(repository: Path) -> None:
    with process(repository, **TWO, **QUIET, REPARAM_DRAIN_DELAY="0", REPARAM_DRAIN_TIMEOUT="1") as service:
        os.kill(workers(service)[0], signal.SIGSTOP)
        log = service.end(signal.SIGTERM)
    assert service.popen.returncode == 1
    assert "a worker did not end and is killed" in log


def test_workers_end_with_their_parent(own: Process) -> None:
    pids = workers(own)
    own.popen.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    """Tell whether the process runs. A zombie does not run, though in a container it may stay forever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5])
def test_a_signal_during_the_start_ends_the_service_in_order(repository: Path, seconds: float) -> None:
    running = start("--port", "0", "--workers", "2", "--device", "cpu", "--artifacts", str(repository))
    assert running.stderr is not None
    next(line for line in running.stderr if '"starting"' in line)
    time.sleep(seconds)
    running.send_signal(signal.SIGTERM)
    _, log = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0
    assert "Traceback" not in log


class Ended(NamedTuple):
    """A service that has ended. lines: its log."""

    status: int
    lines: list[str]


@pytest.fixture(scope="module")
def ended(repository: Path) -> Ended:
    """A service under load, one of whose workers then ends by itself."""
    path = "/" + "x" * 20_000  # more than a pipe takes as a whole

    def sample(url: str) -> None:
        with httpx.Client(verify=TLS, timeout=120) as client:
            for _ in range(50):
                client.post(f"{url}/sample", json={"n": 1})
                client.get(url + path)

    with process(repository, **TWO, **DRAIN) as service, ThreadPoolExecutor(7) as pool:
        log = pool.submit(service.end)  # reads the pipe all the time
        tuple(pool.map(sample, [service.url] * 6))
        os.kill(workers(service)[1], signal.SIGTERM)
        lines = log.result().splitlines()
    return Ended(service.popen.returncode, lines)


def test_log_lines_of_workers_do_not_mix(ended: Ended) -> None:
    assert sum(json.loads(line).get("path") == "/sample" for line in ended.lines) == 6 * 50


def test_a_worker_that_ends_by_itself_ends_the_service_with_status_1(ended: Ended) -> None:
    assert ended.status == 1
    assert any("a worker ended, and with it the service" in line for line in ended.lines)
