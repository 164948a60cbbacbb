"""Requests of the clients, and arguments that they refuse."""

from typing import Any

import numpy as np
import pytest

import reparam
from reparam import Client
from reparam._options import CHECKS
from tests.clients import Connect, both
from tests.peer import Peer, rows

pytestmark = pytest.mark.usefixtures("impatient")


def test_a_request_holds_only_the_options_given() -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        client.sample(3, seed=7)
        client.sample(temperature=0.5, hard=False, version=2, mu=np.zeros(2, np.float32))
    short, long = (request.body for request in peer.requests)
    assert short == {"n": 3, "seed": 7, "start": 0, "outputs": ["images"]}
    assert set(long) - set(short) == {"temperature", "hard", "version", "mu"}
    assert (long["temperature"], long["mu"]) == (0.5, [0.0, 0.0])


def test_none_means_the_default_of_every_option() -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        nothing: dict[str, Any] = dict.fromkeys(CHECKS)
        client.sample(**nothing)
    assert peer.requests[0].body.keys() == {"n", "seed", "start", "outputs"}


def test_numbers_may_be_numpy_scalars() -> None:
    scalars: dict[str, Any] = {"n": np.int32(2), "seed": np.uint64(2**64 - 1), "temperature": np.float32(0.5)}
    with Peer(rows()) as peer, Client(peer.url) as client:
        assert client.sample(**scalars).seed == 2**64 - 1
    assert peer.requests[0].body["temperature"] == 0.5


def test_every_request_carries_the_key_and_the_user_agent() -> None:
    with Peer(rows()) as peer, Client(peer.url + "/prefix/", "key") as client:
        client.sample()
    request = peer.requests[0]
    assert request.path == "/prefix/sample"
    assert request.headers["authorization"] == "Bearer key"
    assert request.headers["user-agent"] == f"reparam/{reparam.__version__}"


def test_an_empty_key_is_not_sent() -> None:
    with Peer(rows()) as peer, Client(peer.url, "") as client:
        client.sample()
    assert "authorization" not in peer.requests[0].headers


@pytest.mark.parametrize("timeout", [float("inf"), 1e12])
def test_an_infinite_timeout_means_no_timeout(timeout: float) -> None:
    with Peer(rows()) as peer, Client(peer.url, timeout=timeout) as client:
        assert len(client.sample(2)) == len(list(client.iter_samples(2))) * 2 == 2
    assert all("request-timeout" not in request.headers for request in peer.requests)


def test_a_fresh_seed_is_below_2_to_the_53() -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        seeds = {client.sample().seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**53 for seed in seeds)


@both
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 .. 2\\*\\*64 - 1, got -1"),
        ({"seed": 2**64}, "got 18446744073709551616"),
        ({"start": -3}, "start must be at least 0, got -3"),
        ({"temperature": -0.5}, "temperature must be a finite number of at least 0, got -0.5"),
        ({"temperature": float("nan")}, "got nan"),
        ({"mu": [0.0, float("inf")]}, r"mu must be finite, got inf at \(1,\)"),
        ({"logits": [[1.0], [1.0, 2.0]]}, "logits must be an array of numbers"),
        ({"log_var": "much"}, "log_var must be an array of numbers"),
        ({"mu": [1.0 + 2.0j, 0.0]}, "mu must be an array of numbers: they are complex128"),
        ({"mu": [True, False]}, "mu must be an array of numbers: they are bool"),
        ({"mu": ["1", "2"]}, "mu must be an array of numbers: they are <U1"),
        ({"mu": [10**400, 0]}, "mu must be an array of numbers: int too large"),
        ({"temperature": 10**400}, "temperature must be a finite number of at least 0, got 1000"),
        ({"outputs": ()}, "outputs must be some of images, latents, codes, indices"),
        ({"outputs": None}, "outputs must be some of images, latents, codes, indices, got None"),
        ({"outputs": [["images"]]}, "outputs must be some of"),
        ({"outputs": "pixels"}, "got 'pixels'"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_sent(connect: Connect, wrong: Any, message: str) -> None:
    with Peer(rows()) as peer, connect(peer.url) as client, pytest.raises(ValueError, match=message):
        client.sample(**wrong)
    assert peer.requests == []


@both
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": "3"}, "n must be an integer, got '3'"),
        ({"n": True}, "n must be an integer, got True"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"start": 0.5}, "start must be an integer, got 0.5"),
        ({"version": "latest"}, "version must be an integer, got 'latest'"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": [1.0]}, r"temperature must be a number, got \[1.0\]"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": np.bool_(True)}, "temperature must be a number, got"),
        ({"temperature": b"1"}, "temperature must be a number, got b'1'"),
        ({"model": 5}, "model must be a string, got 5"),
        ({"prior": b"mixture"}, "prior must be a string, got b'mixture'"),
        ({"hard": "yes"}, "hard must be True or False, got 'yes'"),
        (
            {"temprature": 1},
            "unknown option 'temprature'; the options are n, outputs, model, version, temperature, hard",
        ),
        ({"output": "images"}, "unknown option 'output'; the options are n, outputs, model"),
    ],
)
def test_an_argument_of_a_wrong_type_is_refused_by_name(connect: Connect, wrong: Any, message: str) -> None:
    with Peer(rows()) as peer, connect(peer.url) as client, pytest.raises(TypeError, match=message):
        client.sample(**wrong)
    assert peer.requests == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "must look like http://127.0.0.1:8000, got 'localhost:8000'"),
        ({"base_url": "http://host/?x=1"}, "must look like http://127.0.0.1:8000, got"),
        ({"base_url": "http://host#x"}, "must look like http://127.0.0.1:8000, got"),
        ({"base_url": "http://host/?"}, "must look like http://127.0.0.1:8000, got"),
        ({"base_url": "http://host..invalid"}, "must look like http://127.0.0.1:8000, got"),
        ({"base_url": "http://ä..invalid"}, "must look like http://127.0.0.1:8000, got"),
        ({"base_url": "http://host:port"}, "Invalid port"),
        ({"api_key": "key\n"}, "is there a line end in it"),
        ({"timeout": 0}, "timeout must be more than 0 seconds, or None"),
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client(**settings)


def test_a_malformed_host_is_refused_by_the_settings_or_the_resolver() -> None:
    with pytest.raises((ValueError, reparam.ConnectionFailed), match=r"xn--\.invalid"):  # httpx does, httpx2 does not
        Client("http://xn--.invalid", max_retries=0).models()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": None}, "base_url must be a string, got None"),
        ({"api_key": 5}, "api_key must be a string, got 5"),
        ({"timeout": "5"}, "timeout must be a number, got '5'"),
        ({"max_retries": 1.5}, "max_retries must be an integer, got 1.5"),
    ],
)
def test_settings_of_a_wrong_type_are_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Client(**settings)


@both
def test_impossible_names_of_models_and_outputs_are_refused_before_anything_is_sent(connect: Connect) -> None:
    with Peer(rows()) as peer, connect(peer.url) as client:
        for name in ("", ".", ".."):
            with pytest.raises(ValueError, match=f"name must be the name of a model, got '{name}'"):
                client.model(name)
        with pytest.raises(TypeError, match="name must be a string, got 5"):
            client.model(5)  # type: ignore[arg-type]  # a wrong type on purpose
        with pytest.raises(TypeError, match=r"output must be a string, got \('images',\)"):
            client.iter_samples(3, output=("images",))  # type: ignore[arg-type]  # a wrong type on purpose
        with pytest.raises(TypeError, match="unknown option 'outputs'; the options are n, output, progress, model"):
            client.iter_samples(3, outputs="images")  # type: ignore[call-arg]  # a wrong name on purpose
    assert peer.requests == []
