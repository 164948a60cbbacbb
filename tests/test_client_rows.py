"""Rows of samples: the request that repeats them, slices, concatenation."""

import pickle
from typing import Any

import numpy as np
import pytest

from reparam import Client, Samples
from tests.clients import Connect, both
from tests.conftest import Running
from tests.peer import HEADERS, MODEL, Peer, as_json, npy_header, numbers, reply, rows

pytestmark = pytest.mark.usefixtures("impatient")

MEANS = np.arange(18.0).reshape(6, 3)  # parameters of each of six rows
LOGITS = np.arange(120.0).reshape(6, 4, 5) % 7
CALLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "start": {"start": 40, "temperature": 0.5, "prior": "standard"},
    "parameters of each row": {"mu": MEANS, "log_var": np.zeros((6, 3))},
    "shared parameters": {"mu": [1, 2, 3], "temperature": 0.1},
    "both": {"mu": MEANS, "log_var": [0, 1, 2], "outputs": ("images", "latents")},
    "one-hot": {"model": "tiny-gumbel", "hard": True, "temperature": 1, "outputs": ("indices", "codes")},
    "logits": {"model": "tiny-gumbel", "logits": LOGITS, "outputs": "indices"},
}


def assert_equal(left: Samples, right: Samples) -> None:
    assert repr(left) == repr(right)
    for name, array in left.outputs.items():
        np.testing.assert_array_equal(array, right.outputs[name])


@both
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_the_request_of_samples_and_of_any_slice_gives_the_same_rows(
    connect: Connect, service: Running, options: dict[str, Any]
) -> None:
    with connect(service.url) as client:
        samples = client.sample(6, **options)
        for part in (samples, samples[2:5], samples[4], samples[1:][1:3], list(samples)[5]):
            assert_equal(client.sample(**part.request), part)


def test_the_request_names_the_version_and_everything_given() -> None:
    options: dict[str, Any] = {"temperature": np.float32(0.5), "mu": [1, 2], "hard": False}
    with Peer(rows()) as peer, Client(peer.url) as client:
        samples = client.sample(4, seed=7, start=9, **options)
    request = samples[1:].request
    np.testing.assert_array_equal(request.pop("mu"), [1.0, 2.0])
    origin = {"model": "peer", "version": 3, "seed": 7, "start": 10}
    assert request == {"n": 3, **origin, "temperature": 0.5, "hard": False, "outputs": ("images",)}
    assert repr(samples[1:]).endswith(
        "model='peer', version=3, seed=7, start=10, temperature=0.5, mu=float64(2,), hard=False)"
    )


def test_rows_are_indexed_like_a_sequence() -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        samples = client.sample(5, seed=1, start=10)
    assert numbers([samples[0], samples[-1], samples[np.int64(2)]]) == [10, 14, 12]
    assert numbers(list(samples)) == [10, 11, 12, 13, 14]
    assert (samples[-1].n, samples[-1].start) == (1, 14)
    assert numbers([samples[-2:], samples[:1], samples[3:99]]) == [13, 14, 10, 13, 14]
    assert [part.start for part in (samples[-2:], samples[:1], samples[3:99])] == [13, 10, 13]
    assert samples.images is not None
    assert np.shares_memory(samples[1:3].outputs["images"], samples.images)
    assert_equal(pickle.loads(pickle.dumps(samples[1:3])), samples[1:3])


def test_an_empty_slice_has_no_rows_and_no_picture() -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        empty = client.sample(5)[3:3]
        assert (len(empty), list(empty), empty._repr_png_()) == (0, [], None)
        with pytest.raises(ValueError, match="no picture without rows"):
            empty.grid()
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            client.sample(**empty.request)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (5, IndexError, "row 5 of 5 rows"),
        (-6, IndexError, "row -6 of 5 rows"),
        (slice(None, None, 2), ValueError, r"got the step 2: index an array .*samples.outputs\['images'\]\[::2\]"),
        (slice(None, None, -1), ValueError, "got the step -1"),
        ([0, 2], TypeError, r"an integer or a slice, got \[0, 2\]: index an array"),
        ("images", TypeError, "got 'images'"),
    ],
)
def test_rows_that_do_not_follow_each_other_are_refused(key: Any, error: type[Exception], message: str) -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        samples = client.sample(5)
    with pytest.raises(error, match=message):
        samples[key]


@both
def test_concatenated_batches_are_what_one_call_gives(connect: Connect, service: Running) -> None:
    n = 20_000  # several batches
    means = np.arange(3.0 * n).reshape(n, 3)
    with connect(service.url, timeout=None) as client:
        whole = client.sample(n, seed=3, start=5, mu=means, log_var=[0, 0, 1])
        batches = list(client.iter_samples(n, seed=3, start=5, mu=means, log_var=[0, 0, 1]))
    assert len(batches) > 1
    joined = Samples.concatenate(batches)
    assert_equal(joined, whole)
    np.testing.assert_array_equal(joined.request["mu"], means)
    np.testing.assert_array_equal(batches[1].request["mu"], means[batches[0].n :][: batches[1].n])


@both
def test_batches_of_a_resumed_stream_are_concatenated(connect: Connect) -> None:
    mu = np.arange(20.0).reshape(10, 2)
    with Peer(rows(12), as_json(MODEL), rows()) as peer, connect(peer.url) as client:
        joined = Samples.concatenate(client.iter_samples(10, mu=mu, log_var=[0, 0]))
    assert numbers([joined]) == list(range(10))
    np.testing.assert_array_equal(joined.request["mu"], mu)
    np.testing.assert_array_equal(joined[7:].request["mu"], mu[7:])
    np.testing.assert_array_equal(joined[7:].request["log_var"], [0, 0])


def test_slices_are_concatenated_to_the_whole() -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        samples = client.sample(9, mu=np.arange(18.0).reshape(9, 2), temperature=0.5)
    assert_equal(Samples.concatenate([samples[:2], samples[2:2], samples[2:8], samples[8]]), samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 6}, "parts 0 and 1 are no rows of one call: the next row is 5, and not 6"),
        ({"start": 0}, "the next row is 5, and not 0"),
        ({"seed": 2**64 - 2}, "seed is 18446744073709551615 and 18446744073709551614"),
        ({"temperature": 1.0}, "temperature is 0.5 and 1.0"),
        ({"temperature": None}, "temperature is 0.5 and None"),
        ({"hard": True}, "hard is None and True"),
        ({"mu": [0, 1]}, r"mu is float64\(2,\) and float64\(2,\)"),
        ({"mu": np.zeros((2, 2))}, r"parameters of each row are {} and {'mu': \(2,\)}"),
    ],
)
def test_parts_of_different_calls_are_not_concatenated(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"seed": 2**64 - 1, "temperature": 0.5, "mu": [0, 0]}
    with Peer(rows()) as peer, Client(peer.url) as client:
        parts = [client.sample(5, **given), client.sample(2, **{**given, "start": 5, **options})]
    with pytest.raises(ValueError, match=message):
        Samples.concatenate(parts)


def test_concatenation_needs_the_same_outputs_and_at_least_one_part() -> None:
    origin: dict[str, Any] = {"model": "m", "version": 1, "seed": 1, "noise_version": 1}
    one = Samples(latents=np.zeros((2, 3), np.float32), start=0, **origin)
    other = Samples(images=np.zeros((2, 1, 2, 2), np.uint8), start=2, **origin)
    with pytest.raises(ValueError, match=r"outputs is \('latents',\) and \('images',\)"):
        Samples.concatenate([one, other])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        Samples.concatenate([])


@pytest.mark.parametrize(
    ("parameters", "sliced"),
    [
        ({"mu": (4,)}, set()),
        ({"mu": (4, 2)}, {"mu"}),
        ({"mu": (3, 2)}, set()),
        ({"mu": (4, 2), "log_var": (2,)}, {"mu"}),
        ({"mu": (4, 4, 2), "log_var": (4, 2)}, {"mu"}),
        ({"mu": (4, 2), "log_var": (4, 2)}, {"mu", "log_var"}),
        ({"logits": (4, 2)}, set()),
        ({"logits": (4, 2, 3)}, {"logits"}),
    ],
    ids=str,
)
def test_parameters_of_each_row_are_told_from_shared_parameters(parameters: dict[str, Any], sliced: set[str]) -> None:
    given: dict[str, Any] = {name: np.zeros(shape) for name, shape in parameters.items()}
    with Peer(rows()) as peer, Client(peer.url) as client:
        request = client.sample(4, **given)[1:].request
    assert {name for name in given if len(request[name]) != len(given[name])} == sliced


def test_latents_say_for_certain_how_many_dimensions_shared_parameters_have() -> None:
    header = npy_header(4, "<f4").replace(b"(4, 1, 2, 2)", b"(4, 4, 2)   ")
    headers = HEADERS | {"Sample-Seed": "1", "Sample-Start": "0"}
    with Peer(reply(200, header + bytes(4 * 32), **headers)) as peer, Client(peer.url) as client:
        samples = client.sample(4, mu=np.zeros((4, 2)), outputs="latents")
    assert samples[1:3].request["mu"].shape == (4, 2)
