"""A real HTTP server that responds by script, for responses that a healthy service never gives."""

import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy

from reparam import Samples

HEADERS = {
    "Model-Name": "peer",
    "Model-Version": "3",
    "Noise-Version": "1",
    "Content-Type": "application/x-npy",
    "X-Request-ID": "r-1",
}
MODEL = {
    "name": "peer",
    "version": 3,
    "versions": [3],
    "kind": "gaussian",
    "latent_shape": [2],
    "image_shape": [1, 2, 2],
    "default_temperature": 1.0,
    "noise_version": 1,
    "parameters": ["mu", "log_var"],
    "outputs": ["images", "latents"],
    "trained_on": {"data": "digits"},
    "evaluation": {"bits_per_dim": 1.5},
    "provider": "CPUExecutionProvider",
}


@dataclass
class Received:
    """A request that arrived."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: Any


Responder = Callable[[Received, BaseHTTPRequestHandler], None]


class Peer:
    """A server in a thread. Each request gets the next responder of the script; the last responder repeats."""

    def __init__(self, *script: Responder) -> None:
        self.requests: list[Received] = []
        self.failures: list[Exception] = []  # of responders; raised when the peer ends
        self.script = script
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def handler(self) -> type[BaseHTTPRequestHandler]:
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def respond(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Received(self.command, self.path, headers, json.loads(content or "null"))
                peer.requests.append(request)
                try:
                    peer.script[min(len(peer.requests), len(peer.script)) - 1](request, self)
                except ConnectionError:  # the client may have disconnected
                    pass
                except Exception as error:  # for the test to see
                    peer.failures.append(error)

            do_GET = do_POST = respond  # noqa: N815  # names that http.server looks for

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        for failure in self.failures:
            raise failure


def reply(status: int, body: bytes = b"", **headers: str) -> Responder:
    """Respond with a body. `Retry_After="1"` is the header Retry-After."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}

    def respond(_: Received, handler: BaseHTTPRequestHandler) -> None:
        _begin(handler, status, {"Content-Length": str(len(body)), **given})
        handler.wfile.write(body)

    return respond


def problem(status: int, detail: str = "no", **headers: str) -> Responder:
    document = {"type": "/problems/some", "title": "Some", "status": status, "detail": detail}
    return reply(status, json.dumps(document).encode(), Content_Type="application/problem+json", **headers)


def as_json(value: Any) -> Responder:
    return reply(200, json.dumps(value).encode(), Content_Type="application/json")


def rows(cut: int | None = None, then: Callable[[BufferedIOBase], None] | None = None) -> Responder:
    """Respond with the requested rows, as images (1, 2, 2) that spell the number of their row.

    cut: number of bytes of rows to send; None sends all.
    then: called before the connection closes.
    """

    def respond(request: Received, handler: BaseHTTPRequestHandler) -> None:
        start, n = request.body["start"], request.body["n"]
        images = np.arange(start, start + n, dtype="<u4").view("u1").tobytes()
        length = len(npy_header(n)) + len(images)
        headers = {"Content-Length": str(length), "Sample-Seed": str(request.body["seed"]), "Sample-Start": str(start)}
        _begin(handler, 200, HEADERS | headers)
        handler.wfile.write(npy_header(n) + images[:cut])
        if then:
            then(handler.rfile)

    return respond


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> Responder:
    """Respond with these pieces of an npy file, without Content-Length."""

    def respond(request: Received, handler: BaseHTTPRequestHandler) -> None:
        headers = {"Transfer-Encoding": "chunked", "Sample-Seed": "1", "Sample-Start": str(request.body["start"])}
        _begin(handler, 200, HEADERS | headers)
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(end)

    return respond


def trickle(_: Received, handler: BaseHTTPRequestHandler) -> None:
    """Respond without end, a byte at a time."""
    _begin(handler, 200, HEADERS)
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def hang_up(_: Received, handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a response."""


def silence(_: Received, handler: BaseHTTPRequestHandler) -> None:
    """Send nothing until the client disconnects."""
    until_gone(handler.rfile)


def until_gone(connection: BufferedIOBase) -> None:
    connection.read(1)


def npy_header(n: int, dtype: str = "|u1", fortran_order: bool = False) -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": dtype, "fortran_order": fortran_order, "shape": (n, 1, 2, 2)})
    return file.getvalue()


def _begin(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()


def numbers(batches: list[Samples]) -> list[int]:
    """Returns: the row numbers that the images of the peer spell."""
    return [int(row) for batch in batches if batch.images is not None for row in batch.images.reshape(-1).view("<u4")]


HTML = reply(502, b"<html>Bad Gateway</html>", Content_Type="text/html; charset=utf-8")
