"""One large answer, read in a process of its own: python -m benchmarks.stream PORT REQUEST BYTES_PER_SECOND TIMES"""

import json
import subprocess
import sys
import time

from benchmarks.connection import Connection
from benchmarks.servers import ROOT, Running, seeded

CHUNK = 1 << 18


def reader(
    running: Running, rows: int, bytes_per_second: float = float("inf"), times: int = 1
) -> subprocess.Popen[str]:
    """Start to read an answer of so many rows, as fast as it comes unless a speed is given; and again, over the same
    connection."""
    request = seeded(running.request(rows), 0).decode()
    arguments = map(str, (running.port, request, bytes_per_second, times))
    command = [sys.executable, "-m", "benchmarks.stream", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def seen(process: subprocess.Popen[str]) -> dict[str, float]:
    """What a reader saw when it ends: seconds to the first bytes and to the last, of several answers that which took
    the median. Fails if it was cut short."""
    result: dict[str, float] = json.loads(process.communicate()[0])
    if result["received"] != result["announced"]:
        raise RuntimeError(f"the answer was cut short: {result}")
    return result


def main(port: int, request: bytes, bytes_per_second: float, times: int) -> None:
    with Connection(port) as connection:
        answers = [_read(connection, request, bytes_per_second) for _ in range(times)]
    answers.sort(key=lambda answer: answer["seconds"])
    print(json.dumps(answers[times // 2]))


def _read(connection: Connection, request: bytes, bytes_per_second: float) -> dict[str, float]:
    start = time.perf_counter()
    announced, body = connection.start(request)
    first, received, buffer = time.perf_counter() - start, len(body), bytearray(CHUNK)
    while received < announced and (count := connection.socket.recv_into(buffer)):
        received += count
        time.sleep(count / bytes_per_second)
    return {"announced": announced, "received": received, "first": first, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].encode(), float(sys.argv[3]), int(sys.argv[4]))
