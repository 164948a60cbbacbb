"""`reparam serve` as a process: settings, device, logs, and the way it ends."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.processes import resident_bytes
from reparam import Client
from reparam.service.runtime import devices
from reparam.service.settings import Settings
from tests.conftest import Running, metric, wait_until
from tests.graphs import SLOW
from tests.raw import request


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "reparam", "serve", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(*arguments: str, status: int = 1, **environment: str) -> str:
    """The one thing it says before it exits with this status."""
    process = start(*arguments, **environment)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in said
    return said


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def process(
    repository: Path, until: str = "ready", **environment: str
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A service in this state, and its URL."""
    port = environment.setdefault("REPARAM_PORT", free_port())
    running = start(REPARAM_ARTIFACTS=str(repository), **environment)
    url = f"http://127.0.0.1:{port}"

    def there() -> bool:
        try:
            return bool(httpx.get(f"{url}/readyz").json()["status"] == until)
        except httpx.TransportError:
            return False

    try:
        wait_until(there)
        yield running, url
    finally:
        running.kill()
        running.communicate()


def test_sigterm_finishes_what_is_in_flight_and_exits_0(repository: Path) -> None:
    slow = {"model": "trouble", "temperature": SLOW + 150, "n": 2}
    with process(repository, REPARAM_DRAIN_DELAY="1.5") as (running, url), ThreadPoolExecutor(2) as pool:
        in_flight = [pool.submit(httpx.post, f"{url}/sample", json=slow, timeout=60) for _ in range(2)]
        wait_until(lambda: "reparam_requests_in_flight 3.0" in httpx.get(f"{url}/metrics").text)
        running.send_signal(signal.SIGTERM)
        answers = (httpx.get(f"{url}/readyz") for _ in itertools.count())
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.json()["status"] == "draining"
        assert [future.result().status_code for future in in_flight] == [200, 200]
        _, log = running.communicate(timeout=60)
        assert running.returncode == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/livez")
    assert '"message":"draining"' in log


def test_what_is_asked_while_the_models_are_loaded_is_told_so(repository: Path, tmp_path: Path) -> None:
    """Also when the end begins meanwhile."""
    for version in range(1, 60):  # seconds
        shutil.copytree(repository / "tiny-gaussian" / "1", tmp_path / "many" / str(version))
    alone = {"REPARAM_WORKERS": "1", "REPARAM_DRAIN_DELAY": "30"}
    with process(tmp_path, until="starting", **alone) as (running, url):
        before = httpx.post(f"{url}/sample", json={})
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/readyz").json()["status"] == "draining")
        after = httpx.post(f"{url}/sample", json={})
    for answer in (before, after):
        assert (answer.status_code, answer.json()["detail"]) == (
            503,
            "the models are being loaded: try again in a second",
        )


def test_what_still_waits_or_runs_when_the_drain_ends_is_told_so(repository: Path) -> None:
    slow = {"model": "trouble", "temperature": SLOW + 2000}
    alone = {"REPARAM_WORKERS": "1", "REPARAM_RUNNERS": "1"}
    with process(repository, **alone, REPARAM_DRAIN_DELAY="0", REPARAM_DRAIN_TIMEOUT="1") as (running, url):
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(httpx.post, f"{url}/sample", json=slow, timeout=60)
            wait_until(lambda: "reparam_requests_in_flight 2.0" in httpx.get(f"{url}/metrics").text)
            second = pool.submit(httpx.post, f"{url}/sample", json={}, timeout=60)
            wait_until(lambda: "reparam_queue_rows 1.0" in httpx.get(f"{url}/metrics").text)
            running.send_signal(signal.SIGTERM)
            assert second.result().json()["type"] == "/problems/unavailable"
            assert first.result().json()["type"] == "/problems/unavailable"
        running.communicate(timeout=60)
        assert running.returncode == 0


def test_what_has_not_ended_when_the_service_must_is_told_so(repository: Path) -> None:
    at_once = {"REPARAM_WORKERS": "1", "REPARAM_DRAIN_DELAY": "0", "REPARAM_DRAIN_TIMEOUT": "0"}
    body = {"model": "tiny-gaussian", "n": 30_000}  # seconds of PNG and JSON
    with process(repository, **at_once) as (running, url), ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(httpx.post, f"{url}/sample", json=body, timeout=60) for _ in range(8)]
        wait_until(lambda: "reparam_requests_in_flight 9.0" in httpx.get(f"{url}/metrics").text)
        running.send_signal(signal.SIGTERM)
        refused = [answer.result() for answer in answers if answer.result().status_code != 200]
        assert running.wait(30) == 0
    assert refused
    assert {answer.json()["type"] for answer in refused} == {"/problems/unavailable"}


def test_a_restart_under_load_loses_no_request(repository: Path) -> None:
    port, done = free_port(), threading.Event()

    def sample(seed: int) -> list[npt.NDArray[np.uint8] | None]:
        with Client(f"http://127.0.0.1:{port}", timeout=60, max_retries=100) as client:
            answers = []
            while not done.is_set():
                answers.append(client.sample(n=5, seed=seed).images)
            return answers

    quiet = {"REPARAM_PORT": port, "REPARAM_LOG_LEVEL": "warning"}  # nobody reads the log meanwhile
    with ThreadPoolExecutor(8) as pool:
        with process(repository, **quiet, REPARAM_DRAIN_DELAY="0.2") as (first, url):
            before = httpx.get(f"{url}/livez").status_code
            clients = [pool.submit(sample, seed) for seed in range(8)]
            wait_until(lambda: "reparam_rows_total" in httpx.get(f"{url}/metrics").text)
            first.send_signal(signal.SIGTERM)
            first.wait(30)
        with process(repository, **quiet) as (_, url):
            wait_until(lambda: "reparam_rows_total" in httpx.get(f"{url}/metrics").text)
            done.set()
            answers = [client.result() for client in clients]
    assert (before, first.returncode) == (200, 0)
    for answer in answers:
        assert len(answer) >= 2
        assert answer[0] is not None
        assert all(images is not None and np.array_equal(images, answer[0]) for images in answer)


def test_memory_returns_when_crowds_leave_in_the_middle_of_their_answers() -> None:
    """Each time some 60 MB of pictures are computed ahead of them."""
    message = request({"model": "gaussian-fashion", "n": 10_000_000})

    def crowd(url: str) -> None:
        address = "127.0.0.1", int(url.rpartition(":")[2])
        with contextlib.ExitStack() as connections:
            for _ in range(300):
                connection = connections.enter_context(socket.create_connection(address))
                connection.sendall(message)
            held = 0.0
            while (now := metric(url, "held_bytes")) > held:  # until no more of them come
                held = now
            assert held > 50e6
        wait_until(lambda: metric(url, "held_bytes") == 0)

    settings = {"REPARAM_WORKERS": "1", "REPARAM_LOG_LEVEL": "warning", "REPARAM_MAX_HELD_BYTES": str(2**30)}
    with process(Path("artifacts"), **settings) as (server, url):
        crowd(url)
        after_one = resident_bytes([server.pid])
        for _ in range(4):
            crowd(url)
        assert resident_bytes([server.pid]) < after_one + 50e6


def test_a_signal_while_models_are_loaded_ends_the_service(repository: Path, tmp_path: Path) -> None:
    for version in range(1, 1000):
        (tmp_path / "many" / str(version)).mkdir(parents=True)
        os.link(repository / "tiny-gaussian" / "1" / "model.onnx", tmp_path / "many" / str(version) / "model.onnx")
    at_once = {"REPARAM_WORKERS": "1", "REPARAM_DRAIN_DELAY": "0"}
    with process(tmp_path, until="starting", **at_once) as (running, _):
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=60)
    assert running.returncode == 0
    assert 0 < log.count('"model loaded"') < 999


def test_a_second_signal_hurries(repository: Path) -> None:
    slow = {"model": "trouble", "temperature": SLOW + 50, "n": 30_000}
    with process(repository, REPARAM_DRAIN_DELAY="3600") as (running, url), ThreadPoolExecutor(1) as pool:
        pool.submit(httpx.post, f"{url}/sample", json=slow, timeout=60)
        wait_until(lambda: "reparam_requests_in_flight 2.0" in httpx.get(f"{url}/metrics").text)
        httpx.get(f"{url}/models", headers={"X-Request-ID": "the-last"})
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGTERM)
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=30)
        assert running.returncode == 0
    assert "the-last" in log
    assert "Traceback" not in log


def test_signals_that_interrupt_the_engine_do_not_wait_for_its_lock(serve: Callable[..., Running]) -> None:
    service = serve(drain_delay=3600)
    engine, server = service.service.engine, service.server

    def interrupted() -> None:
        with engine._lock:
            server.handle_exit(signal.SIGINT, None)
            server.handle_exit(signal.SIGTERM, None)

    server.servers[0].get_loop().call_soon_threadsafe(interrupted)
    wait_until(lambda: server.force_exit, 10)


def test_the_log_is_json_and_names_device_and_requests(repository: Path) -> None:
    with process(repository) as (running, url):
        httpx.post(f"{url}/sample", headers={"X-Request-ID": "mine"})
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=60)
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.splitlines()]
    loaded = next(line for line in lines if line["message"] == "model loaded" and line["model"] == "tiny-gumbel")
    assert loaded["provider"].endswith("ExecutionProvider")
    assert loaded["reason"].startswith("REPARAM_DEVICE=auto")
    request = next(line for line in lines if line.get("request_id") == "mine")
    assert (request["path"], request["status"], request["method"]) == ("/sample", 200, "POST")
    assert {"time", "level", "logger", "seconds"} <= request.keys()


def test_the_log_can_be_text(repository: Path) -> None:
    with process(repository, REPARAM_LOG_FORMAT="text") as (running, url):
        httpx.post(f"{url}/sample", headers={"X-Request-ID": "mine"})
        httpx.get(f"{url}/%1b[31m%20status=200")
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=60)
    assert re.search(r"INFO    request method=POST path=/sample status=200 request_id=mine seconds=0\.\d+", log)
    assert r"path='/\x1b[31m status=200' status=404" in log


def test_help_lists_every_setting() -> None:
    process = start("--help")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
    assert "REPARAM_PORT=9000" in text


def test_the_command_line_wins_over_the_environment() -> None:
    assert "--port or REPARAM_PORT='70000'" in refused("--port", "70000", status=2, REPARAM_PORT="1234")


def test_what_only_looks_like_a_setting_is_told(repository: Path) -> None:
    with process(repository, REPARAM_DEFALT_MODEL="x", REPARAM_URL="y") as (running, _):
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=60)
    (warning,) = (json.loads(line) for line in log.splitlines() if "no settings, and ignored" in line)
    assert (warning["level"], warning["names"]) == ("WARNING", ["REPARAM_DEFALT_MODEL"])


def test_compose_hands_every_setting_on() -> None:
    compose = (Path(__file__).parent.parent / "docker-compose.yml").read_text()
    of_the_image = {"host", "port", "artifacts"}
    handed_on = re.findall(r"^      REPARAM_([A-Z0-9_]+):$", compose, re.MULTILINE)
    assert sorted(handed_on) == sorted(name.upper() for name in Settings.model_fields.keys() - of_the_image)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ((), {"REPARAM_PORT": "http"}, "REPARAM_PORT='http': Input should be a valid integer"),
        ((), {"REPARAM_PORT": "tcp://10.0.0.1:80"}, "give the pod `enableServiceLinks: false`"),
        ((), {"REPARAM_DEVICE": "tpu"}, "REPARAM_DEVICE='tpu': Input should be 'auto', 'cpu' or 'cuda'"),
        ((), {"REPARAM_MAX_BATCH_ROWS": "0"}, "REPARAM_MAX_BATCH_ROWS='0'"),
        (("--drain-delay", "inf"), {}, "a finite number"),
        (("--drain-timeout", "2500000"), {}, "less than or equal to 86400"),
        ((), {"REPARAM_API_KEY": "two words"}, "an API key is made of printable ASCII without blanks"),
    ],
)
def test_a_bad_setting_is_named(arguments: tuple[str, ...], environment: dict[str, str], says: str) -> None:
    said = refused(*arguments, status=2, **environment)
    assert says in said
    assert "--help" in said
    assert "two words" not in said


def test_an_unknown_option_is_a_usage_error() -> None:
    process = start("--prot", "1")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--prot" in said


def test_auto_takes_what_works_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert devices.choose(Settings(tf32=True)).reason.startswith("REPARAM_DEVICE=auto")
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    assert devices.choose(Settings()).reason.startswith("REPARAM_DEVICE=auto")
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert devices.choose(Settings(device="cpu")).attempts == (("CPUExecutionProvider",),)


def test_cuda_works_or_the_service_refuses_to_start_and_says_what_is_missing(repository: Path) -> None:
    if devices.choose(Settings()).name == "cuda":
        with process(repository, REPARAM_DEVICE="cuda") as (_, url):
            models = httpx.get(f"{url}/models").json()["models"]
        assert {model["provider"] for model in models} == {"CUDAExecutionProvider"}
    else:
        said = refused(REPARAM_DEVICE="cuda")
        assert re.search(r"REPARAM_DEVICE=cuda, but .*(libcuda|no GPU|no CUDA provider|cannot be loaded)", said)
