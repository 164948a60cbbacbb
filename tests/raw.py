"""HTTP by hand on a socket, for clients that misbehave on purpose."""

import json
import socket
import struct
import time
from io import BufferedReader
from typing import Any, Protocol

HEAD_END = b"\r\n\r\n"
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: reparam\r\n\r\n"


class Service(Protocol):
    """A service at a URL."""

    @property
    def url(self) -> str: ...


def connect(service: Service, receive_buffer: int | None = None) -> socket.socket:
    """Connect to the service. receive_buffer: bytes that the socket takes before its client reads."""
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(120)
    connection.connect((host, int(port)))
    return connection


def send(connection: socket.socket, *pieces: bytes) -> None:
    """Send the pieces one after the other, each in a packet of its own."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(0.02 if len(pieces) > 1 else 0)  # or the other side usually reads both together


def reset_on_close(connection: socket.socket) -> None:
    """Make closing send a reset, which the other side notices at once."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def read_response(connection: socket.socket) -> tuple[int, bytes]:
    """Read the status and the body of the only response of a connection."""
    return next_response(connection.makefile("rb"))


def next_response(stream: BufferedReader) -> tuple[int, bytes]:
    """Read the status and the body of the next response of a connection."""
    status, _, body = whole_response(stream)
    return status, body


def whole_response(stream: BufferedReader) -> tuple[int, dict[bytes, bytes], bytes]:
    """Read the status, the headers, with names in lower case, and the body of the next response."""
    status = int(stream.readline().split()[1])
    headers = {}
    while (line := stream.readline().rstrip(b"\r\n")) != b"":
        name, _, value = line.partition(b": ")
        headers[name.lower()] = value
    return status, headers, stream.read(int(headers.get(b"content-length", 0)))


def exchange(service: Service, *pieces: bytes) -> tuple[int, bytes]:
    """Send the pieces on a fresh connection. Returns the status and the body of the first response."""
    with connect(service) as connection:
        send(connection, *pieces)
        return read_response(connection)


def request(body: Any, accept: str = "application/x-npy", path: str = "/sample", **headers: str) -> bytes:
    """Write a POST request; `Request_Timeout="1"` is the header Request-Timeout."""
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: reparam",
        "Content-Type: application/json",
        f"Accept: {accept}",
        f"Content-Length: {len(content)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content
