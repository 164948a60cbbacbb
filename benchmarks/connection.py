"""A keep-alive connection to a server on this machine. Costs a few microseconds per request."""

import socket
from types import TracebackType
from typing import Self


class Connection:
    """A TCP connection to a port of 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> bytes:
        """Send a request. Returns: the body of the response."""
        length, body = self.start(request)
        while len(body) < length:
            body += self._receive()
        return body

    def start(self, request: bytes) -> tuple[int, bytes]:
        """Send a request. Returns: the length of the body, and the part of the body received so far."""
        self.socket.sendall(request)
        received = self._receive()
        while b"\r\n\r\n" not in received:
            received += self._receive()
        head, _, body = received.partition(b"\r\n\r\n")
        status, *headers = head.lower().split(b"\r\n")
        if b" 200 " not in status + b" ":
            raise ConnectionError(head.decode())
        return next(int(line[15:]) for line in headers if line.startswith(b"content-length:")), body

    def _receive(self) -> bytes:
        if received := self.socket.recv(1 << 18):
            return received
        raise EOFError("the server closed the connection")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()
