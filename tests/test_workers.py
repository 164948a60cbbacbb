"""Several processes on one port, which a client cannot tell from one."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.processes import below
from reparam.service.runtime import devices
from reparam.service.runtime.devices import DeviceError
from reparam.service.settings import Settings
from tests.conftest import metric, wait_until
from tests.graphs import SLOW
from tests.test_process import process, refused, start

NPY = {"Accept": "application/x-npy"}


TWO = {"REPARAM_WORKERS": "2", "REPARAM_DRAIN_DELAY": "0", "REPARAM_DRAIN_TIMEOUT": "3"}


@pytest.fixture
def service(repository: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    with process(repository, **TWO, REPARAM_LOG_LEVEL="warning") as running:  # nobody reads the log meanwhile
        yield running


def workers(parent: "subprocess.Popen[str]") -> list[int]:
    return [pid for pid in below(parent.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_both_answer_the_same_rows_and_either_answers_for_both(
    service: tuple["subprocess.Popen[str]", str],
) -> None:
    running, url = service
    answers = [httpx.post(f"{url}/sample", json={"n": 3, "seed": 7}, headers=NPY) for _ in range(30)]
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["x-request-id"][:-12] for answer in answers}) == len(workers(running)) == 2
    for _ in range(10):  # whoever is asked
        assert metric(url, "requests_total", path="/sample", status="200") == 30
        assert metric(url, "noise_version_info", noise_version="1") == 1
        assert metric(url, "request_duration_seconds_bucket", le="+Inf", path="/sample") == 30
        assert metric(url, "requests_in_flight") == 1


def test_a_worker_that_hangs_is_told_by_the_other(service: tuple["subprocess.Popen[str]", str]) -> None:
    running, url = service
    stopped, _ = workers(running)

    def ask(path: str) -> httpx.Response | None:
        """None if the kernel gave the connection to the one that hangs."""
        try:
            return httpx.get(f"{url}{path}", timeout=2)
        except httpx.TimeoutException:
            return None

    def said(path: str) -> httpx.Response:
        return next(answer for _ in range(50) if (answer := ask(path)) is not None)

    os.kill(stopped, signal.SIGSTOP)
    try:
        assert "does not answer" in said("/livez").json()["failure"]
        assert said("/readyz").json()["status"] == "failed"
        assert said("/metrics").status_code == 503
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: said("/readyz").status_code == 200)


def test_a_worker_that_dies_ends_the_service_after_what_is_in_flight(
    service: tuple["subprocess.Popen[str]", str],
) -> None:
    running, url = service
    slow = {"model": "trouble", "temperature": SLOW + 100}
    with ThreadPoolExecutor(8) as pool:
        in_flight = [pool.submit(httpx.post, f"{url}/sample", json=slow, timeout=60) for _ in range(8)]
        wait_until(lambda: metric(url, "requests_in_flight") == 8 + 1)
        os.kill(workers(running)[0], signal.SIGKILL)
        outcomes = [future.exception() or future.result().status_code for future in in_flight]
    assert running.wait(30) == 1
    assert 200 in outcomes
    assert all(outcome == 200 or isinstance(outcome, httpx.TransportError) for outcome in outcomes)


def test_a_worker_that_ends_by_itself_is_no_good_end(service: tuple["subprocess.Popen[str]", str]) -> None:
    running, _ = service
    os.kill(workers(running)[1], signal.SIGTERM)
    _, log = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "a worker ended, and with it the service" in log


def test_a_worker_that_does_not_end_is_killed(service: tuple["subprocess.Popen[str]", str]) -> None:
    running, _ = service
    os.kill(workers(running)[0], signal.SIGSTOP)
    running.send_signal(signal.SIGTERM)
    _, log = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "a worker did not end and is killed" in log


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5])
def test_a_stop_during_the_start_is_a_good_end(repository: Path, seconds: float) -> None:
    running = start("--port", "0", "--workers", "2", "--device", "cpu", "--artifacts", str(repository))
    assert running.stderr is not None
    assert any('"starting"' in line for line in running.stderr)  # waits for the line
    time.sleep(seconds)
    running.send_signal(signal.SIGTERM)
    _, log = running.communicate(timeout=30)
    assert running.returncode == 0
    assert "Traceback" not in log


def test_many_probes_at_a_time_find_no_fault(service: tuple["subprocess.Popen[str]", str]) -> None:
    _, url = service
    with ThreadPoolExecutor(64) as pool:
        statuses = pool.map(lambda _: httpx.get(f"{url}/livez", timeout=60).status_code, range(200))
        assert set(statuses) == {200}


def test_workers_end_with_their_parent(service: tuple["subprocess.Popen[str]", str]) -> None:
    running, _ = service
    pids = workers(running)
    running.kill()
    wait_until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    """And is not merely waiting to be reaped, which in a container may never happen."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_log_lines_of_workers_do_not_mix(repository: Path) -> None:
    long = "x" * 20_000  # more than a pipe takes as a whole

    def sample(url: str) -> None:
        with httpx.Client() as client:
            for _ in range(100):
                client.post(f"{url}/sample", json={"n": 1})
                client.get(f"{url}/{long}")

    with process(repository, **TWO) as (running, url), ThreadPoolExecutor(9) as pool:
        said = pool.submit(running.communicate)  # reads the pipe all the time
        tuple(pool.map(sample, [url] * 8))
        running.send_signal(signal.SIGTERM)
        _, log = said.result()
    assert running.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert sum(line.get("path") == "/sample" for line in lines) == 800


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_others_have_is_refused(service: tuple["subprocess.Popen[str]", str], workers: str) -> None:
    _, url = service
    port = url.rpartition(":")[2]
    assert f"REPARAM_PORT={port}: [Errno" in refused(REPARAM_PORT=port, REPARAM_WORKERS=workers, REPARAM_DEVICE="cpu")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"REPARAM_PORT={port}: [Errno" in refused(
            REPARAM_PORT=port, REPARAM_WORKERS=workers, REPARAM_DEVICE="cpu"
        )


def test_only_linux_shares_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert devices.choose(Settings(device="cpu")).workers == 1
    with pytest.raises(DeviceError, match="REPARAM_WORKERS=2"):
        devices.choose(Settings(device="cpu", workers=2))
