"""Real parts for every test: two VAEs trained for an epoch on real digits, and servers in threads."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

try:
    import httpx
except ModuleNotFoundError:  # the tests of the client also run where only httpx2 is installed
    import httpx2 as httpx  # type: ignore[no-redef]  # both have the interface used here

from reparam.export.config import TrainConfig
from reparam.export.evaluate import evaluate
from reparam.export.prior import fit_prior
from reparam.export.publication import publish_run
from reparam.export.train import train
from reparam.service.app import create_app
from reparam.service.lifespan import Lifespan
from reparam.service.operations import OPERATIONS
from reparam.service.operations.operation import Operation
from reparam.service.process.server import Server
from reparam.service.settings import Settings
from tests.graphs import make_trouble
from tests.load import HOLD, TLS, is_at_rest

TINY: dict[str, dict[str, Any]] = {
    "tiny-gaussian": {"kind": "gaussian", "latent_shape": (3,)},
    "tiny-gumbel": {"kind": "gumbel", "latent_shape": (4, 5)},
}
KINDS = ["gaussian", "gumbel"]
COMPONENTS = 3  # of the mixtures that are fitted to the tiny runs


@dataclass
class Running:
    """A server on a port of 127.0.0.1."""

    url: str
    lifespan: Lifespan
    server: Server

    def post(self, body: Any = None, path: str = "/sample", **arguments: Any) -> httpx.Response:
        """POST with a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=60, verify=TLS, **arguments)

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, verify=TLS, **arguments)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained and evaluated run of each kind."""
    folders = {}
    for name, options in TINY.items():
        folders[name] = tmp_path_factory.mktemp("runs") / name
        config = TrainConfig(data="digits", epochs=1, width=(8,), **options)
        train(config, folders[name], resume=False, sheet_every=1)
        evaluate(folders[name], samples=2, rows=50, seed=0)
    return folders


@pytest.fixture(scope="session")
def repository(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `tiny-gaussian`, `tiny-gumbel`, and `trouble`, whose temperature decides how it fails."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, run in runs.items():
        publish_run(run, name, folder)
    make_trouble(folder / "tiny-gaussian" / "1" / "model.onnx", folder / "trouble" / "1" / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def fitted(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny runs, by kind, with a mixture fitted to each."""
    folders = {kind: tmp_path_factory.mktemp("fitted") / kind for kind in KINDS}
    for kind, folder in folders.items():
        shutil.copytree(runs[f"tiny-{kind}"], folder)
        fit_prior(folder, components=COMPONENTS, seed=0)
        evaluate(folder, samples=2, rows=50, seed=0)
    return folders


@pytest.fixture(scope="session")
def mixed(fitted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of those, each named by its kind."""
    repository = tmp_path_factory.mktemp("mixed")
    for kind, folder in fitted.items():
        publish_run(folder, kind, repository)
    return repository


@pytest.fixture(scope="session")
def serve(repository: Path) -> Iterator[Callable[..., Running]]:
    """Start a server with these settings; it runs until the tests end."""
    started: list[tuple[Running, threading.Thread]] = []

    def start(operations: Sequence[Operation] = OPERATIONS, **settings: Any) -> Running:
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        chosen = Settings(**{"artifacts": repository, "default_model": "tiny-gaussian", **settings})
        app = create_app(chosen, operations=operations)
        server = Server(app, chosen)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app.reparam, server)
        started.append((running, thread))
        wait_until(lambda: server.started and running.lifespan.state != "starting")
        return running

    yield start
    for running, _ in started:
        running.server.should_exit = True
    for _, thread in started:
        thread.join(120)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def service(serve: Callable[..., Running]) -> Running:
    """A server with the default settings."""
    return serve()


@pytest.fixture
def engine(serve: Callable[..., Running], request: pytest.FixtureRequest) -> Iterator[Running]:
    """A fresh server with one runner, or `param` runners, that also offers `/hold`. It must be at rest in the end."""
    service = serve(runners=getattr(request, "param", 1), operations=(*OPERATIONS, HOLD), request_timeout=300)
    yield service
    wait_until(lambda: is_at_rest(service))
    assert service.get("/livez").status_code == 200
    assert service.post({}).status_code == 200


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits at most a millisecond before its first retry."""
    monkeypatch.setattr("reparam._calls.FIRST_BACKOFF", 0.001)


def small(**options: Any) -> TrainConfig:
    """A training of a moment, but for these options."""
    return TrainConfig(**{"kind": "gaussian", "data": "digits", "epochs": 1, "width": (4,), **options})


def metric(url: str, name: str, **labels: str) -> float:
    """Read the value of a metric of a service, 0 if it was never counted."""
    wanted = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    start = f"reparam_{name}{{{wanted}}} " if labels else f"reparam_{name} "
    lines = httpx.get(f"{url}/metrics", timeout=60, verify=TLS).text.splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until the condition holds. A healthy run ends long before `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
