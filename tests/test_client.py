"""The clients against the real service."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import reparam
from reparam import Client
from reparam._errors import CLASSES
from reparam.service.errors import PROBLEMS
from tests.clients import Connect, both
from tests.conftest import Running
from tests.graphs import FAILS
from tests.peer import MODEL, Peer, as_json


@both
def test_samples_are_pixels_with_their_origin(connect: Connect, service: Running) -> None:
    with connect(service.url) as client:
        samples = client.sample(3, start=4)
    assert samples.images is not None
    assert (samples.images.dtype.name, samples.images.shape) == ("uint8", (3, 1, 8, 8))
    assert (samples.model, samples.version, samples.start, samples.noise_version) == ("tiny-gaussian", 1, 4, 1)
    assert (samples.n, len(samples), samples.latents) == (3, 3, None)


@both
def test_seed_and_start_name_the_same_rows_in_every_call(connect: Connect, service: Running) -> None:
    with connect(service.url) as client:
        whole = client.sample(200, seed=7).outputs["images"]
        part = client.sample(50, seed=7, start=100).outputs["images"]
        streamed = [batch.outputs["images"] for batch in client.iter_samples(200, seed=7)]
    np.testing.assert_array_equal(part, whole[100:150])
    np.testing.assert_array_equal(np.concatenate(streamed), whole)


@both
def test_a_fresh_seed_reproduces_its_rows(connect: Connect, service: Running) -> None:
    with connect(service.url) as client:
        first = client.sample(2, outputs="latents")
        again = client.sample(2, outputs="latents", seed=first.seed)
    np.testing.assert_array_equal(first.outputs["latents"], again.outputs["latents"])


@both
def test_several_outputs_belong_to_the_same_rows(connect: Connect, service: Running) -> None:
    with connect(service.url) as client:
        samples = client.sample(5, model="tiny-gumbel", seed=1, outputs=("images", "codes", "indices"))
        images = client.sample(5, model="tiny-gumbel", seed=1).outputs["images"]
    assert samples.codes is not None
    assert samples.indices is not None
    assert (samples.codes.dtype.name, samples.codes.shape) == ("float32", (5, 4, 5))
    assert (samples.indices.dtype.name, samples.indices.shape) == ("int32", (5, 4))
    np.testing.assert_array_equal(samples.codes.argmax(-1), samples.indices)
    np.testing.assert_array_equal(samples.outputs["images"], images)


@both
def test_at_temperature_zero_the_latents_are_the_means_given(connect: Connect, service: Running) -> None:
    means = np.arange(12, dtype=np.float32).reshape(4, 3)
    with connect(service.url) as client:
        each = client.sample(4, temperature=0, mu=means, outputs="latents")
        shared = client.sample(2, temperature=0, mu=[1, 2, 3], log_var=np.zeros(3), outputs="latents")
    np.testing.assert_array_equal(each.outputs["latents"], means)
    np.testing.assert_array_equal(shared.outputs["latents"], [[1, 2, 3]] * 2)


@both
def test_hard_codes_are_one_hot_at_any_temperature(connect: Connect, service: Running) -> None:
    logits = np.zeros((4, 5))
    with connect(service.url) as client:
        soft = client.sample(9, model="tiny-gumbel", temperature=1, logits=logits, outputs="codes").outputs["codes"]
        hard = client.sample(9, model="tiny-gumbel", temperature=1, hard=True, outputs="codes").outputs["codes"]
    assert set(np.unique(hard)) == {0, 1}
    assert len(np.unique(soft)) > 2
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-5)


@both
def test_the_default_model_is_listed_first(connect: Connect, service: Running) -> None:
    with connect(service.url) as client:
        first, *others = client.models()
        gumbel = client.model("tiny-gumbel")
    assert first.name == "tiny-gaussian"
    assert gumbel in others
    assert [model.name for model in others] == sorted(model.name for model in others)
    assert (gumbel.kind, gumbel.latent_shape, gumbel.image_shape) == ("gumbel", (4, 5), (1, 8, 8))
    assert (gumbel.parameters, gumbel.versions) == (("logits",), (1,))


@both
def test_errors_of_the_service_are_typed_and_say_the_way_out(connect: Connect, service: Running) -> None:
    with connect(service.url) as client:
        with pytest.raises(reparam.NotFound, match="tiny-gumbel") as missing:
            client.sample(model="tiny")
        with pytest.raises(reparam.Invalid, match="logits"):
            client.sample(logits=np.zeros((4, 5)))
        with pytest.raises(reparam.TooLarge) as large:
            client.sample(10**12)
    assert "tiny-gaussian" in missing.value.problem["available"]
    assert large.value.problem["limit"] < 10**12


@both
def test_a_failure_of_the_service_carries_the_request_id(connect: Connect, service: Running) -> None:
    with connect(service.url) as client, pytest.raises(reparam.ServerError) as raised:
        client.sample(model="trouble", temperature=FAILS)
    assert raised.value.request_id
    assert raised.value.request_id in str(raised.value)


@both
def test_a_service_with_a_key_refuses_clients_without_the_key(connect: Connect, serve: Callable[..., Running]) -> None:
    closed = serve(api_key="sesame")
    with connect(closed.url, "sesame") as client:
        assert len(client.sample()) == 1
    with connect(closed.url) as client, pytest.raises(reparam.Unauthorized):
        client.models()


def test_every_problem_of_the_service_has_a_class() -> None:
    statuses = {problem.status for problem in PROBLEMS.values()}
    assert statuses <= set(CLASSES)
    assert len(set(CLASSES.values())) == len(CLASSES)


@both
def test_a_model_name_is_quoted_in_the_path_and_responses_are_not_compressed(connect: Connect) -> None:
    with Peer(as_json(MODEL)) as peer, connect(peer.url) as client:
        assert client.model("a/b c?").name == "peer"
    assert peer.requests[0].path == "/models/a%2Fb%20c%3F"
    assert peer.requests[0].headers["accept-encoding"] == "identity"


def test_threads_may_share_a_client(service: Running) -> None:
    with Client(service.url) as client, ThreadPoolExecutor(8) as threads:
        rows = threads.map(lambda start: client.sample(seed=3, start=start).outputs["images"], range(32))
        np.testing.assert_array_equal(np.concatenate(list(rows)), client.sample(32, seed=3).outputs["images"])


def test_the_examples_of_the_guide_run(service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path("docs/client.md").read_text().replace("http://127.0.0.1:8000", service.url)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in re.findall("```python\n(.*?)```", guide, re.DOTALL):
        exec(compile(example.replace("Client()", f'Client("{service.url}")'), "docs/client.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", *(f"row-{row}.png" for row in range(16))}
