"""Devices without memory: batches become smaller, and grow again later."""

import time
from pathlib import Path

import numpy as np
import pytest

from reparam.service.artifact.file import load
from reparam.service.runtime.sampler import bind_sampler
from tests.conftest import Running, metric, wait_until
from tests.graphs import GREEDY, MODEST
from tests.load import NPY, rows_of

RECOVERY = "reparam.service.engine.engine.RECOVERY"


def batch_limit(service: Running, model: str) -> int:
    """Read how many rows a batch of the model may have now."""
    graph = service.lifespan.repository.find(model, None).sampler
    return service.lifespan.engine._queue.limits[graph]


def run_out_of_memory(service: Running, rows: int) -> None:
    """Tell the engine that the device had no memory for so many rows of tiny-gaussian."""
    graph = service.lifespan.repository.find("tiny-gaussian", None).sampler
    service.lifespan.engine._thread_out_of_memory(graph, rows)


def test_a_model_is_warmed_up_as_far_as_there_is_memory(repository: Path) -> None:
    graph = bind_sampler(load(repository / "trouble" / "1" / "model.onnx"), max_rows=64)
    graph.arrays["temperature"][:] = GREEDY
    assert graph.warm_up(seconds=60) == MODEST


def test_a_device_without_memory_gets_smaller_batches(engine: Running) -> None:
    """At temperature GREEDY more than MODEST rows of the trouble model need more memory than there is."""
    expected = rows_of(engine.post({"model": "trouble", "seed": 3, "n": 50, "temperature": 1.0}, headers=NPY))
    response = engine.post({"model": "trouble", "seed": 3, "n": 50, "temperature": GREEDY, "outputs": ["latents"]})
    assert response.status_code == 200
    assert len(response.json()["latents"]) == 50
    assert metric(engine.url, "out_of_memory_total") >= 1
    assert batch_limit(engine, "trouble") <= MODEST
    again = rows_of(engine.post({"model": "trouble", "seed": 3, "n": 50, "temperature": 1.0}, headers=NPY))
    assert np.array_equal(again, expected)


def test_a_lone_request_with_more_rows_than_a_batch_may_have_is_answered(engine: Running) -> None:
    """While memory suffices, the event loop runs such a request itself."""
    expected = rows_of(engine.post({"seed": 3, "n": 2}, headers=NPY))
    run_out_of_memory(engine, 2)
    for _ in range(3):
        assert np.array_equal(rows_of(engine.post({"seed": 3, "n": 2}, headers=NPY)), expected)


def test_batches_grow_again_after_a_while(engine: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RECOVERY, 2.0)
    before = batch_limit(engine, "tiny-gaussian")
    for rows in (64, 2):
        run_out_of_memory(engine, rows)
    assert batch_limit(engine, "tiny-gaussian") == 1 < before
    wait_until(lambda: batch_limit(engine, "tiny-gaussian") == before)


def test_one_recovery_follows_many_failures(engine: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery for each failure would bring new failures."""
    monkeypatch.setattr(RECOVERY, 0.5)
    before = batch_limit(engine, "tiny-gaussian")
    run_out_of_memory(engine, 64)
    time.sleep(0.3)  # a second recovery would come this much after the first
    run_out_of_memory(engine, 2)
    wait_until(lambda: batch_limit(engine, "tiny-gaussian") == before)
    monkeypatch.setattr(RECOVERY, 60.0)
    run_out_of_memory(engine, 2)
    time.sleep(0.5)  # a second recovery would have come by now
    assert batch_limit(engine, "tiny-gaussian") == 1
