"""A client that behaves badly on purpose: HTTP by hand on a socket."""

import json
import socket
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
