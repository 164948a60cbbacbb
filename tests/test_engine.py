"""The engine through a real server: rows and counters are right in every batch, beside any other requests."""

import asyncio
import gc
import io
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from reparam.service.artifact import noise
from reparam.service.artifact.file import load
from tests.conftest import TINY, Running, metric, wait_until
from tests.graphs import FAILS, NAN, SLOW
from tests.load import NPY, bystanders, occupied, rows_of
from tests.raw import HEAD_END, connect, next_response, read_response, request


def test_a_model_that_fails_returns_nan_or_is_slow_does_not_affect_others(engine: Running) -> None:
    with bystanders(engine), ThreadPoolExecutor(12) as pool:
        responses = [
            (temperature, pool.submit(engine.post, {"model": "trouble", "temperature": temperature, "seed": 1}))
            for temperature in (FAILS, NAN, SLOW + 5, 1.0) * 3
        ]
        statuses = [(temperature, future.result().status_code) for temperature, future in responses]
    assert statuses == [(FAILS, 500), (NAN, 422), (SLOW + 5, 200), (1.0, 200)] * 3


def test_a_row_that_fails_in_a_full_batch_fails_alone(engine: Running) -> None:
    temperatures = [FAILS if index == 17 else 1.0 for index in range(32)]
    with ThreadPoolExecutor(32) as pool:
        with occupied(engine):
            futures = [
                pool.submit(engine.post, {"model": "trouble", "temperature": t, "seed": 2}) for t in temperatures
            ]
            wait_until(lambda: engine.lifespan.engine.queued_rows == 32)
        responses = [future.result() for future in futures]
    assert [response.status_code for response in responses] == [500 if t == FAILS else 200 for t in temperatures]
    assert len({response.json()["images"][0] for response in responses if response.status_code == 200}) == 1


def test_a_request_leaves_no_garbage_to_collect(engine: Running) -> None:
    """Garbage is collected while all requests wait, for tens of milliseconds."""
    count, message = 200, request({"seed": 1})
    with connect(engine) as connection, connection.makefile("rb") as stream:
        gc.collect()
        gc.disable()
        try:
            for _ in range(count):
                connection.sendall(message)
                assert next_response(stream)[0] == 200
            assert gc.collect() < count
        finally:
            gc.enable()


@pytest.mark.parametrize("engine", [1, 2], indirect=True)
def test_every_request_of_a_burst_is_answered_and_counted(engine: Running) -> None:
    connections, each = 60, 25
    expected = engine.post({"seed": 1}, headers=NPY).content

    async def client(host: str, port: str) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        good = 0
        for _ in range(each):
            writer.write(request({"seed": 1}))
            head = await reader.readuntil(HEAD_END)
            good += head.startswith(b"HTTP/1.1 200") and await reader.readexactly(len(expected)) == expected
        writer.close()
        return good

    async def burst() -> int:
        host, port = engine.url.removeprefix("http://").split(":")
        return sum(await asyncio.gather(*(client(host, port) for _ in range(connections))))

    assert asyncio.run(burst()) == connections * each
    assert metric(engine.url, "requests_total", path="/sample", status="200") == connections * each + 1
    assert metric(engine.url, "rows_total", model="tiny-gaussian", version="1") == connections * each + 1


def test_requests_about_as_large_as_a_batch_get_the_rows_of_their_halves(engine: Running) -> None:
    batch = engine.lifespan.repository.find("tiny-gaussian", None).sampler.batch_rows
    for n in (63, 64, 65, batch - 1, batch, batch + 1):
        with bystanders(engine, 1):
            whole = rows_of(engine.post({"seed": 8, "n": n}, headers=NPY))
        halves = [
            rows_of(engine.post({"seed": 8, "start": lo, "n": hi - lo}, headers=NPY))
            for lo, hi in ((0, n // 2), (n // 2, n))
        ]
        assert np.array_equal(whole, np.concatenate(halves)), n


@pytest.mark.parametrize("engine", [1, 2], indirect=True)
def test_a_long_stream_beside_single_rows_has_the_rows_of_its_parts(engine: Running) -> None:
    n = 50_000
    with bystanders(engine):
        whole = rows_of(engine.post({"n": n, "seed": 6}, headers=NPY))
    assert whole.shape == (n, 1, 8, 8)
    for start in (0, n // 2 - 1, n - 1000):
        part = rows_of(engine.post({"n": 1000, "seed": 6, "start": start}, headers=NPY))
        assert np.array_equal(whole[start : start + 1000], part)


def test_metrics_count_rows_batches_and_waiting(engine: Running) -> None:
    assert len(rows_of(engine.post({"n": 3000}, headers=NPY))) == 3000
    with connect(engine) as waiting:
        with occupied(engine):
            assert metric(engine.url, "queue_oldest_seconds") == 0  # rows that run do not wait
            waiting.sendall(request({"n": 7}))
            wait_until(lambda: metric(engine.url, "queue_rows") == 7)
            assert metric(engine.url, "queue_oldest_seconds") > 0
            assert metric(engine.url, "held_bytes") > 0
        assert read_response(waiting)[0] == 200
    tiny = {"model": "tiny-gaussian", "version": "1"}
    assert metric(engine.url, "batches_total", closed="full", **tiny) >= 1
    assert metric(engine.url, "batches_total", closed="drained", **tiny) >= 1
    assert metric(engine.url, "rows_total", **tiny) == 3007
    assert metric(engine.url, "batch_rows_sum", **tiny) == 3007
    assert metric(engine.url, "batch_rows_count", **tiny) == sum(
        metric(engine.url, "batches_total", closed=closed, **tiny) for closed in ("full", "drained")
    )
    assert metric(engine.url, "queue_duration_seconds_sum", **tiny) > 0


class Oracle:
    """Computes rows one by one, without the engine."""

    def __init__(self, repository: Path) -> None:
        self.artifacts = {name: load(repository / name / "1" / "model.onnx") for name in TINY}

    def row(self, model: str, seed: int, row: int, temperature: float) -> npt.NDArray[np.uint8]:
        artifact = self.artifacts[model]
        words = noise.words(seed, row, 1, artifact.contract.latent_shape)
        pixels: npt.NDArray[np.uint8] = artifact.run(artifact.contract.feeds(words, temperature))["pixels"][0]
        return pixels


def sample_at_random(engine: Running, oracle: Oracle, chance: random.Random) -> int:
    """Sample few rows or many; disconnect at once, or midway, or have no time. Returns the number of rows compared."""
    body: dict[str, Any] = {
        "model": chance.choice(list(oracle.artifacts)),
        "n": chance.choice([1, 1, 2, 5, 63, 64, 65, 200, 3000]),
        "seed": chance.randrange(5),
        "start": chance.randrange(1000),
        "temperature": chance.choice([0.0, 0.5, 1.0]),
    }
    fate = chance.choice(["stay", "stay", "stay", "disconnect", "midway", "expire"])
    with connect(engine) as connection:
        timeout = {"Request_Timeout": "0.002"} if fate == "expire" else {}
        connection.sendall(request(body, **timeout))
        if fate == "disconnect":
            return 0
        if fate == "midway":
            connection.recv(chance.randrange(1, 5000))
            return 0
        status, content = read_response(connection)
    if status == 504:
        assert fate == "expire", content
        return 0
    assert status == 200, content
    return compare(oracle, body, content, chance)


def compare(oracle: Oracle, body: dict[str, Any], content: bytes, chance: random.Random) -> int:
    """Compare some rows of a response with those of the oracle. Returns how many."""
    rows, n = np.load(io.BytesIO(content), allow_pickle=False), body["n"]
    assert len(rows) == n
    compared = {0, n - 1, *chance.sample(range(n), min(n, 5))}
    for index in compared:
        expected = oracle.row(body["model"], body["seed"], body["start"] + index, body["temperature"])
        assert np.array_equal(rows[index], expected), (body, index)
    return len(compared)


@pytest.mark.parametrize(("seed", "engine"), [(1, 1), (2, 2), (3, 3)], indirect=["engine"])
def test_rows_are_those_computed_alone_while_others_disconnect_and_expire(
    engine: Running, repository: Path, seed: int
) -> None:
    oracle, done = Oracle(repository), threading.Event()

    def client(number: int) -> int:
        chance = random.Random(seed * 100 + number)
        return sum(sample_at_random(engine, oracle, chance) for _ in range(25))

    def hinder() -> None:
        while not done.is_set():
            assert engine.post({"model": "trouble", "temperature": SLOW + 3}).status_code == 200

    with ThreadPoolExecutor(9) as pool:
        hindering = pool.submit(hinder)
        clients = [pool.submit(client, number) for number in range(8)]
        try:
            assert sum(future.result() for future in clients) > 200
        finally:
            done.set()
        hindering.result()


def test_signals_do_not_wait_for_the_lock_of_the_engine(serve: Callable[..., Running]) -> None:
    """A signal may interrupt the thread that holds the lock."""
    service = serve(drain_delay=3600)
    engine, server = service.lifespan.engine, service.server

    def interrupt() -> None:
        with engine._queue._lock:
            server.handle_exit(signal.SIGINT, None)
            server.handle_exit(signal.SIGTERM, None)

    server.servers[0].get_loop().call_soon_threadsafe(interrupt)
    wait_until(lambda: server.force_exit)
