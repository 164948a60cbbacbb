"""The compared servers: commands and requests."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import sample
from socket import create_server
from subprocess import Popen

from benchmarks.connection import Connection
from benchmarks.environments import environment
from benchmarks.model import model
from benchmarks.processes import running

ROOT = Path(__file__).parents[1]
SCRATCH = ROOT / ".bench"  # the model, environments and logs
SEED = "SEED"  # placeholder for the seed in a request
PIXELS = 28 * 28
START_SECONDS = 120


@dataclass(frozen=True)
class Server:
    """A server: command and request."""

    name: str
    command: tuple[str, ...]  # the first word is a program in the server's environment
    path: str
    body: str  # with the placeholders SEED and ROWS
    accept: str = "*/*"
    peer: bool = True  # needs an environment of its own
    draws: bool = True  # responses differ by seed


def _peer(name: str, path: str, body: str, command: tuple[str, ...] = ()) -> Server:
    return Server(name, command or ("python", "-m", f"benchmarks.peers.{name}.server"), path, body)


OURS = '{"n":ROWS,"seed":SEED}'
PLAIN = '{"seed":SEED,"rows":ROWS}'
BENTOML = ("bentoml", "serve", "benchmarks.peers.bentoml.server:Decoder")
# The binary tensor data extension: the response is a short JSON, then the raw pixels.
TRITON = (
    '{"inputs":[{"name":"REQUEST","datatype":"UINT64","shape":[1,2],"data":[SEED,ROWS]}],'
    '"parameters":{"binary_data_output":true}}'
)
SERVERS = {
    server.name: server
    for server in (
        Server("reparam", ("reparam", "serve"), "/sample", OURS, accept="application/x-npy", peer=False),
        _peer("triton", "/v2/models/decoder/infer", TRITON),
        _peer("litserve", "/predict", PLAIN),
        _peer("bentoml", "/sample", '{"requests":[[SEED,ROWS]]}', BENTOML),
        _peer("ray", "/", PLAIN),
        Server("bare", ("python", "-m", "benchmarks.peers.bare"), "/", OURS, peer=False, draws=False),
        Server("route", ("python", "-m", "benchmarks.peers.route"), "/", OURS, peer=False, draws=False),
        Server("noop", ("python", "-m", "benchmarks.peers.noop"), "/", OURS, peer=False, draws=False),
    )
}


@dataclass
class Running:
    """A running server."""

    server: Server
    process: Popen[bytes]
    port: int
    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.server.path}"

    def request(self, rows: int) -> str:
        """A whole HTTP request with the placeholder SEED for a seed of ten digits."""
        body = self.server.body.replace("ROWS", str(rows))
        length = len(body.replace(SEED, "0" * 10))
        head = (
            f"POST {self.server.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAccept: {self.server.accept}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
        return head + body

    def connect(self) -> Connection:
        return Connection(self.port)

    def answer_bytes(self, rows: int) -> int:
        """Length of the body of a response; every response has the same length.

        The first call checks the responses of three seeds.

        Raises: RuntimeError if the responses do not depend on the seed as expected.
        """
        if rows not in self.sizes:
            with self.connect() as connection:
                one, again, other = (connection.ask(seeded(self.request(rows), seed)) for seed in (1, 1, 2))
            if len(one) < rows * PIXELS or one != again or (one == other) == self.server.draws:
                raise RuntimeError(f"{self.server.name} does not respond with {rows} rows determined by the seed")
            self.sizes[rows] = len(one)
        return self.sizes[rows]


def seeded(request: str, seed: int) -> bytes:
    """The request with a seed in place of the placeholder."""
    return request.replace(SEED, str(1_000_000_000 + seed)).encode()


@contextmanager
def serving(name: str, checkout: Path = ROOT) -> Iterator[Running]:
    """Start a server, wait for the first response, and stop the server at the end of the block.

    checkout: of Reparam, whose service is started
    """
    server = SERVERS[name]
    programs = Path(sys.executable).parent
    if server.peer:
        programs = environment(ROOT / "benchmarks" / "peers" / name / "requirements.txt", SCRATCH / name)
    port = _free_port()
    variables = {
        "PORT": str(port),
        "BENTOML_PORT": str(port),
        "BENTOML_HOST": "127.0.0.1",
        "MODEL": str(model_path()),
        "SCRATCH": str(SCRATCH),
        "PYTHONPATH": str(checkout),
        "REPARAM_PORT": str(port),
        "REPARAM_ARTIFACTS": str(SCRATCH / "artifacts"),
    }
    program, *arguments = server.command
    if checkout != ROOT and not (checkout / "reparam" / "service").exists():  # older than `reparam serve`
        program, *arguments = "python", "-m", "service"
    log = SCRATCH / "logs" / f"{name}.log"
    with running([str(programs / program), *arguments], variables, checkout, log) as process:
        started = Running(server, process, port)
        _wait_until_it_answers(started, log)
        yield started


def model_path() -> Path:
    """Path of the model file."""
    return model(ROOT, SCRATCH)


def _free_port() -> int:
    """A free port not used by other programs before the server starts.

    Ray's processes listen at 10002 to 19999; the system assigns ports from 32768 on.
    """
    ports = range(20000, 32768)
    for port in sample(ports, len(ports)):  # in random order, so that two benchmarks can start together
        with suppress(OSError), create_server(("127.0.0.1", port)):
            return port
    raise OSError("each port from 20000 to 32767 of 127.0.0.1 is taken: end the programs that listen there")


def _wait_until_it_answers(started: Running, log: Path) -> None:
    """Wait until the server responds without an error for a second: Ray Serve's proxy restarts after its first
    responses.
    """
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            started.answer_bytes(1)
            with started.connect() as connection:
                settled = time.monotonic() + 1
                while time.monotonic() < settled:
                    connection.ask(seeded(started.request(1), 0))
        except (OSError, EOFError) as error:
            if time.monotonic() > end or started.process.poll() is not None:
                raise RuntimeError(f"{started.server.name} does not respond; see {log}") from error
            time.sleep(0.2)
        else:
            return
