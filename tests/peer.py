"""A real HTTP server that answers by script: for what a healthy service never does."""

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
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: Any


Answer = Callable[[Asked, BaseHTTPRequestHandler], None]


class Peer:
    """Each request is given the next answer of the script, and the last one again when there is none left."""

    def __init__(self, *script: Answer) -> None:
        self.asked: list[Asked] = []
        self.failures: list[Exception] = []  # of the script; raised when the peer ends
        self.script = script
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def handler(self) -> type[BaseHTTPRequestHandler]:
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, self.path, headers, json.loads(content or "null"))
                peer.asked.append(asked)
                try:
                    peer.script[min(len(peer.asked), len(peer.script)) - 1](asked, self)
                except ConnectionError:  # the client may have gone
                    pass
                except Exception as error:  # for the test to see
                    peer.failures.append(error)

            do_GET = do_POST = answer  # noqa: N815  # names that http.server looks for

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


def reply(status: int, body: bytes = b"", **headers: str) -> Answer:
    """An answer; `Retry_After="1"` is the header Retry-After."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(_: Asked, handler: BaseHTTPRequestHandler) -> None:
        _begin(handler, status, {"Content-Length": str(len(body)), **given})
        handler.wfile.write(body)

    return answer


def problem(status: int, detail: str = "no", **headers: str) -> Answer:
    document = {"type": "/problems/some", "title": "Some", "status": status, "detail": detail}
    return reply(status, json.dumps(document).encode(), Content_Type="application/problem+json", **headers)


def as_json(value: Any) -> Answer:
    return reply(200, json.dumps(value).encode(), Content_Type="application/json")


def rows(cut: int | None = None, then: Callable[[BufferedIOBase], None] | None = None) -> Answer:
    """The rows asked for, as images (1, 2, 2) that spell the number of their row.

    cut: bytes of rows until it breaks. then: what happens before the connection closes.
    """

    def answer(asked: Asked, handler: BaseHTTPRequestHandler) -> None:
        start, n = asked.body["start"], asked.body["n"]
        images = np.arange(start, start + n, dtype="<u4").view("u1").tobytes()
        length = len(npy_header(n)) + len(images)
        headers = {"Content-Length": str(length), "Sample-Seed": str(asked.body["seed"]), "Sample-Start": str(start)}
        _begin(handler, 200, HEADERS | headers)
        handler.wfile.write(npy_header(n) + images[:cut])
        if then:
            then(handler.rfile)

    return answer


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    """An npy answer of these pieces, whose length nobody announced."""

    def answer(asked: Asked, handler: BaseHTTPRequestHandler) -> None:
        headers = {"Transfer-Encoding": "chunked", "Sample-Seed": "1", "Sample-Start": str(asked.body["start"])}
        _begin(handler, 200, HEADERS | headers)
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(end)

    return answer


def trickle(_: Asked, handler: BaseHTTPRequestHandler) -> None:
    """An answer that never stops coming, a byte at a time."""
    _begin(handler, 200, HEADERS)
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def hang_up(_: Asked, handler: BaseHTTPRequestHandler) -> None:
    """No answer at all."""


def silence(_: Asked, handler: BaseHTTPRequestHandler) -> None:
    """No answer, until the client hangs up."""
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
    """The row numbers that the images of the peer spell."""
    return [int(row) for batch in batches if batch.images is not None for row in batch.images.reshape(-1).view("<u4")]


HTML = reply(502, b"<html>Bad Gateway</html>", Content_Type="text/html; charset=utf-8")
