"""One large answer, read in a process of its own: python -m benchmarks.stream PORT REQUEST [BYTES_PER_SECOND]"""

import json
import subprocess
import sys
import time

from benchmarks.connection import Connection
from benchmarks.servers import ROOT, Running, seeded

CHUNK = 1 << 18


def reader(running: Running, rows: int, *bytes_per_second: float) -> subprocess.Popen[str]:
    """Start to read an answer of so many rows, as fast as it comes unless a speed is given."""
    request = seeded(running.request(rows), 0).decode()
    command = [sys.executable, "-m", "benchmarks.stream", str(running.port), request, *map(str, bytes_per_second)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def seen(process: subprocess.Popen[str]) -> dict[str, float]:
    """What a reader saw when it ends: seconds to the first bytes and to the last. Fails if the answer was cut short."""
    result: dict[str, float] = json.loads(process.communicate()[0])
    if result["received"] != result["announced"]:
        raise RuntimeError(f"the answer was cut short: {result}")
    return result


def main(port: int, request: bytes, bytes_per_second: float) -> None:
    start = time.perf_counter()
    with Connection(port) as connection:
        announced, body = connection.start(request)
        first, received, buffer = time.perf_counter() - start, len(body), bytearray(CHUNK)
        while received < announced and (count := connection.socket.recv_into(buffer)):
            received += count
            time.sleep(count / bytes_per_second)
    seconds = time.perf_counter() - start
    print(json.dumps({"announced": announced, "received": received, "first": first, "seconds": seconds}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].encode(), float(sys.argv[3]) if sys.argv[3:] else float("inf"))
