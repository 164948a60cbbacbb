"""Load on a service during a test: a runner that is kept busy, and clients that sample."""

import contextlib
import io
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

try:
    import httpx
except ModuleNotFoundError:  # the tests of the client also run where only httpx2 is installed
    import httpx2 as httpx  # type: ignore[no-redef]  # both have the interface used here

from reparam.service.artifact.outputs import OUTPUTS, Output
from reparam.service.errors import InvalidRequest, Problem
from reparam.service.operations.operation import Operation, response_model
from reparam.service.runtime.graphs import Graph
from reparam.service.runtime.repository import Repository
from reparam.service.runtime.sampler import SamplerInputs

if TYPE_CHECKING:
    from tests.conftest import Running

TLS = ssl.create_default_context()  # httpx would make one for each client, which takes longer than a request
NPY = {"Accept": "application/x-npy"}
LONGEST = 300.0  # seconds after which a gate opens, so that a test that has failed ends

FACTS = ("model", "version", "n")
Place = Literal["run", "die", "encode"]


@dataclass
class Gate:
    """Keeps a request to `/hold` at one place until it opens.

    place: the run of a batch on a runner, which may end the runner's thread, or the encoding of the response.
    n: rows of the request.
    is_reached: set when the request has come to the gate.
    is_open: set to let the request go on.
    passages: how often the request has come to the gate.
    """

    place: Place = "run"
    n: int = 1
    is_reached: threading.Event = field(default_factory=threading.Event)
    is_open: threading.Event = field(default_factory=threading.Event)
    passages: int = 0

    @property
    def body(self) -> dict[str, int]:
        """The JSON body of the request."""
        return {"gate": GATES.index(self)}

    def wait(self) -> None:
        self.passages += 1
        self.is_reached.set()
        self.is_open.wait(LONGEST)

    def await_request(self) -> None:
        assert self.is_reached.wait(60)


GATES: list[Gate] = []


@contextlib.contextmanager
def gate(place: Place = "run", n: int = 1) -> Iterator[Gate]:
    """Make a gate, which opens at the end."""
    made = Gate(place, n)
    GATES.append(made)
    try:
        yield made
    finally:
        made.is_open.set()


@contextlib.contextmanager
def occupied(service: "Running", status: int = 200, **headers: str) -> Iterator[Future[httpx.Response]]:
    """Keep a runner busy until the end. Yields the response of the request that does so, which has this status."""
    with ThreadPoolExecutor(1) as pool:
        with gate() as held:
            response = pool.submit(service.post, held.body, path="/hold", headers=headers)
            held.await_request()
            yield response
        assert response.result().status_code == status


class HoldRequest(BaseModel):
    """The gate to stop at."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    gate: int
    """Index in GATES."""


@dataclass(slots=True, eq=False)
class Held:
    """Rows of the `trouble` model, which no event loop runs, because the time of its runs varies."""

    graph: Graph
    gate: Gate
    outputs: tuple[Output, ...] = (OUTPUTS["images"],)

    @property
    def n(self) -> int:
        return self.gate.n

    def fill(self, inputs: SamplerInputs, lo: int, hi: int, at: int) -> None:
        if self.gate.place != "encode":
            self.gate.wait()
        if self.gate.place == "die":
            raise SystemExit  # no Exception, which the runner would survive
        inputs.draw(at, hi - lo, seed=0, start=lo, temperature=1.0, prior="standard")

    def facts(self) -> dict[str, Any]:
        if self.gate.place == "encode":
            self.gate.wait()
        return {"model": self.graph.model, "version": self.graph.version, "n": self.n}

    def describe(self, lo: int, hi: int) -> str:
        return f"held rows {lo} .. {hi - 1}"

    def log_fields(self, lo: int, hi: int) -> dict[str, Any]:
        return {"held": hi - lo}

    def with_defaults(self) -> "Held":
        return self

    def overflow(self) -> Problem:
        return InvalidRequest("held rows do not overflow")


def resolve(request: HoldRequest, repository: Repository, _: int) -> Held:
    return Held(repository.find("trouble", None).sampler, GATES[request.gate])


HOLD = Operation(
    path="/hold",
    summary="Wait at a gate",
    description="Keep a runner or an encoder busy until a test lets it go on.",
    request=HoldRequest,
    response=response_model("HoldResponse", FACTS, ("images",), "The rows of the trouble model."),
    resolve=resolve,
    facts=FACTS,
)


@contextlib.contextmanager
def bystanders(service: "Running", clients: int = 2) -> Iterator[None]:
    """Let clients sample the same rows again and again meanwhile. The block fails if a response differs."""
    body = {"model": "tiny-gaussian", "seed": 5, "n": 3}
    expected = service.post(body, headers=NPY).content
    done = threading.Event()

    def sample() -> None:
        with httpx.Client(timeout=60, verify=TLS) as client:
            while not done.wait(0.005):
                response = client.post(f"{service.url}/sample", json=body, headers=NPY)
                assert (response.status_code, response.content) == (200, expected)

    with ThreadPoolExecutor(clients) as pool:
        sampling = [pool.submit(sample) for _ in range(clients)]
        try:
            yield
        finally:
            done.set()
        for future in sampling:
            future.result()


def is_at_rest(service: "Running") -> bool:
    """Tell whether no request is in the engine and nothing is queued, reserved or running."""
    engine = service.lifespan.engine
    return not (engine.jobs or engine.queued_rows or engine.admission.reserved_bytes or engine.busy)


def rows_of(response: httpx.Response) -> npt.NDArray[Any]:
    """Read the array of an npy response."""
    assert response.status_code == 200, response.text
    rows: npt.NDArray[Any] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return rows


def await_watch(service: "Running", n: int | None) -> None:
    """Wait until a request has taken so long that the engine watches its client for a disconnect.

    n: rows of the request; None for a request whose body is not whole
    """
    deadline = time.monotonic() + 120
    while not any(
        job.ticks >= 2 and n == (job.work.n if job.has_started else None) for job in list(service.lifespan.engine.jobs)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
