"""Faults, each through a real server: nobody else's request fails or changes by one bit, counters are right, memory
returns, and the engine goes on."""

import asyncio
import contextlib
import io
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from reparam.service.artifact import noise
from reparam.service.artifact.file import load
from reparam.service.runtime.sampler import bind_sampler
from tests.conftest import TINY, Running, metric, wait_until
from tests.graphs import FAILS, GREEDY, MODEST, NAN, SLOW
from tests.raw import answer, connect, leave_by_reset, request

NPY = {"Accept": "application/x-npy"}


def rows_of(response: httpx.Response) -> npt.NDArray[Any]:
    assert response.status_code == 200, response.text
    rows: npt.NDArray[Any] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return rows


@contextlib.contextmanager
def bystanders(service: Running, clients: int = 3) -> Iterator[None]:
    """Clients who sample the same rows again and again meanwhile, and notice whatever is different."""
    body = {"model": "tiny-gaussian", "seed": 5, "n": 3}
    expected = service.post(body, headers=NPY).content
    done = threading.Event()

    def sample() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                response = client.post(f"{service.url}/sample", json=body, headers=NPY)
                assert (response.status_code, response.content) == (200, expected)

    with ThreadPoolExecutor(clients) as pool:
        sampling = [pool.submit(sample) for _ in range(clients)]
        try:
            yield
        finally:
            done.set()
        for future in sampling:
            future.result()


def at_rest(service: Running) -> bool:
    engine = service.lifespan.engine
    return not (engine.jobs or engine.queued_rows or engine.admission.reserved_bytes or engine.busy)


def trouble_runs(service: Running) -> bool:
    jobs = list(service.lifespan.engine.jobs)
    return any(job.work.graph.model == "trouble" for job in jobs if job.stage == "infer")


@pytest.fixture
def runners() -> int:
    """With one, what runs makes all others wait."""
    return 1


@pytest.fixture
def engine(serve: Callable[..., Running], runners: int) -> Iterator[Running]:
    """A server of its own, which must be at rest in the end and go on."""
    service = serve(runners=runners)
    yield service
    wait_until(lambda: at_rest(service))
    assert service.get("/livez").status_code == 200
    assert service.post({}).status_code == 200


def test_a_client_that_leaves_before_its_batch(engine: Running) -> None:
    with bystanders(engine), ThreadPoolExecutor(1) as pool:
        slow = pool.submit(engine.post, {"model": "trouble", "temperature": SLOW + 100})
        wait_until(lambda: trouble_runs(engine))
        with connect(engine) as hasty:
            hasty.sendall(request({"n": 500}))
            wait_until(lambda: engine.lifespan.engine.queued_rows >= 500)
        wait_until(lambda: engine.lifespan.engine.queued_rows < 500)
        assert not slow.done()
        assert slow.result().status_code == 200
    assert metric(engine.url, "cancelled_total", stage="queue") == 1


def test_a_client_whose_body_came_slowly_and_that_leaves_before_its_batch(engine: Running) -> None:
    with bystanders(engine), ThreadPoolExecutor(1) as pool:
        slow = pool.submit(engine.post, {"model": "trouble", "temperature": SLOW + 600})
        wait_until(lambda: trouble_runs(engine))
        with connect(engine) as hasty:
            content = request({"n": 500})
            hasty.sendall(content[:-5])
            time.sleep(0.5)
            hasty.sendall(content[-5:])
            wait_until(lambda: engine.lifespan.engine.queued_rows >= 500)
        wait_until(lambda: engine.lifespan.engine.queued_rows < 500)
        assert not slow.done()
        assert slow.result().status_code == 200
    assert metric(engine.url, "cancelled_total", stage="queue") == 1


def test_a_client_that_leaves_during_its_batch(engine: Running) -> None:
    with bystanders(engine):
        with connect(engine) as hasty:
            hasty.sendall(request({"model": "trouble", "temperature": SLOW + 100}))
            wait_until(lambda: trouble_runs(engine))
        wait_until(lambda: metric(engine.url, "cancelled_total", stage="infer") == 1)


def test_a_client_that_leaves_after_its_batch(engine: Running) -> None:
    with bystanders(engine):
        with connect(engine, receive_buffer=4096) as hasty:
            hasty.sendall(request({"n": 1_000_000}))
            hasty.recv(1000)
        wait_until(lambda: metric(engine.url, "requests_total", path="/sample", status="499"))
    assert metric(engine.url, "requests_total", path="/sample", status="499") == 1
    assert sum(metric(engine.url, "cancelled_total", stage=stage) for stage in ("queue", "infer", "send")) == 1


def test_a_thousand_clients_that_leave_together(engine: Running) -> None:
    with bystanders(engine), contextlib.ExitStack() as crowd:
        for _ in range(1000):
            connection = crowd.enter_context(connect(engine))
            leave_by_reset(connection)
            connection.sendall(request({"model": "trouble", "temperature": SLOW + 400, "n": 10}))
        wait_until(lambda: len(engine.lifespan.engine.jobs) == 1000 + 3)  # and the bystanders, while the first run
        crowd.close()
        wait_until(lambda: not engine.lifespan.engine.queued_rows)
    wait_until(lambda: at_rest(engine))
    left = sum(metric(engine.url, "cancelled_total", stage=stage) for stage in ("queue", "infer", "send"))
    answered = metric(engine.url, "requests_total", path="/sample", status="499")
    assert left == answered == 1000


def test_a_client_that_reads_slowly_holds_back_the_computing(engine: Running) -> None:
    with bystanders(engine), connect(engine, receive_buffer=4096) as slow:
        slow.sendall(request({"n": 1_000_000}))
        for _ in range(5):
            slow.recv(200)  # 1 KB a second
            time.sleep(0.2)
        lifespan = engine.lifespan
        computed = metric(engine.url, "rows_total", model="tiny-gaussian", version="1")
        window = lifespan.engine.window(lifespan.repository.find("tiny-gaussian", None).sampler)
        taken = max(job.ticket.taken for job in lifespan.engine.jobs if job.ticket)
        assert taken < 3 * window + 4 * 2**20 / 64  # and what the sockets hold
        assert computed < 500_000
        assert metric(engine.url, "held_bytes") > 0


def test_a_stream_that_has_begun_may_take_longer_than_a_request(serve: Callable[..., Running]) -> None:
    service = serve(request_timeout=0.5)
    with connect(service, receive_buffer=4096) as slow:
        slow.sendall(request({"n": 200_000, "seed": 6}))
        slow.recv(1, socket.MSG_PEEK)
        time.sleep(1)
        status, content = answer(slow)
    assert (status, np.load(io.BytesIO(content)).shape) == (200, (200_000, 1, 8, 8))


def test_a_body_of_one_byte_a_second_runs_into_its_deadline(engine: Running) -> None:
    with bystanders(engine), connect(engine) as slow:
        head, body = request({"n": 2}, Request_Timeout="0.4").split(b"\r\n\r\n")
        slow.sendall(head + b"\r\n\r\n")
        for byte in body:
            slow.sendall(bytes([byte]))
            time.sleep(0.15)
            if metric(engine.url, "expired_total", stage="body"):
                break
        assert b"HTTP/1.1 504" in slow.recv(1000)
    assert metric(engine.url, "expired_total", stage="body") == 1


def test_a_deadline_shorter_than_one_batch(engine: Running) -> None:
    with bystanders(engine):
        body = {"model": "trouble", "temperature": SLOW + 60}
        response = engine.post(body, headers={"Request-Timeout": "0.05"})
        assert (response.status_code, response.json()["stage"]) == (504, "infer")
    assert metric(engine.url, "expired_total", stage="infer") == 1


def test_a_model_that_raises_answers_nan_or_sleeps_beside_others(engine: Running) -> None:
    with bystanders(engine), ThreadPoolExecutor(12) as pool:
        asked = [
            (temperature, pool.submit(engine.post, {"model": "trouble", "temperature": temperature, "seed": 1}))
            for temperature in (FAILS, NAN, SLOW + 5, 1.0) * 3
        ]
        statuses = {temperature: future.result().status_code for temperature, future in asked}
    assert statuses == {FAILS: 500, NAN: 422, SLOW + 5: 200, 1.0: 200}


def test_a_poisonous_row_fails_alone_in_a_full_batch(engine: Running) -> None:
    """And in no more runs than halving takes."""
    with ThreadPoolExecutor(40) as pool:
        slow = pool.submit(engine.post, {"model": "trouble", "temperature": SLOW + 100})
        wait_until(lambda: engine.lifespan.engine.busy)
        temperatures = [FAILS if index == 17 else 1.0 for index in range(32)]
        asked = [pool.submit(engine.post, {"model": "trouble", "temperature": t, "seed": 2}) for t in temperatures]
        wait_until(lambda: engine.lifespan.engine.queued_rows == 32)
        assert [future.result().status_code for future in asked] == [500 if t == FAILS else 200 for t in temperatures]
        images = {future.result().json()["images"][0] for future in asked if future.result().status_code == 200}
        assert len(images) == 1
        assert slow.result().status_code == 200


def test_a_model_is_warmed_up_as_far_as_there_is_memory(repository: Path) -> None:
    graph = bind_sampler(load(repository / "trouble" / "1" / "model.onnx"), max_rows=64)
    graph.arrays["temperature"][:] = GREEDY
    assert graph.warm_up(seconds=60) == MODEST


def test_a_device_without_memory_gets_smaller_batches(engine: Running) -> None:
    """The trouble model needs more memory than there is for more than a few rows at temperature GREEDY."""
    expected = rows_of(engine.post({"model": "trouble", "seed": 3, "n": 50, "temperature": 1.0}, headers=NPY))
    response = engine.post({"model": "trouble", "seed": 3, "n": 50, "temperature": GREEDY, "outputs": ["latents"]})
    assert response.status_code == 200
    assert len(response.json()["latents"]) == 50
    assert metric(engine.url, "out_of_memory_total") >= 1
    graph = engine.lifespan.repository.find("trouble", None).sampler
    assert engine.lifespan.engine._queue.limits[graph] <= MODEST
    again = rows_of(engine.post({"model": "trouble", "seed": 3, "n": 50, "temperature": 1.0}, headers=NPY))
    assert np.array_equal(again, expected)


def test_rows_are_answered_when_a_batch_has_room_for_fewer(engine: Running) -> None:
    """Of a lone request for a few rows, which does not wait for a runner while memory suffices."""
    graph = engine.lifespan.repository.find("tiny-gaussian", None).sampler
    expected = rows_of(engine.post({"seed": 3, "n": 2}, headers=NPY))
    engine.lifespan.engine._thread_out_of_memory(graph, 2)
    for _ in range(3):
        assert np.array_equal(rows_of(engine.post({"seed": 3, "n": 2}, headers=NPY)), expected)


def test_batches_grow_again_when_there_may_be_memory_again(engine: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparam.service.engine.engine.RECOVERY", 0.5)
    graph = engine.lifespan.repository.find("tiny-gaussian", None).sampler
    limits = engine.lifespan.engine._queue.limits
    before = limits[graph]
    for rows in (64, 2):
        engine.lifespan.engine._thread_out_of_memory(graph, rows)
    assert limits[graph] == 1 < before
    wait_until(lambda: limits[graph] == before)


def test_one_recovery_follows_many_failures(engine: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would bring new failures."""
    monkeypatch.setattr("reparam.service.engine.engine.RECOVERY", 0.5)
    graph = engine.lifespan.repository.find("tiny-gaussian", None).sampler
    limits = engine.lifespan.engine._queue.limits
    before = limits[graph]
    engine.lifespan.engine._thread_out_of_memory(graph, 64)
    time.sleep(0.3)  # a recovery from the next failure would come so much after that from the first
    engine.lifespan.engine._thread_out_of_memory(graph, 2)
    wait_until(lambda: limits[graph] == before)
    monkeypatch.setattr("reparam.service.engine.engine.RECOVERY", 60.0)
    engine.lifespan.engine._thread_out_of_memory(graph, 2)
    time.sleep(0.5)  # until it would have come
    assert limits[graph] == 1


@pytest.mark.parametrize("runners", [1, 2])
def test_a_burst_of_ten_thousand_tiny_requests(engine: Running) -> None:
    expected = engine.post({"seed": 1}, headers=NPY).content

    async def client(host: str, port: str) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        good = 0
        for _ in range(50):
            writer.write(request({"seed": 1}))
            head = await reader.readuntil(b"\r\n\r\n")
            good += head.startswith(b"HTTP/1.1 200") and await reader.readexactly(len(expected)) == expected
        writer.close()
        return good

    async def burst() -> int:
        host, port = engine.url.removeprefix("http://").split(":")
        return sum(await asyncio.gather(*(client(host, port) for _ in range(200))))

    assert asyncio.run(burst()) == 10_000
    assert metric(engine.url, "requests_total", path="/sample", status="200") == 10_001
    assert metric(engine.url, "rows_total", model="tiny-gaussian", version="1") == 10_001


@pytest.mark.parametrize("n", [63, 64, 65, 1023, 1024, 1025])
def test_a_request_exactly_as_large_as_a_batch(engine: Running, n: int) -> None:
    with bystanders(engine, 1):
        whole = rows_of(engine.post({"seed": 8, "n": n}, headers=NPY))
    halves = [
        rows_of(engine.post({"seed": 8, "start": lo, "n": hi - lo}, headers=NPY))
        for lo, hi in ((0, n // 2), (n // 2, n))
    ]
    assert np.array_equal(whole, np.concatenate(halves))


@pytest.mark.parametrize("runners", [1, 2])
def test_a_giant_request_beside_tiny_ones(engine: Running) -> None:
    with bystanders(engine), connect(engine) as giant:
        giant.sendall(request({"n": 200_000, "seed": 6}))
        _, content = answer(giant)
        whole = np.load(io.BytesIO(content), allow_pickle=False)
        assert whole.shape == (200_000, 1, 8, 8)
    for start in (0, 99_999, 199_000):
        part = rows_of(engine.post({"n": 1000, "seed": 6, "start": start}, headers=NPY))
        assert np.array_equal(whole[start : start + 1000], part)


def test_answers_are_bounded_in_bytes(serve: Callable[..., Running]) -> None:
    service = serve(max_held_bytes=100_000)
    with connect(service, receive_buffer=4096) as slow:
        slow.sendall(request({"n": 1_000_000}))
        slow.recv(1000)
        refused = service.post({"n": 100}, headers=NPY)
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/queue-full")
        assert "the limit is 100000" in refused.json()["detail"]
        assert metric(service.url, "rejected_total", reason="bytes") == 1
    wait_until(lambda: at_rest(service))
    assert service.post({"n": 100}, headers=NPY).status_code == 200


def test_metrics_tell_what_the_engine_does(engine: Running) -> None:
    assert rows_of(engine.post({"n": 3000}, headers=NPY)).shape[0] == 3000
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(engine.post, {"model": "trouble", "temperature": SLOW + 50})
        wait_until(lambda: engine.lifespan.engine.busy)
        assert metric(engine.url, "queue_oldest_seconds") == 0  # what runs does not wait
        waiting = connect(engine)
        waiting.sendall(request({"n": 7}))
        wait_until(lambda: metric(engine.url, "queue_rows") == 7)
        assert metric(engine.url, "queue_oldest_seconds") > 0
        assert metric(engine.url, "held_bytes") > 0
        assert slow.result().status_code == 200
        assert waiting.recv(100).startswith(b"HTTP/1.1 200")
        waiting.close()
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
    """Rows computed one by one, past the engine."""

    def __init__(self, repository: Path) -> None:
        self.artifacts = {name: load(repository / name / "1" / "model.onnx") for name in TINY}

    def row(self, model: str, seed: int, row: int, temperature: float) -> npt.NDArray[np.uint8]:
        artifact = self.artifacts[model]
        words = noise.words(seed, row, 1, artifact.contract.latent_shape)
        pixels: npt.NDArray[np.uint8] = artifact.run(artifact.contract.feeds(words, temperature))["pixels"][0]
        return pixels


def ask_at_random(engine: Running, oracle: Oracle, chance: random.Random) -> int:
    """For few rows or many; and leave at once, or midway, or have no time. Returns how many rows were compared."""
    body: dict[str, Any] = {
        "model": chance.choice(list(oracle.artifacts)),
        "n": chance.choice([1, 1, 2, 5, 63, 64, 65, 200, 3000]),
        "seed": chance.randrange(5),
        "start": chance.randrange(1000),
        "temperature": chance.choice([0.0, 0.5, 1.0]),
    }
    fate = chance.choice(["stay", "stay", "stay", "leave", "midway", "expire"])
    with connect(engine) as connection:
        timeout = {"Request_Timeout": "0.002"} if fate == "expire" else {}
        connection.sendall(request(body, **timeout))
        if fate == "leave":
            return 0
        if fate == "midway":
            connection.recv(chance.randrange(1, 5000))
            return 0
        status, content = answer(connection)
    if status == 504:
        assert fate == "expire", content
        return 0
    assert status == 200, content
    rows, n = np.load(io.BytesIO(content), allow_pickle=False), body["n"]
    compared = {0, n - 1, *chance.sample(range(n), min(n, 5))}
    for index in compared:
        expected = oracle.row(body["model"], body["seed"], body["start"] + index, body["temperature"])
        assert np.array_equal(rows[index], expected), (body, index)
    return len(compared)


@pytest.mark.parametrize(("seed", "runners"), [(1, 1), (2, 2), (3, 3)])
def test_rows_are_those_computed_alone_while_others_leave_expire_and_are_cut(
    engine: Running, repository: Path, seed: int
) -> None:
    """Eight clients at random."""
    oracle = Oracle(repository)

    def client(number: int) -> int:
        chance = random.Random(seed * 100 + number)
        return sum(ask_at_random(engine, oracle, chance) for _ in range(25))

    done = threading.Event()

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
