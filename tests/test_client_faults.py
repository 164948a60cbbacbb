"""The clients when a server misbehaves."""

import io
import pickle
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest

import reparam
from reparam import Client
from reparam._errors import LONGEST
from reparam._http import httpx
from tests.clients import Connect, both
from tests.peer import (
    HEADERS,
    HTML,
    MODEL,
    Peer,
    Responder,
    as_json,
    hang_up,
    npy_header,
    numbers,
    problem,
    reply,
    rows,
    silence,
    trickle,
)

pytestmark = pytest.mark.usefixtures("impatient")


# Retries and deadlines


@both
@pytest.mark.parametrize("fault", [problem(429), problem(503), HTML, hang_up], ids=["429", "503", "502", "hang-up"])
def test_a_retry_asks_for_the_same_rows_again(connect: Connect, fault: Responder) -> None:
    with Peer(fault, fault, rows()) as peer, connect(peer.url) as client:
        samples = client.sample(2, start=5)
    assert numbers([samples]) == [5, 6]
    assert [request.body["seed"] for request in peer.requests] == [samples.seed] * 3


@both
@pytest.mark.parametrize(
    ("responder", "error"),
    [
        (problem(401), reparam.Unauthorized),
        (problem(422), reparam.Invalid),
        (problem(500), reparam.ServerError),
        (problem(504), reparam.DeadlineExceeded),
        (problem(418), reparam.StatusError),
    ],
)
def test_other_errors_are_not_retried(connect: Connect, responder: Responder, error: type[reparam.StatusError]) -> None:
    with Peer(responder) as peer, connect(peer.url) as client, pytest.raises(error) as raised:
        client.sample()
    assert type(raised.value) is error
    assert len(peer.requests) == 1


@both
def test_after_max_retries_the_last_error_is_raised(connect: Connect) -> None:
    with (
        Peer(hang_up, problem(429)) as peer,
        connect(peer.url, max_retries=2) as client,
        pytest.raises(reparam.Overloaded),
    ):
        client.sample()
    assert len(peer.requests) == 3


@both
def test_a_closed_port_is_a_failed_connection(connect: Connect) -> None:
    with Peer() as gone:
        pass
    with connect(gone.url, max_retries=1) as client, pytest.raises(reparam.ConnectionFailed, match=gone.url) as raised:
        client.sample()
    assert isinstance(raised.value.__cause__, httpx.ConnectError)


@pytest.mark.parametrize("when", ["0", formatdate(0, usegmt=True), "soon"])
def test_retry_after_may_be_seconds_or_a_date_or_nonsense(when: str) -> None:
    with Peer(problem(503, Retry_After=when), rows()) as peer, Client(peer.url) as client:
        assert len(client.sample()) == 1


@both
@pytest.mark.parametrize("when", ["60", "9" * 400, formatdate(4e9, usegmt=True)])
def test_a_retry_beyond_the_deadline_is_given_up_at_once(connect: Connect, when: str) -> None:
    with (
        Peer(problem(429, Retry_After=when)) as peer,
        connect(peer.url, timeout=30) as client,
        pytest.raises(reparam.Overloaded) as raised,
    ):
        client.sample()
    assert len(peer.requests) == 1
    assert raised.value.retry_after is not None
    assert 30 < raised.value.retry_after <= LONGEST  # time.sleep takes no more


@both
@pytest.mark.parametrize("slow", [silence, trickle])
def test_the_deadline_ends_a_call_to_a_slow_server(connect: Connect, slow: Responder) -> None:
    with (
        Peer(slow) as peer,
        connect(peer.url, timeout=0.15) as client,
        pytest.raises(reparam.TimedOut, match=r"in 0\.15 s"),
    ):
        client.sample()
    assert len(peer.requests) == 1


def test_request_timeout_is_the_time_until_the_deadline() -> None:
    with Peer(hang_up, rows()) as peer, Client(peer.url, timeout=20) as client:
        client.sample()
    first, second = (float(request.headers["request-timeout"]) for request in peer.requests)
    assert 0 < second < first <= 20


@both
def test_without_timeout_no_request_timeout_is_sent(connect: Connect) -> None:
    with Peer(problem(503), rows()) as peer, connect(peer.url, timeout=None) as client:
        client.sample()
    assert "request-timeout" not in peer.requests[1].headers


# Errors


def test_an_error_shows_the_detail_and_the_request_id() -> None:
    with (
        Peer(problem(404, "unknown model 'mnst'", X_Request_ID="r-7")) as peer,
        Client(peer.url) as client,
        pytest.raises(reparam.NotFound) as raised,
    ):
        client.model("mnst")
    error = raised.value
    assert str(error) == "404 Some: unknown model 'mnst' (request r-7)"
    assert (error.status, error.type, error.problem["title"]) == (404, "/problems/some", "Some")


def test_errors_survive_pickling() -> None:
    with (
        Peer(problem(429, Retry_After="9")) as peer,
        Client(peer.url, max_retries=0) as client,
        pytest.raises(reparam.Overloaded) as raised,
    ):
        client.sample()
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (type(copy), str(copy), copy.retry_after) == (reparam.Overloaded, str(raised.value), 9.0)


@pytest.mark.parametrize(
    ("responder", "message"),
    [
        (HTML, "502 Bad Gateway: http://.* answered with text/html and no problem document, so it was likely a proxy"),
        (reply(503), "answered with no content type"),
        (reply(500, b"{", Content_Type="application/problem+json"), "500 Internal Server Error"),
        (reply(500, b"7", Content_Type="application/problem+json"), "500 Internal Server Error"),
        (reply(307, Location="https://vae.example/sample"), "redirects to https://vae.example/sample"),
        (reply(200, b"<html>", Content_Type="text/html"), "answered with text/html, not with application/x-npy"),
        (reply(200, b"", **HEADERS), "its array broke off"),
        (reply(200, b"no numpy here", **HEADERS), "broke off"),
        (reply(200, b"0123456789" + bytes(99_999), **HEADERS), "magic string is not correct"),
        (reply(200, b"\x93NUMPY\x02\x00\x10\x00" + bytes(16), **HEADERS), "not version 1.0 of the npy format"),
        (reply(200, npy_header(1).replace(b")", b" ") + bytes(4), **HEADERS), "TokenError"),
        (reply(500, b"[" * 100_000, Content_Type="application/problem+json"), "no problem document"),
        (
            reply(200, npy_header(1, "<f4") + bytes(16), **HEADERS),
            r"images are float32\(1, 1, 2, 2\), not 1 rows of uint8",
        ),
        (reply(200, npy_header(2) + bytes(8), **HEADERS), r"images are uint8\(2, 1, 2, 2\), not 1 rows of uint8"),
        (reply(200, npy_header(1, fortran_order=True) + bytes(4), **HEADERS), "rows are not contiguous"),
        (reply(200, npy_header(1) + bytes(3), **HEADERS), "cannot reshape"),
        (reply(200, npy_header(1) + bytes(4), **HEADERS), "KeyError: 'Sample-Seed'"),
    ],
)
def test_an_unusable_response_is_explained(responder: Responder, message: str) -> None:
    with (
        Peer(responder) as peer,
        Client(peer.url, max_retries=0) as client,
        pytest.raises(reparam.StatusError, match=message),
    ):
        client.sample()


def encrypted() -> bytes:
    """Returns: an archive with the flag for encryption."""
    archive = io.BytesIO()
    np.savez(archive, images=np.zeros((1, 1, 2, 2), np.uint8), latents=np.zeros((1, 2), np.float32))
    return (
        archive.getvalue()
        .replace(b"PK\x03\x04\x2d\0\0", b"PK\x03\x04\x2d\0\1")
        .replace(b"PK\x01\x02\x2d\x03\x2d\0\0", b"PK\x01\x02\x2d\x03\x2d\0\1")
    )


@pytest.mark.parametrize("body", [b"", b"PK\x05\x06 no zip", encrypted()], ids=["nothing", "no zip", "encrypted"])
def test_a_broken_archive_is_explained(body: bytes) -> None:
    responder = reply(200, body, **HEADERS | {"Content-Type": "application/x-npz"})
    with (
        Peer(responder) as peer,
        Client(peer.url) as client,
        pytest.raises(reparam.StatusError, match="cannot be read"),
    ):
        client.sample(outputs=("images", "latents"))


@pytest.mark.parametrize("described", [{}, [], {"models": [MODEL]}, {"models": [{"name": "x"}], "default": "x"}])
def test_an_incomplete_list_of_models_is_explained(described: Any) -> None:
    with (
        Peer(as_json(described)) as peer,
        Client(peer.url) as client,
        pytest.raises(reparam.StatusError, match="cannot be read"),
    ):
        client.models()


def test_unknown_fields_of_a_model_are_ignored() -> None:
    with Peer(as_json(MODEL | {"colour": "blue"})) as peer, Client(peer.url) as client:
        assert client.model("peer").latent_shape == (2,)


def test_a_password_in_the_address_stays_out_of_messages() -> None:
    with Peer(problem(401)) as peer:
        url = peer.url.replace("http://", "http://me:secret@")
        with Client(url) as client, pytest.raises(reparam.Unauthorized):
            client.sample()
    with Client(url, max_retries=0) as client, pytest.raises(reparam.ConnectionFailed) as raised:
        client.sample()
    assert "secret" not in str(raised.value)
    assert peer.requests[0].headers["authorization"].startswith("Basic ")
