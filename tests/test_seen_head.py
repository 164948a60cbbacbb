"""The head that a connection keeps: exactly the bytes before the body, or none."""

from typing import Any

import pytest

from reparam.service.http.endpoint import Head
from reparam.service.wire.fast_path import FastHead
from reparam.service.wire.seen_head import seen_head

HEAD = b"POST /sample HTTP/1.1\r\nHost: reparam\r\nContent-Length: 2\r\n\r\n"
PATH: Any = object()  # kept as it is


def kept(data: bytes, body: bytes) -> bytes | None:
    seen = seen_head(data, body, PATH, FastHead(Head(30.0, b"*/*", content_length=2), None))
    if seen is None:
        return None
    assert (seen.path, seen.size) == (PATH, len(data))
    return seen.data


def test_the_head_of_one_whole_request_is_kept() -> None:
    assert kept(HEAD + b"{}", b"{}") == HEAD


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (HEAD + b"\r\n" + b"\r\n", b"\r\n"),  # a stray line end behind the body
        (HEAD + b"{}" + HEAD + b"{}", b"{}"),  # two requests in one read
        (HEAD + b"{}" + HEAD, b"{}"),  # one, and the head of the next
        (HEAD + b"{", b"{"),
        (HEAD, b""),
    ],
)
def test_other_reads_are_not_kept(data: bytes, body: bytes) -> None:
    assert kept(data, body) is None
