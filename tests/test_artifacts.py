"""Files that break the contract: each is refused by name when it is loaded, and the others are served."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import pytest

from reparam.service.artifact.contract import ArtifactError
from reparam.service.artifact.file import load
from reparam.service.runtime.devices import Device, DeviceError, cuda_fault
from reparam.service.runtime.repository import Repository, open_model
from tests.conftest import Running
from tests.graphs import draw_noise, fix_batch, keep_weights_in, operate, rename_input, set_metadata

Surgery = Callable[[onnx.ModelProto], object]

FAULTS: list[tuple[Surgery, str]] = [
    (rename_input("log_var", "logvar"), "inputs noise, mu, log_var, temperature; this file has noise, mu, logvar"),
    (rename_input("temperature", "tau"), "this file has noise, mu, log_var, tau"),
    (fix_batch(2), "'noise' has a fixed batch of 2"),
    (set_metadata("reparam.prior", None), "no key 'reparam.prior'"),
    (set_metadata("reparam.mixtures", "null"), "'reparam.mixtures' is unknown; reparam.* are: kind, latent_shape"),
    (set_metadata("reparam.latent_shape", "[1000000, 1000000]"), "after the batch axis, not [1000000, 1000000]"),
    (set_metadata("reparam.kind", None), "no key 'reparam.kind'"),
    (set_metadata("reparam.noise_version", "2"), "'reparam.noise_version' is 2"),
    (set_metadata("reparam.kind", '"flow"'), "'reparam.kind' is 'flow'"),
    (set_metadata("reparam.kind", "gaussian"), "'reparam.kind' is not JSON"),
    (set_metadata("reparam.kind", '"gumbel"'), "reparam.prior has ['log_var', 'mu'], a gumbel has ['logits']"),
    (set_metadata("reparam.latent_shape", "[0]"), "'reparam.latent_shape.0' is 0"),
    (set_metadata("reparam.latent_shape", "[4]"), "has shape [3] after the batch axis, not [4]"),
    (set_metadata("reparam.image_shape", "[2, 8, 8]"), "'reparam.image_shape.0' is 2"),
    (set_metadata("reparam.default_temperature", "NaN"), "'reparam.default_temperature' is nan"),
    (set_metadata("reparam.default_temperature", "1e39"), "'reparam.default_temperature' is 1e+39"),
    (set_metadata("reparam.prior", '{"mu": [0, 0], "log_var": 0}'), "reparam.prior does not fit the shape [3]"),
    (set_metadata("reparam.prior", '{"mu": "x", "log_var": 0}'), "reparam.prior does not fit the shape [3]"),
    (set_metadata("reparam.prior", '{"mu": NaN, "log_var": 0}'), "reparam.prior holds NaN or infinity"),
    (set_metadata("reparam.prior", '{"mu": 1e30, "log_var": 200}'), "holds NaN or infinity for the prior"),
    (keep_weights_in("../../../outside.bin"), "keeps weights in another file"),
    (keep_weights_in("/etc/hostname"), "keeps weights in another file"),
    (keep_weights_in("beside.bin"), "keeps weights in another file"),
    (draw_noise, "the graph draws noise"),
]  # fmt: skip


@pytest.fixture
def good(repository: Path) -> Path:
    return repository / "tiny-gaussian" / "1" / "model.onnx"


@pytest.mark.parametrize(("surgery", "fault"), FAULTS)
def test_a_broken_contract_is_refused_by_name(good: Path, tmp_path: Path, surgery: Surgery, fault: str) -> None:
    (tmp_path / "beside.bin").write_bytes(bytes(4096))
    path = operate(good, tmp_path / "model.onnx", surgery)
    with pytest.raises(ArtifactError) as refusal:
        load(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert fault in str(refusal.value)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(good: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "model.onnx").write_bytes(good.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"model\.onnx: "):
        load(tmp_path / "model.onnx")


def test_a_sampler_of_another_type_or_output_is_refused(repository: Path, tmp_path: Path) -> None:
    encoder = repository / "tiny-gaussian" / "1" / "encoder.onnx"
    metadata = onnx.load(repository / "tiny-gaussian" / "1" / "model.onnx").metadata_props

    def dress_up(model: onnx.ModelProto) -> None:
        model.metadata_props.extend(metadata)

    with pytest.raises(ArtifactError, match="this file has images"):
        load(operate(encoder, tmp_path / "model.onnx", dress_up))

    def widen(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE

    with pytest.raises(ArtifactError, match="no ONNX file that onnxruntime can run"):
        load(operate(repository / "tiny-gaussian" / "1" / "model.onnx", tmp_path / "wide.onnx", widen))


def test_pixels_of_the_wrong_type_are_refused(good: Path, tmp_path: Path) -> None:
    def as_float(model: onnx.ModelProto) -> None:
        (cast,) = (node for node in model.graph.node if "pixels" in node.output)
        cast.attribute[0].i = onnx.TensorProto.FLOAT
        model.graph.output[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT

    with pytest.raises(ArtifactError, match=r"output 'pixels' is tensor\(float\), not tensor\(uint8\)"):
        load(operate(good, tmp_path / "model.onnx", as_float))


def test_good_files_are_served_and_readyz_names_the_bad_ones(
    serve: Callable[..., Running], good: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    for version in ("1", "3"):
        (folder / "digits" / version).mkdir(parents=True)
        shutil.copy(good, folder / "digits" / version)
    (folder / "digits" / "10").mkdir()
    (folder / "digits" / "10" / "model.onnx").write_bytes(good.read_bytes()[:1000])
    operate(good, folder / "unnamed" / "1" / "model.onnx", set_metadata("reparam.kind", None))
    (folder / "hollow" / "1").mkdir(parents=True)
    (folder / "digits" / ".partial-x").mkdir()
    (folder / "digits" / "notes.txt").write_text("not a version")
    (folder / "digits" / "03").mkdir()
    shutil.copytree(folder / "digits" / "1", folder / "digits" / "v4")
    shutil.copytree(folder / "digits", folder / "my digits")
    (folder / "lost+found").mkdir()
    latin = folder / os.fsdecode(b"caf\xe9")
    shutil.copytree(folder / "digits", latin)
    (folder / "outside" / "1").mkdir(parents=True)
    (folder / "outside" / "1" / "model.onnx").symlink_to(good)
    (folder / "inside" / "1").mkdir(parents=True)
    (folder / "inside" / "1" / "model.onnx").symlink_to(folder / "digits" / "1" / "model.onnx")

    service = serve(artifacts=folder, default_model="digits")
    ready = service.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["models"] == {"digits": [1, 3], "inside": [1]}
    refused = ready.json()["refused"]
    misnamed = {f"{name}/{version}" for name in ("my digits", "caf\\udce9") for version in ("1", "3", "10", "v4")}
    assert set(refused) == {"digits/10", "digits/v4", "unnamed/1", "hollow/1", "outside/1"} | misnamed
    assert "a version is a whole number" in refused["digits/v4"]
    assert all("begins with a letter or digit: rename the folder" in refused[label] for label in misnamed)
    assert "truncated" in refused["digits/10"]
    assert "no key 'reparam.kind'" in refused["unnamed/1"]
    assert "cannot be read: No such file" in refused["hollow/1"]
    assert "a link leads out of the repository" in refused["outside/1"]
    assert service.post({}).json()["version"] == 3
    assert service.post({"version": 1}).json()["version"] == 1
    assert "reparam_models_refused 13.0" in service.get("/metrics").text
    detail = service.post({"model": "hollow"}).json()["detail"]
    assert detail == "refused model 'hollow': /readyz says why; this server has: digits, inside"
    detail = service.post({"version": 10}).json()["detail"]
    assert detail == "model 'digits' has no version 10: it is refused, /readyz says why; this server has: 1, 3"


def test_a_file_that_breaks_its_reader_does_not_affect_others(
    serve: Callable[..., Running], good: Path, tmp_path: Path
) -> None:
    huge = set_metadata("reparam.prior", '{"mu": 1' + "0" * 400 + ', "log_var": 0}')
    operate(good, tmp_path / "a-huge" / "1" / "model.onnx", huge)
    deep = set_metadata("reparam.trained_on", "[" * 100_000)
    operate(good, tmp_path / "b-deep" / "1" / "model.onnx", deep)
    (tmp_path / "c-loop").mkdir()
    (tmp_path / "c-loop" / "1").symlink_to(tmp_path / "c-loop" / "1")
    (tmp_path / "d-pipe" / "1").mkdir(parents=True)
    os.mkfifo(tmp_path / "d-pipe" / "1" / "model.onnx")
    (tmp_path / "z-good" / "1").mkdir(parents=True)
    shutil.copy(good, tmp_path / "z-good" / "1")
    service = serve(artifacts=tmp_path, default_model=None)
    ready = service.get("/readyz").json()
    assert ready["models"] == {"z-good": [1]}
    assert set(ready["refused"]) == {"a-huge/1", "b-deep/1", "c-loop/1", "d-pipe/1"}
    assert service.get("/livez").status_code == service.post().status_code == 200


def test_a_missing_repository_is_named(serve: Callable[..., Running], tmp_path: Path) -> None:
    service = serve(artifacts=tmp_path / "none")
    assert str(tmp_path / "none") in service.get("/readyz").json()["refused"]["*"]


def test_without_the_default_model_the_service_is_not_ready(serve: Callable[..., Running]) -> None:
    service = serve(default_model="gone")
    ready = service.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "no default model")
    assert ready.json()["refused"]["REPARAM_DEFAULT_MODEL"].startswith("gone is not served; there are: tiny-gaussian")
    assert service.post({}).status_code == 404
    assert service.post({"model": "tiny-gumbel"}).status_code == 200
    assert service.get("/models").json()["default"] == "gone"


def test_a_folder_that_cannot_be_read_does_not_affect_others(good: Path) -> None:
    device, repository = Device("cpu", (("CPUExecutionProvider",),), "chosen by the test"), Repository()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("closed", "lost+found", "open"):
            (folder / name / "1").mkdir(parents=True)
            shutil.copy(good, folder / name / "1")
            (folder / name).chmod(0o755 if name == "open" else 0)
        (folder / "linked").symlink_to(folder / "closed" / "1")
        (folder / "long").symlink_to("x" * 300)
        (folder / "open" / "private").mkdir(mode=0o700)
        folder.chmod(0o755)
        with as_ordinary_user():
            repository.load(folder, device, 64, 0.001)
        assert (list(repository.models), list(repository.refused)) == (["open"], ["closed"])
        assert "cannot be read: Permission denied" in repository.refused["closed"]

        folder.chmod(0)
        with as_ordinary_user():
            repository.load(folder, device, 64, 0.001)
        assert "cannot be read (Permission denied): set REPARAM_ARTIFACTS" in repository.refused["*"]
        folder.chmod(0o755)
        (folder / "closed").chmod(0o755)
        (folder / "lost+found").chmod(0o755)


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Give up the rights of root, who may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_models_are_loaded_by_the_thread_of_the_first_runner(
    serve: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA graphs belong to the thread that has captured them, and a GPU has one runner."""
    with caplog.at_level("INFO"):
        serve()
    loaded = [record for record in caplog.records if record.message == "model loaded"]
    assert loaded
    assert {record.threadName for record in loaded} == {"runner 0"}


def test_a_model_runs_with_the_first_providers_that_can_run_it(good: Path) -> None:
    unusable, cpu = (42,), ("CPUExecutionProvider",)
    model = open_model("some", 1, good, Device("cpu", (unusable, cpu), reason=""), max_rows=4, seconds=1)
    assert model.artifact.provider == "CPUExecutionProvider"
    with pytest.raises(ArtifactError, match=r"model\.onnx: .*must be either strings"):
        open_model("some", 1, good, Device("cpu", (unusable,), reason=""), max_rows=4, seconds=1)


def test_a_gpu_that_fails_after_a_model_was_tried_ends_the_loading(good: Path) -> None:
    """A machine without a GPU behaves like one whose GPU has failed."""
    unusable, cpu = (42,), ("CPUExecutionProvider",)
    device = Device("cuda", (unusable, cpu), reason="")
    if cuda_fault():
        with pytest.raises(
            DeviceError, match=r"model 'tiny-gaussian' version 1, and since then .* REPARAM_CUDA_GRAPHS=false"
        ):
            Repository().load(good.parents[2], device, max_rows=4, seconds=1)
    else:
        assert open_model("some", 1, good, device, max_rows=4, seconds=1).version == 1


def test_a_graph_with_a_loop_is_not_steady(repository: Path) -> None:
    assert load(repository / "tiny-gaussian" / "1" / "model.onnx").steady
    assert not load(repository / "trouble" / "1" / "model.onnx").steady
