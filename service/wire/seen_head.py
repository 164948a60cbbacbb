"""The head of a connection's last fast request, kept because clients repeat heads byte for byte."""

from typing import NamedTuple

from reparam.service.wire.fast_path import FastHead, FastPath

HEAD_END = b"\r\n\r\n"


class SeenHead(NamedTuple):
    """A head that has been parsed and checked. Equal bytes have the same meaning.

    data: bytes of the head.
    size: number of bytes of the whole request.
    path, head: the fast path and the checked head.
    """

    data: bytes
    size: int
    path: FastPath
    head: FastHead


def seen_head(data: bytes, body: bytes, path: FastPath, head: FastHead) -> SeenHead | None:
    """Find the head in the bytes of one read.

    data: bytes since the request before.
    body: body of the last request in the data.

    Returns: the head; None unless the data is exactly one request with a body of the length in Content-Length.
    """
    end = data.find(HEAD_END) + len(HEAD_END)
    if 0 < head.head.content_length == len(body) == len(data) - end:
        return SeenHead(data[:end], len(data), path, head)
    return None
