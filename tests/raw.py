"""A client that behaves badly on purpose: HTTP by hand on a socket."""

import json
import socket
import struct
import time
from io import BufferedReader
from typing import Any

from tests.conftest import Running


def connect(service: Running, receive_buffer: int | None = None) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


def send(connection: socket.socket, *pieces: bytes) -> None:
    """One after the other, each in a packet of its own."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(0.02 if len(pieces) > 1 else 0)  # or the other side reads them together


def leave_by_reset(connection: socket.socket) -> None:
    """When it is closed, the other side learns so at once."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """The status and the body that come back, which announces its length."""
    return next_answer(connection.makefile("rb"))


def next_answer(stream: BufferedReader) -> tuple[int, bytes]:
    """The same of a connection that brings more than one."""
    status, length = int(stream.readline().split()[1]), 0
    while (line := stream.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return status, stream.read(length)


def request(body: Any, accept: str = "application/x-npy", **headers: str) -> bytes:
    """The bytes of `POST /sample`."""
    content = json.dumps(body).encode()
    lines = [
        "POST /sample HTTP/1.1",
        "Host: reparam",
        "Content-Type: application/json",
        f"Accept: {accept}",
        f"Content-Length: {len(content)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content
