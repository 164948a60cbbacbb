"""Publication of a run: the artifact, and the files refused by the gate."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save

from reparam.export import publication
from reparam.export.checks import varied_feeds
from reparam.export.config import TrainConfig
from reparam.export.errors import GateError, RunError
from reparam.export.evaluate import evaluate
from reparam.export.gate import gate
from reparam.export.graph import export_sampler
from reparam.export.inspect import inspect
from reparam.export.network import Network
from reparam.export.publication import network_and_contract, publish_run
from reparam.export.run import Run
from reparam.export.train import train
from reparam.export.verify import verify
from reparam.models import MODELS
from reparam.service.artifact.contract import ArtifactError
from reparam.service.artifact.file import load
from tests.conftest import TINY
from tests.graphs import fix_batch, fix_batch_inside, flip_a_bit_of_pixels, nudge_weight, operate, set_metadata

KINDS = list(TINY)


@pytest.mark.parametrize("name", KINDS)
def test_published_artifact_verifies(repository: Path, name: str) -> None:
    checks = verify(repository / name / "1")
    assert len(checks) == 5
    assert sorted(path.name for path in (repository / name / "1").iterdir()) == ["encoder.onnx", "model.onnx"]


@pytest.fixture(scope="module")
def half(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository in float16, with version 9 of `tiny-gaussian` taken, published by a user with umask 077."""
    folder = tmp_path_factory.mktemp("half") / "deep" / "artifacts"
    before = os.umask(0o077)
    try:
        publish_run(runs["tiny-gumbel"], "tiny-gumbel", folder, "float16")
        (folder / "tiny-gaussian" / "9").mkdir(parents=True)
        publish_run(runs["tiny-gaussian"], "tiny-gaussian", folder, "float16")
    finally:
        os.umask(before)
    return folder


HALF = [("tiny-gumbel", "1"), ("tiny-gaussian", "10")]  # name and version


def test_next_version_is_one_above_the_highest(half: Path) -> None:
    assert sorted(path.name for path in (half / "tiny-gaussian").iterdir()) == ["10", "9"]


def test_published_files_are_readable_by_other_users(half: Path) -> None:
    version = half / "tiny-gumbel" / "1"
    folders = [version, version.parent, half, half.parent]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o755}
    assert {file.stat().st_mode & 0o777 for file in version.iterdir()} == {0o644}


@pytest.mark.parametrize(("name", "version"), HALF)
def test_float16_decoder_differs_by_rounding_only(repository: Path, half: Path, name: str, version: str) -> None:
    rounded = load(half / name / version / "model.onnx")
    whole = load(repository / name / "1" / "model.onnx")
    feeds = varied_feeds(rounded.contract, 256, seed=3) | {"temperature": np.ones(256, np.float32)}
    (latents, images, _), (expected_latents, expected_images, _) = (a.run(feeds).values() for a in (rounded, whole))
    np.testing.assert_array_equal(latents, expected_latents)
    assert 0 < np.abs(images - expected_images).max() < 0.02
    assert rounded.contract.precision == "float16"
    assert rounded.size < whole.size
    verify(half / name / version)


def test_gate_refuses_a_float16_decoder_with_other_weights(half: Path, runs: dict[str, Path]) -> None:
    network, _ = network_and_contract(Run(runs["tiny-gaussian"]), "float16")
    files = half / "tiny-gaussian" / "10"
    gate(network, files, exact=True)
    with torch.no_grad():
        next(network.decoder.parameters()).view(-1)[0] += 1e-2
    with pytest.raises(GateError, match=r"weight model\.decoder\.1\.\d\.weight is .* instead of"):
        gate(network, files, exact=True)


def test_decoder_with_float16_overflow_is_refused_with_the_way_out(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["tiny-gaussian"], tmp_path / "run"))
    tensors = load_file(folder / "checkpoint.safetensors")
    name = [name for name in tensors if name.startswith("model.decoder") and name.endswith("weight")][-1]
    tensors[name].view(-1)[0] = 1e6
    (folder / "checkpoint.safetensors").write_bytes(save(tensors, {"epoch": "1"}))
    evaluate(folder, samples=2, rows=20, seed=0)
    with pytest.raises(GateError, match=r"does not fit float16, publish in float32: .*NaN or infinity"):
        publish_run(folder, "m", tmp_path / "artifacts", "float16")
    publish_run(folder, "m", tmp_path / "artifacts")


def test_equal_weights_may_be_stored_once(tmp_path: Path) -> None:
    """Black images leave the biases at zero."""
    np.savez(tmp_path / "black.npz", images=np.zeros((20, 8, 8), np.uint8))
    config = TrainConfig(kind="gaussian", data=str(tmp_path / "black.npz"), epochs=1, width=(4, 4))
    train(config, tmp_path / "run", resume=False, sheet_every=1)
    evaluate(tmp_path / "run", samples=2, rows=None, seed=0)
    assert load(publish_run(tmp_path / "run", "m", tmp_path / "artifacts") / "model.onnx").contract.kind == "gaussian"


def test_no_version_follows_the_last(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "m" / ("9" * 18)).mkdir(parents=True)
    with pytest.raises(GateError, match=r"has no version left after 9{18}"):
        publish_run(runs["tiny-gaussian"], "m", tmp_path)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["9" * 18]


def test_artifact_holds_prior_evaluation_and_origin(repository: Path, runs: dict[str, Path]) -> None:
    contract = load(repository / "tiny-gumbel" / "1" / "model.onnx").contract
    trained = Run(runs["tiny-gumbel"]).trained()
    assert isinstance(trained, MODELS["gumbel"])
    np.testing.assert_array_equal(contract.prior_arrays()["logits"], trained.prior().parameters[0][0].detach().numpy())
    assert contract.default_temperature == 0
    assert contract.evaluation["m"] == 2
    assert contract.trained_on["data"] == "digits"
    assert contract.tools["torch"] == torch.__version__


def test_file_contains_no_paths_of_the_machine(repository: Path) -> None:
    content = (repository / "tiny-gumbel" / "1" / "model.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert b".py" not in content


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("by", [1.0, 1e-6])
def test_gate_refuses_a_decoder_with_another_weight(
    repository: Path, runs: dict[str, Path], name: str, by: float
) -> None:
    network, _ = network_and_contract(Run(runs[name]))
    files = repository / name / "1"
    gate(network, files, exact=True)
    with torch.no_grad():
        next(network.decoder.parameters()).view(-1)[0] += by
    with pytest.raises(GateError, match=r"weight model\.decoder\.\d\.weight is .* instead of"):
        gate(network, files, exact=True)


@pytest.fixture
def files(repository: Path, tmp_path: Path) -> Path:
    """A copy of the files of `tiny-gaussian`."""
    return Path(shutil.copytree(repository / "tiny-gaussian" / "1", tmp_path / "files"))


def test_gate_refuses_an_encoder_with_another_or_a_missing_weight(runs: dict[str, Path], files: Path) -> None:
    network, _ = network_and_contract(Run(runs["tiny-gaussian"]))
    operate(files / "encoder.onnx", files / "encoder.onnx", nudge_weight("model.encoder.0.bias", 1e-3))
    with pytest.raises(GateError, match=r"weight model\.encoder\.0\.bias"):
        gate(network, files, exact=True)
    (files / "encoder.onnx").write_bytes((files / "model.onnx").read_bytes())
    with pytest.raises(GateError, match=r"encoder\.onnx has no weight"):
        gate(network, files, exact=True)


def test_gate_refuses_a_graph_with_a_fixed_batch(runs: dict[str, Path], repository: Path, files: Path) -> None:
    network, _ = network_and_contract(Run(runs["tiny-gaussian"]))
    good = repository / "tiny-gaussian" / "1" / "model.onnx"
    operate(good, files / "model.onnx", fix_batch(2))
    with pytest.raises(ArtifactError, match="fixed batch of 2"):
        gate(network, files, exact=True)
    operate(good, files / "model.onnx", fix_batch_inside)
    with pytest.raises(GateError, match="does not run for 3 rows at temperature 0"):
        gate(network, files, exact=True)


def test_refused_files_are_not_published(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(network: Network) -> onnx.ModelProto:
        proto = export_sampler(network)
        nudge_weight("model.decoder.1.weight", 0.5)(proto)
        return proto

    monkeypatch.setattr(publication, "export_sampler", faulty)
    with pytest.raises(GateError):
        publish_run(runs["tiny-gaussian"], "m", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_verify_refuses_files_with_other_reference_rows(repository: Path, tmp_path: Path) -> None:
    source = repository / "tiny-gaussian" / "1"
    (tmp_path / "encoder.onnx").write_bytes((source / "encoder.onnx").read_bytes())
    operate(source / "model.onnx", tmp_path / "model.onnx", nudge_weight("model.decoder.1.bias", 2.0))
    with pytest.raises(GateError, match="in the reference rows"):
        verify(tmp_path)
    operate(source / "model.onnx", tmp_path / "model.onnx", set_metadata("reparam.reference", "{}"))
    with pytest.raises(GateError, match="in the reference rows"):
        verify(tmp_path)


def test_verify_refuses_a_missing_or_wrong_encoder(repository: Path, tmp_path: Path) -> None:
    source = repository / "tiny-gaussian" / "1"
    (tmp_path / "model.onnx").write_bytes((source / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"encoder\.onnx cannot be read"):
        verify(tmp_path)
    (tmp_path / "encoder.onnx").write_bytes((source / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match="an encoder maps images to mu, log_var"):
        verify(tmp_path)
    (tmp_path / "encoder.onnx").write_bytes((repository / "tiny-gumbel" / "1" / "encoder.onnx").read_bytes())
    with pytest.raises(ArtifactError, match="an encoder maps images to mu, log_var"):
        verify(tmp_path)


def test_run_without_an_evaluation_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "checkpoint.safetensors"):
        (copy / name).write_bytes((runs["tiny-gaussian"] / name).read_bytes())
    with pytest.raises(RunError, match="reparam evaluate"):
        publish_run(copy, "m", tmp_path / "artifacts")
    assert not (tmp_path / "artifacts" / "m").exists()


def test_impossible_name_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"'\.\./m' cannot be a model's name"):
        publish_run(runs["tiny-gaussian"], "../m", tmp_path)


def test_inspect_prints_the_contract(repository: Path) -> None:
    text = inspect(repository / "tiny-gumbel" / "1")
    assert "kind                             gumbel" in text
    assert "noise float (n, 4, 5), logits float (n, 4, 5), temperature float (n)" in text
    assert "20 values from" in text
    assert "0 for every element" in inspect(repository / "tiny-gaussian" / "1")


def test_inspect_and_verify_run_without_torch(repository: Path) -> None:
    artifact = str(repository / "tiny-gumbel" / "1")
    program = (
        "import sys; sys.modules['torch'] = None; from reparam.export.__main__ import main; "
        "main(['inspect', sys.argv[1]]); main(['verify', sys.argv[1]])"
    )
    result = subprocess.run([sys.executable, "-c", program, artifact], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "kind                             gumbel" in result.stdout
    assert "ok: the contract holds: gumbel" in result.stdout


def test_verify_refuses_pixels_other_than_the_images(repository: Path, tmp_path: Path) -> None:
    good = repository / "tiny-gaussian" / "1"
    shutil.copy(good / "encoder.onnx", tmp_path)
    operate(good / "model.onnx", tmp_path / "model.onnx", flip_a_bit_of_pixels)
    with pytest.raises(GateError, match=r"pixels is .* instead of"):
        verify(tmp_path)
