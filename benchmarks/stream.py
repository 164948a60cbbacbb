"""A reader of large responses, in a process of its own.

python -m benchmarks.stream PORT REQUEST BYTES_PER_SECOND TIMES PART
"""

import json
import subprocess
import sys
import time
from hashlib import sha256
from typing import Any

from benchmarks.connection import Connection
from benchmarks.servers import ROOT, Running, seeded

CHUNK = 1 << 18
HEADER = 128  # bytes of an npy file before its rows


def reader(
    running: Running, rows: int, bytes_per_second: float = float("inf"), times: int = 1, part: int = 0
) -> subprocess.Popen[str]:
    """Start a process reading responses of `rows` rows.

    bytes_per_second: reading speed; default: full speed.
    times: number of responses, read one after the other over one connection.
    part: bytes of rows per digest; 0: no digests.
    """
    request = seeded(running.request(rows), 0).decode()
    arguments = map(str, (running.port, request, bytes_per_second, times, part))
    command = [sys.executable, "-m", "benchmarks.stream", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def seen(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a reader. With several responses, the result is for the response with the median duration.

    Returns: seconds to the last byte, announced and received bytes, and digests.

    Raises: RuntimeError if the response was cut short.
    """
    result: dict[str, Any] = json.loads(process.communicate()[0])
    if result["received"] != result["announced"]:
        raise RuntimeError(f"the response was cut short: {result}")
    return result


class Digests:
    """SHA-256 of each part of a body's rows, in hexadecimal. The first digest is the header's."""

    def __init__(self, part: int) -> None:
        self.found: list[str] = []
        self._part = part
        self._left = HEADER
        self._sha = sha256()

    def update(self, data: memoryview) -> None:
        while self._part and data:
            piece, data = data[: self._left], data[self._left :]
            self._sha.update(piece)
            self._left -= len(piece)
            if not self._left:
                self.found.append(self._sha.hexdigest())
                self._sha, self._left = sha256(), self._part


def main(port: int, request: bytes, bytes_per_second: float, times: int, part: int) -> None:
    with Connection(port) as connection:
        answers = [_read(connection, request, bytes_per_second, part) for _ in range(times)]
    answers.sort(key=lambda answer: answer["seconds"])
    print(json.dumps(answers[times // 2]))


def _read(connection: Connection, request: bytes, bytes_per_second: float, part: int) -> dict[str, Any]:
    start = time.perf_counter()
    announced, body = connection.start(request)
    received, buffer = len(body), memoryview(bytearray(CHUNK))
    digests = Digests(part)
    digests.update(memoryview(body))
    while received < announced and (count := connection.socket.recv_into(buffer)):
        received += count
        digests.update(buffer[:count])
        time.sleep(count / bytes_per_second)
    seconds = time.perf_counter() - start
    found = digests.found[1:]  # without the digest of the header
    return {"announced": announced, "received": received, "seconds": seconds, "digests": found}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].encode(), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
