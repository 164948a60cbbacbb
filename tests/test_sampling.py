"""Samples through HTTP: the formulas, laws and identities that docs/api.md promises."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from reparam.service.artifact import noise
from tests.conftest import Running, wait_until
from tests.load import NPY, TLS, occupied, rows_of

Arrays = dict[str, npt.NDArray[Any]]
FAR = 2**40

LATENTS = {"tiny-gaussian": ["images", "latents"], "tiny-gumbel": ["images", "codes", "indices"]}


def draw(service: Running, **body: Any) -> Arrays:
    """POST /sample as npz."""
    response = service.post(body, headers={"Accept": "application/x-npz"})
    assert response.status_code == 200, response.text
    with np.load(io.BytesIO(response.content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def draw_one(service: Running, output: str, **body: Any) -> npt.NDArray[Any]:
    """POST /sample as npy."""
    return rows_of(service.post({**body, "outputs": [output]}, headers=NPY))


@pytest.mark.parametrize("start", [0, FAR])
@pytest.mark.parametrize("model", LATENTS)
def test_rows_do_not_depend_on_their_requests(service: Running, model: str, start: int) -> None:
    """64 rows in one request, in 64 requests, and in four at once among other traffic are equal bit for bit."""
    body = {"model": model, "seed": 7, "temperature": 0.7, "outputs": LATENTS[model]}
    whole = draw(service, **body, start=start, n=64)
    ones = [draw(service, **body, start=start + row, n=1) for row in range(64)]
    done = threading.Event()

    def traffic(seed: int) -> None:
        while not done.is_set():
            draw(service, model=model, seed=seed, n=1 + seed % 50, temperature=seed / 10)

    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(traffic, seed) for seed in range(8)]
        try:
            quarters = list(pool.map(lambda lo: draw(service, **body, start=start + lo, n=16), range(0, 64, 16)))
        finally:
            done.set()
        for other in others:
            other.result()
    for name, rows in whole.items():
        assert np.array_equal(rows, np.concatenate([one[name] for one in ones]))
        assert np.array_equal(rows, np.concatenate([quarter[name] for quarter in quarters]))


def test_a_long_response_has_the_rows_of_its_parts(service: Running) -> None:
    whole = draw_one(service, "images", seed=3, n=1000)
    parts = [draw_one(service, "images", seed=3, start=lo, n=100) for lo in range(0, 1000, 100)]
    assert whole.shape == (1000, 1, 8, 8)
    assert np.array_equal(whole, np.concatenate(parts))


def test_another_seed_gives_other_rows(service: Running) -> None:
    assert not np.array_equal(draw_one(service, "latents", seed=1), draw_one(service, "latents", seed=2))


def test_a_fresh_seed_is_named_and_repeats_the_rows(service: Running) -> None:
    body = {"n": 3, "outputs": ["latents"]}
    first, second = service.post(body).json(), service.post(body).json()
    assert first["seed"] != second["seed"]
    assert service.post({**body, "seed": first["seed"]}).json()["latents"] == first["latents"]


def test_gaussian_latents_are_mu_plus_temperature_sigma_eps(service: Running) -> None:
    mu, log_var = [0.5, -1.0, 2.0], [[0.1 * row, -3.0, 1.0] for row in range(32)]
    for temperature in (0.0, 0.3, 1.0, 4.0):
        body = {"n": 32, "seed": 5, "start": 10, "temperature": temperature, "mu": mu, "log_var": log_var}
        eps = noise.normal(noise.words(5, 10, 32, (3,)))
        expected = np.array(mu) + temperature * np.exp(0.5 * np.array(log_var)) * eps
        np.testing.assert_allclose(draw_one(service, "latents", **body), expected, atol=1e-5)


def test_a_gaussian_at_temperature_0_is_its_mean(service: Running) -> None:
    latents = draw_one(service, "latents", n=2, temperature=0, mu=[0.25, -1.5, 3.0])
    assert latents.tolist() == [[0.25, -1.5, 3.0]] * 2


def test_log_var_defaults_to_that_of_the_prior(service: Running) -> None:
    shifted = draw_one(service, "latents", n=4, seed=1, mu=[10, 10, 10])
    np.testing.assert_allclose(shifted, draw_one(service, "latents", n=4, seed=1) + 10, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_relaxed_codes_equal_those_that_torch_computes_from_the_same_noise(
    service: Running, temperature: float
) -> None:
    logits = np.linspace(-2, 2, 20, dtype=np.float32).reshape(4, 5)
    body = {"model": "tiny-gumbel", "n": 16, "seed": 11, "temperature": temperature, "logits": logits.tolist()}
    g = torch.from_numpy(noise.gumbel(noise.words(11, 0, 16, (4, 5))))
    expected = torch.softmax((torch.from_numpy(logits) + g) / temperature, -1)
    np.testing.assert_allclose(draw_one(service, "codes", **body), expected.numpy(), atol=1e-6)


def test_hard_codes_follow_softmax_of_the_logits(service: Running) -> None:
    """Chi-square on a million draws: 250000 rows of 4 variables."""
    logits = np.log(
        [[0.5, 0.3, 0.15, 0.04, 0.01], [0.2] * 5, [0.96, 0.01, 0.01, 0.01, 0.01], [1e-3, 0.1, 0.2, 0.3, 0.399]]
    )
    indices = draw_one(service, "indices", model="tiny-gumbel", n=250_000, seed=1, logits=logits.tolist())
    assert indices.shape == (250_000, 4)
    for variable in range(4):
        counts = np.bincount(indices[:, variable], minlength=5)
        probabilities = np.exp(logits[variable]) / np.exp(logits[variable]).sum()
        assert stats.chisquare(counts, probabilities * counts.sum()).pvalue > 0.001


def test_hard_codes_at_any_temperature_are_the_codes_of_temperature_0(service: Running) -> None:
    body = {"model": "tiny-gumbel", "n": 64, "seed": 4}
    limit = draw_one(service, "codes", **body, temperature=0)
    assert set(np.unique(limit)) == {0.0, 1.0}
    assert (limit.sum(-1) == 1).all()
    for temperature in (0.1, 1.0, 50.0):
        assert np.array_equal(draw_one(service, "codes", **body, temperature=temperature, hard=True), limit)
    assert np.array_equal(draw_one(service, "codes", **body), limit)
    relaxed = draw_one(service, "codes", **body, temperature=0.5)
    assert np.array_equal(relaxed.argmax(-1), limit.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-30, 1e30])
def test_extreme_temperatures_relax_to_finite_codes(service: Running, temperature: float) -> None:
    codes = draw_one(service, "codes", model="tiny-gumbel", n=8, temperature=temperature)
    np.testing.assert_allclose(codes.sum(-1), 1, atol=1e-5)


def test_large_logits_leave_the_noise_its_digits(service: Running) -> None:
    small = draw_one(service, "indices", model="tiny-gumbel", n=500, seed=2, logits=[[0.0] * 5] * 4)
    large = draw_one(service, "indices", model="tiny-gumbel", n=500, seed=2, logits=[[1e9] * 5] * 4)
    assert np.array_equal(small, large)


def test_parameters_may_differ_from_row_to_row(service: Running) -> None:
    mu = [[float(row), 0.0, 0.0] for row in range(100)]
    latents = draw_one(service, "latents", n=100, temperature=0, mu=mu)
    assert latents.tolist() == mu


def test_images_are_decoded_from_the_returned_latents(service: Running) -> None:
    """Drawing the returned latents again as means gives the same images."""
    drawn = draw(service, n=5, seed=8, outputs=["images", "latents"])
    again = draw_one(service, "images", n=5, temperature=0, mu=drawn["latents"].tolist())
    assert np.array_equal(drawn["images"], again)


def test_requests_in_one_batch_keep_their_own_temperature(service: Running) -> None:
    alone = [draw_one(service, "latents", n=3, seed=6, temperature=t / 4) for t in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda t: draw_one(service, "latents", n=3, seed=6, temperature=t / 4), range(16)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_models_that_wait_together_do_not_mix(engine: Running) -> None:
    """Each batch takes rows of one model, as many as fit."""
    bodies = [
        {"model": model, "seed": 3, "n": n, "outputs": ["images"]}
        for n in (1, 40, 64, 30)
        for model in ("tiny-gaussian", "tiny-gumbel")
    ]
    alone = [draw(engine, **body)["images"] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        with occupied(engine):
            together = [pool.submit(draw, engine, **body) for body in bodies]
            wait_until(lambda: engine.lifespan.engine.queued_rows == 2 * (1 + 40 + 64 + 30))
        assert all(
            np.array_equal(rows, future.result()["images"]) for rows, future in zip(alone, together, strict=True)
        )


def test_a_second_server_returns_the_same_rows(service: Running, serve: Callable[..., Running]) -> None:
    replica = serve(max_batch_rows=7)
    assert np.array_equal(draw_one(service, "images", seed=9, n=50), draw_one(replica, "images", seed=9, n=50))


def test_content_length_is_the_length_of_the_stream(service: Running) -> None:
    with httpx.stream(
        "POST", f"{service.url}/sample", json={"n": 500}, headers=NPY, timeout=60, verify=TLS
    ) as response:
        length = len(b"".join(response.iter_raw()))
    assert int(response.headers["Content-Length"]) == length == 128 + 500 * 64
