"""Streams of the clients: batches, resumption, progress."""

import threading
import time
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase

import numpy as np
import pytest

import reparam
from reparam import Client
from tests.clients import Connect, both
from tests.peer import (
    HTML,
    MODEL,
    Peer,
    Received,
    Responder,
    as_json,
    chunked,
    hang_up,
    npy_header,
    numbers,
    problem,
    reply,
    rows,
    until_gone,
)

pytestmark = pytest.mark.usefixtures("impatient")


@both
def test_a_stream_yields_batches_of_about_a_mebibyte(connect: Connect) -> None:
    with Peer(rows()) as peer, connect(peer.url) as client:
        batches = list(client.iter_samples(600_000, seed=1, start=10))
    assert numbers(batches) == list(range(10, 600_010))
    assert [batch.start for batch in batches] == [10 + sum(map(len, batches[:i])) for i in range(len(batches))]
    assert all(2**20 <= batch.n * 4 <= 2**20 + 2**17 for batch in batches[:-1])


@both
@pytest.mark.parametrize("cut", [0, 3, 4, 401, 399_999], ids=str)
def test_a_broken_stream_resumes_at_the_first_missing_row(connect: Connect, cut: int) -> None:
    with Peer(rows(cut), rows()) as peer, connect(peer.url) as client:
        batches = list(client.iter_samples(100_000))
    assert numbers(batches) == list(range(100_000))
    first, second = (request.body for request in peer.requests)
    assert second["seed"] == first["seed"]
    assert (second["start"], second["n"]) == (cut // 4, 100_000 - cut // 4)


def test_a_resumed_stream_keeps_the_version() -> None:
    with Peer(rows(40), rows()) as peer, Client(peer.url) as client:
        list(client.iter_samples(100))
    assert "version" not in peer.requests[0].body
    assert (peer.requests[1].body["model"], peer.requests[1].body["version"]) == ("peer", 3)


def test_a_stream_may_break_any_number_of_times_while_rows_arrive() -> None:
    with Peer(*[rows(4)] * 9, rows()) as peer, Client(peer.url, max_retries=1) as client:
        assert numbers(list(client.iter_samples(12))) == list(range(12))
    assert len(peer.requests) == 10


@both
def test_rows_before_the_last_break_are_yielded_before_the_error(connect: Connect) -> None:
    with Peer(rows(42), hang_up) as peer, connect(peer.url, max_retries=2) as client:
        batches = client.iter_samples(100)
        assert numbers([next(batches)]) == list(range(10))
        with pytest.raises(reparam.ConnectionFailed):
            next(batches)
    assert len(peer.requests) == 3


@both
def test_a_silent_connection_counts_as_broken(connect: Connect) -> None:
    with Peer(rows(40, then=until_gone), rows()) as peer, connect(peer.url, timeout=0.2) as client:
        assert numbers(list(client.iter_samples(100))) == list(range(100))


@both
def test_a_stream_outlives_the_timeout_while_rows_arrive(connect: Connect) -> None:
    with Peer(slowly) as peer, connect(peer.url, timeout=0.3, max_retries=0) as client:
        assert numbers(list(client.iter_samples(10))) == list(range(10))


def slowly(request: Received, handler: BaseHTTPRequestHandler) -> None:
    """Send ten rows, for longer than the timeout of 0.3 s."""

    def rest(_: BufferedIOBase) -> None:
        for row in range(1, request.body["n"]):
            time.sleep(0.05)
            handler.wfile.write(row.to_bytes(4, "little"))

    rows(4, then=rest)(request, handler)


@both
@pytest.mark.parametrize("fault", [problem(503), problem(429), HTML], ids=["503", "429", "502"])
def test_a_stream_waits_for_a_busy_service(connect: Connect, fault: Responder) -> None:
    with Peer(fault, rows(20), fault, rows()) as peer, connect(peer.url) as client:
        assert numbers(list(client.iter_samples(50))) == list(range(50))


@both
def test_a_stream_ends_where_its_version_is_gone(connect: Connect) -> None:
    with Peer(rows(20), problem(404)) as peer, connect(peer.url) as client:
        batches = client.iter_samples(50)
        assert len(next(batches)) == 5
        with pytest.raises(reparam.NotFound):
            next(batches)


def test_a_stream_that_is_no_array_is_explained() -> None:
    with (
        Peer(reply(200, b"<html>", Content_Type="text/html")) as peer,
        Client(peer.url) as client,
        pytest.raises(reparam.StatusError, match="answered with text/html, not with application/x-npy"),
    ):
        list(client.iter_samples(3))


@pytest.mark.parametrize("piece", [1, 5, 127, 129])
def test_a_stream_may_be_cut_into_chunks_anywhere(piece: int) -> None:
    whole = npy_header(30) + np.arange(30, dtype="<u4").tobytes()
    pieces = [whole[at : at + piece] for at in range(0, len(whole), piece)]
    with Peer(chunked(*pieces)) as peer, Client(peer.url) as client:
        assert numbers(list(client.iter_samples(30))) == list(range(30))


def test_a_short_response_of_unknown_length_is_resumed() -> None:
    with Peer(chunked(npy_header(9) + np.arange(5, dtype="<u4").tobytes()), rows()) as peer, Client(peer.url) as client:
        assert numbers(list(client.iter_samples(9))) == list(range(9))
    assert peer.requests[1].body["start"] == 5


def test_rows_without_their_origin_are_an_error() -> None:
    whole = npy_header(3) + np.arange(3, dtype="<u4").tobytes()
    with (
        Peer(reply(200, whole, Content_Type="application/x-npy")) as peer,
        Client(peer.url) as client,
        pytest.raises(reparam.StatusError, match=r"cannot be read: KeyError: .*Model-Name"),
    ):
        list(client.iter_samples(3))


def test_a_break_after_the_last_row_is_no_error() -> None:
    whole = npy_header(2) + np.arange(2, dtype="<u4").tobytes()
    with Peer(chunked(whole, end=b"")) as peer, Client(peer.url) as client:
        assert numbers(list(client.iter_samples(2))) == [0, 1]
    assert len(peer.requests) == 1


def test_rows_of_no_bytes_are_an_error() -> None:
    header = npy_header(1).replace(b"(1, 1, 2, 2)", b"(1, 1, 0, 2)")
    with (
        Peer(chunked(header)) as peer,
        Client(peer.url) as client,
        pytest.raises(reparam.StatusError, match=r"uint8\(1, 1, 0, 2\)"),
    ):
        list(client.iter_samples(1))


def test_more_rows_than_requested_are_an_error() -> None:
    with (
        Peer(chunked(npy_header(1) + bytes(8))) as peer,
        Client(peer.url) as client,
        pytest.raises(reparam.StatusError, match="more rows than the header says"),
    ):
        list(client.iter_samples(1))


@both
def test_a_resumed_stream_sends_the_parameters_of_the_missing_rows(connect: Connect) -> None:
    mu, log_var = np.arange(20.0).reshape(10, 2), np.zeros(2)
    with Peer(rows(12), as_json(MODEL), rows(8), rows()) as peer, connect(peer.url) as client:
        assert numbers(list(client.iter_samples(10, mu=mu, log_var=log_var))) == list(range(10))
    assert [request.path for request in peer.requests] == ["/sample", "/models/peer/versions/3", "/sample", "/sample"]
    assert peer.requests[2].body["mu"] == mu[3:].tolist()
    assert peer.requests[3].body["mu"] == mu[5:].tolist()
    assert peer.requests[3].body["log_var"] == [0.0, 0.0]


@both
def test_closing_a_stream_early_disconnects(connect: Connect) -> None:
    disconnected = threading.Event()

    def respond(request: Received, handler: BaseHTTPRequestHandler) -> None:
        try:
            rows(then=until_gone)(request, handler)
        finally:
            disconnected.set()

    with Peer(respond) as peer, connect(peer.url) as client:
        batches = client.iter_samples(10_000_000)
        next(batches)
        batches.close()
        assert disconnected.wait(10)


# Progress


def test_progress_shows_rows_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Peer(rows(8), rows()) as peer, Client(peer.url) as client:
        list(client.iter_samples(1234, progress=True))
    shown = capsys.readouterr().err
    assert "[##########] 100%  1,234 of 1,234 rows" in shown
    assert shown.endswith("\n")


def test_without_a_terminal_no_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Peer(rows()) as peer, Client(peer.url) as client:
        list(client.iter_samples(10))
    assert capsys.readouterr().err == ""
