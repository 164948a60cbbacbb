"""The commands of the client, as typed."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reparam import Client
from reparam._cli import main
from tests.conftest import Running
from tests.peer import Peer, Received, as_json, problem, rows, silence


def test_png_is_a_contact_sheet_and_the_printed_command_repeats_it(
    service: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my rows.png"
    assert main(["sample", "-n", "5", "-o", str(path), "--url", service.url]) == 0
    printed, again = capsys.readouterr().out.split("; the same again:\n")
    assert printed == f"{path}: 5 rows of tiny-gaussian"
    before = path.read_bytes()
    path.unlink()
    program, *arguments = shlex.split(again)
    assert (program, main(arguments)) == ("reparam", 0)
    assert path.read_bytes() == before
    with Image.open(path) as picture:
        assert picture.size == (32, 22)


def test_the_printed_command_has_every_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Peer(rows()) as peer:
        chosen = ["--hard", "--temperature", "0.5", "--start", "4", "--seed", "9", "--output", "images"]
        monkeypatch.setenv("REPARAM_URL", peer.url)
        assert main(["sample", "-o", str(tmp_path / "x.npy"), *chosen]) == 0
    again = (
        "reparam sample -n 1 --model peer --version 3 --temperature 0.5 --hard --seed 9 --start 4 --output images -o"
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"{again} {tmp_path / 'x.npy'}"


def test_npy_is_streamed_into_an_array(service: Running, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    options = ["--seed", "3", "--start", "9", "--output", "latents", "--temperature", "0.5", "--version", "1"]
    assert main(["sample", "-n", "3000", "-o", str(path), "--url", service.url, *options]) == 0
    with Client(service.url) as client:
        whole = client.sample(3000, seed=3, start=9, outputs="latents", temperature=0.5).latents
    np.testing.assert_array_equal(np.load(path), whole)


def test_an_array_larger_than_a_batch_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    with Peer(rows(2**21 + 3), rows()) as peer:
        assert main(["sample", "-n", "600_000", "-o", str(path), "--url", peer.url]) == 0
    np.testing.assert_array_equal(np.load(path).reshape(-1).view("<u4"), np.arange(600_000))


def test_two_writers_of_one_file_each_write_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"

    def other(request: Received, handler: BaseHTTPRequestHandler) -> None:
        command = [sys.executable, "-m", "reparam", "sample", "-n", "3", "-o", str(path), "--url", peer.url]
        subprocess.run(command, check=True, timeout=60)
        assert path.exists()
        rows()(request, handler)

    with Peer(other, rows()) as peer:
        assert main(["sample", "-n", "9", "--start", "5", "-o", str(path), "--url", peer.url]) == 0
    np.testing.assert_array_equal(np.load(path).reshape(-1).view("<u4"), np.arange(5, 14))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.npy"]


def test_npz_holds_each_output_by_name(service: Running, tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    named = ["--model", "tiny-gumbel", "--hard", "--output", "codes", "--output", "indices"]
    assert main(["sample", "-n", "4", "-o", str(path), "--url", service.url, *named]) == 0
    with np.load(path) as archive:
        assert {name: archive[name].shape for name in archive} == {"codes": (4, 4, 5), "indices": (4, 4)}


def test_models_are_listed_as_a_table(
    service: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPARAM_URL", service.url)
    assert main(["models"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "version", "kind", "latent", "image", "temperature"]
    assert first.split() == ["tiny-gaussian", "1", "gaussian", "3", "1x8x8", "1"]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPARAM_API_KEY", "sesame")
    with Peer(as_json({"models": [], "default": None})) as peer:
        assert main(["models", "--url", peer.url]) == 0
    assert peer.requests[0].headers["authorization"] == "Bearer sesame"


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Peer(problem(404, "unknown model 'x'")) as peer:
        assert main(["sample", "-o", str(tmp_path / "x.png"), "--model", "x", "--url", peer.url]) == 1
    assert capsys.readouterr().err == "reparam: 404 Some: unknown model 'x'\n"


def test_a_stream_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "rows.npy").write_bytes(b"old")
    with Peer(rows(40), problem(404)) as peer:
        assert main(["sample", "-n", "99", "-o", str(tmp_path / "rows.npy"), "--url", peer.url]) == 1
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("rows.npy", b"old")]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png"])
def test_an_impossible_path_is_refused_in_one_line_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    with Peer(rows()) as peer:
        for place in (tmp_path / "none" / f"x{suffix}", tmp_path / f"folder{suffix}"):
            assert main(["sample", "-o", str(place), "--url", peer.url]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"reparam: [Errno 2] no such folder: '{tmp_path / 'none'}'",
        f"reparam: [Errno 21] a folder has this name: '{tmp_path / f'folder{suffix}'}'",
    ]
    assert peer.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "x.gif"], "-o must end in .npy, .npz, .png, got 'x.gif'"),
        (["-o", "x.npy", "--output", "codes", "--output", "images"], ".npy holds one output, got codes, images"),
        (["-o", "x.png", "--output", "codes"], ".png holds images, got codes; write a .npy"),
        (["-o", "x.png", "-n", "0"], "n must be at least 1, got 0"),
        (["-o", "x.png", "--url", "localhost"], "base_url must look like http://127.0.0.1:8000, got 'localhost'"),
        ([], "the following arguments are required: -o"),
    ],
)
def test_wrong_usage_exits_with_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["sample", *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even if the tests were started with SIGINT ignored, as background jobs are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_neither_file_nor_traceback(tmp_path: Path, number: int, status: int) -> None:
    def interrupt(request: Received, handler: BaseHTTPRequestHandler) -> None:
        os.kill(os.getpid(), number)
        silence(request, handler)

    with Peer(interrupt) as peer, pytest.raises(SystemExit) as ended:
        sys.exit(main(["sample", "-o", str(tmp_path / "x.npy"), "--url", peer.url]))
    assert ended.value.code == status
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_like_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "reparam", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == version("reparam")
