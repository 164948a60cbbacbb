"""`reparam serve` as one process: its log, its memory, and how it ends."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.processes import resident_bytes
from reparam import Client
from tests.conftest import metric, wait_until
from tests.graphs import SLOW
from tests.processes import ALONE, PATIENCE, QUIET, TWO, Process, free_port, process
from tests.raw import connect, read_response, request

ENDLESS = {"model": "trouble", "temperature": SLOW + 100_000}  # runs for longer than any test


@pytest.fixture(scope="module")
def log(repository: Path) -> list[dict[str, Any]]:
    """The log of a service that has answered a request, until SIGTERM has ended it."""
    settings = {**ALONE, "REPARAM_DEVICE": "auto", "REPARAM_DRAIN_DELAY": "0"}
    with process(repository, **settings, REPARAM_DEFALT_MODEL="x", REPARAM_URL="y") as service:
        assert service.post({}, headers={"X-Request-ID": "mine"}).status_code == 200
        lines = service.end(signal.SIGTERM)
    return [json.loads(line) for line in lines.splitlines()]


def test_the_log_is_json_and_names_device_and_requests(log: list[dict[str, Any]]) -> None:
    loaded = next(line for line in log if line["message"] == "model loaded" and line["model"] == "tiny-gumbel")
    assert loaded["provider"].endswith("ExecutionProvider")
    assert loaded["reason"].startswith("REPARAM_DEVICE=auto")
    request = next(line for line in log if line.get("request_id") == "mine")
    assert (request["path"], request["status"], request["method"]) == ("/sample", 200, "POST")
    assert {"time", "level", "logger", "seconds"} <= request.keys()


def test_an_unknown_variable_that_looks_like_a_setting_is_logged(log: list[dict[str, Any]]) -> None:
    (warning,) = (line for line in log if "no settings, and ignored" in line["message"])
    assert (warning["level"], warning["names"]) == ("WARNING", ["REPARAM_DEFALT_MODEL"])


def test_a_second_signal_hurries_and_the_log_can_be_text(repository: Path) -> None:
    settings = {**TWO, "REPARAM_LOG_FORMAT": "text", "REPARAM_DRAIN_DELAY": "3600"}
    with process(repository, **settings) as service, ThreadPoolExecutor(1) as pool:
        service.post(headers={"X-Request-ID": "mine"})
        pool.submit(service.post, ENDLESS)
        service.await_in_flight(1)
        service.get("/%1b[31m%20status=200")
        service.get("/models", headers={"X-Request-ID": "the-last"})
        log = service.end(signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    assert service.popen.returncode == 0
    assert "the-last" in log
    assert "Traceback" not in log
    assert re.search(r"INFO    request method=POST path=/sample status=200 request_id=mine seconds=\d", log)
    assert r"path='/\x1b[31m status=200' status=404" in log


def test_sigterm_lets_requests_in_flight_end_and_exits_0(repository: Path) -> None:
    """A stream whose client reads late, and a request whose body is whole only when the port is closed."""
    drain = {"REPARAM_DRAIN_DELAY": "6", "REPARAM_DRAIN_TIMEOUT": "300"}
    with (
        process(repository, **ALONE, **drain) as service,
        connect(service, receive_buffer=4096) as stream,
        connect(service) as late,
    ):
        stream.sendall(request({"n": 150_000}))
        late.sendall(request({})[:-1])
        service.await_in_flight(2)
        service.popen.send_signal(signal.SIGTERM)
        states = (service.get("/readyz") for _ in itertools.count())
        unready = next(response for response in states if response.status_code == 503)
        assert unready.json()["status"] == "draining"
        wait_until(lambda: is_closed(service))
        late.sendall(request({})[-1:])
        assert read_response(late)[0] == 200
        status, rows = read_response(stream)
        assert (status, len(np.load(BytesIO(rows)))) == (200, 150_000)
        assert '"message":"draining"' in service.end()
    assert service.popen.returncode == 0


def is_closed(service: Process) -> bool:
    """Tell whether the port takes no connections."""
    time.sleep(0.1)  # few requests, because the log, which is not read, must fit the pipe
    try:
        service.get("/livez")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # the port was closed before this connection was accepted
        pass
    return False


def test_requests_that_wait_or_run_when_the_drain_ends_are_refused(repository: Path) -> None:
    drain = {"REPARAM_DRAIN_DELAY": "0", "REPARAM_DRAIN_TIMEOUT": "1"}
    with process(repository, **ALONE, **drain) as service, ThreadPoolExecutor(2) as pool:
        runs = pool.submit(service.post, ENDLESS)
        service.await_in_flight(1)
        waits = pool.submit(service.post, {})
        wait_until(lambda: metric(service.url, "queue_rows") == 1)
        service.end(signal.SIGTERM)
        assert service.popen.returncode == 0
        assert [future.result().json()["type"] for future in (runs, waits)] == ["/problems/unavailable"] * 2


def test_requests_that_are_read_or_encoded_when_the_drain_ends_are_refused(repository: Path) -> None:
    drain = {"REPARAM_DRAIN_DELAY": "0", "REPARAM_DRAIN_TIMEOUT": "0"}
    many = {"model": "tiny-gaussian", "n": 5000}  # PNGs take a while
    with process(repository, **ALONE, **drain) as service, ThreadPoolExecutor(2) as pool, connect(service) as late:
        late.sendall(request({})[:-1])
        encoded = [pool.submit(service.post, many) for _ in range(2)]
        service.await_in_flight(3)
        service.popen.send_signal(signal.SIGTERM)
        status, body = read_response(late)
        refused = [future.result().json()["type"] for future in encoded if future.result().status_code != 200]
        service.end()
    assert service.popen.returncode == 0
    assert (status, json.loads(body)["type"]) == (503, "/problems/unavailable")
    assert set(refused) <= {"/problems/unavailable"}


def test_a_log_without_a_reader_fails_no_request(repository: Path) -> None:
    with process(repository, REPARAM_WORKERS="1") as service:
        assert service.popen.stderr is not None
        service.popen.stderr.close()
        for _ in range(2):
            assert service.post({}).status_code == 200
            for path in ("/metrics", "/livez", "/readyz"):  # each writes the log before its response
                assert service.get(path).status_code == 200


def test_requests_are_refused_while_the_models_are_loaded(repository: Path, tmp_path: Path) -> None:
    """Before the drain and during the drain."""
    link_versions(repository, tmp_path)
    with process(tmp_path, until="starting", **ALONE, REPARAM_DRAIN_DELAY="3600") as service:
        before = service.post({})
        service.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: service.get("/readyz").json()["status"] == "draining")
        after = service.post({})
    for response in (before, after):
        assert response.status_code == 503
        assert response.json()["detail"] == "the models are being loaded: try again in a second"


def test_a_signal_while_models_are_loaded_ends_the_service(repository: Path, tmp_path: Path) -> None:
    link_versions(repository, tmp_path)
    with process(tmp_path, until="starting", **ALONE, REPARAM_DRAIN_DELAY="0") as service:
        assert service.popen.stderr is not None
        next(line for line in service.popen.stderr if '"model loaded"' in line)
        log = service.end(signal.SIGTERM)
    assert service.popen.returncode == 0
    assert log.count('"model loaded"') < 998


def link_versions(repository: Path, folder: Path) -> None:
    """Make a repository that takes many seconds to load."""
    for version in range(1, 1000):
        (folder / "many" / str(version)).mkdir(parents=True)
        os.link(repository / "tiny-gaussian" / "1" / "model.onnx", folder / "many" / str(version) / "model.onnx")


def test_a_restart_under_load_loses_no_request(repository: Path) -> None:
    port, done = free_port(), threading.Event()

    def sample(seed: int) -> list[npt.NDArray[np.uint8] | None]:
        with Client(f"http://127.0.0.1:{port}", timeout=PATIENCE, max_retries=1000) as client:
            responses = []
            while not done.is_set():
                responses.append(client.sample(n=5, seed=seed).images)
            return responses

    settings = {**TWO, **QUIET, "REPARAM_PORT": port}
    with ThreadPoolExecutor(4) as pool:
        with process(repository, **settings, REPARAM_DRAIN_DELAY="0.2") as first:
            clients = [pool.submit(sample, seed) for seed in range(4)]
            wait_until(lambda: metric(first.url, "rows_total", model="tiny-gaussian", version="1"))
            first.end(signal.SIGTERM)
        with process(repository, **settings) as second:
            wait_until(lambda: metric(second.url, "rows_total", model="tiny-gaussian", version="1"))
            done.set()
            responses = [client.result() for client in clients]
    assert first.popen.returncode == 0
    for images, *others in responses:
        assert others
        assert images is not None
        assert all(other is not None and np.array_equal(other, images) for other in others)


def test_memory_returns_when_clients_disconnect_in_the_middle_of_their_streams(repository: Path) -> None:
    """Each crowd of clients makes the service compute some 60 MB ahead of its readers."""
    clients, rows = 250, {"model": "tiny-gaussian", "version": "1"}
    message = request({"n": 10_000_000, "model": "tiny-gaussian"})

    def crowd(service: Process) -> None:
        before = metric(service.url, "rows_total", **rows)
        with contextlib.ExitStack() as connections:
            for _ in range(clients):
                connections.enter_context(small_connection(service)).sendall(message)
            service.await_in_flight(clients)
            wait_until(lambda: metric(service.url, "queue_rows") == 0)
            assert metric(service.url, "rows_total", **rows) > before + 12e6 / 64
        wait_until(lambda: metric(service.url, "held_bytes") == 0)

    limits = {"REPARAM_MAX_HELD_BYTES": str(2**40), "REPARAM_MAX_QUEUE_ROWS": str(2**30)}
    with process(repository, **ALONE, **QUIET, **limits) as service:
        for _ in range(2):  # until the allocator has all the memory that it keeps
            crowd(service)
        before = resident_bytes([service.popen.pid])
        for _ in range(3):
            crowd(service)
        assert resident_bytes([service.popen.pid]) < before + 50e6


def small_connection(service: Process) -> socket.socket:
    """Connect with small segments, for which the kernel's buffers are small, so that rows wait in the service."""
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    return connection
