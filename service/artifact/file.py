"""The artifact: one ONNX file with a sampler and the sampler's contract. No other module opens such a file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from reparam.service.artifact import noise
from reparam.service.artifact.contract import Arrays, ArtifactError, Contract

CPU = "CPUExecutionProvider"
Providers = Sequence[Any]  # each entry is a name, or a name and options

MODEL_FILE, ENCODER_FILE = "model.onnx", "encoder.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VERSION = re.compile(r"[1-9][0-9]{0,17}")
COMPONENTS_PER_RUN = 64  # mixture components in one run, while a file is checked
# Largest difference between two runs on a GPU, because a GPU may add in another order. Random operators differ by more.
ROUNDING = 0.01

# Operators with a subgraph, whose running time depends on the data. The bytes are those of a NodeProto: the tag of
# field 4 (op_type), the length of the name, the name. If weights happen to hold these bytes, the graph counts as not
# steady.
_BRANCHES = tuple(b'"%c%b' % (len(name), name) for name in (b"If", b"Loop", b"Scan", b"SequenceMap"))


@dataclass(frozen=True)
class Artifact:
    """A loaded sampler, checked against the contract.

    contract: the contract in the file.
    session: session of onnxruntime.
    size: bytes of the file.
    steady: the time of a run depends on the number of rows alone, not on values in the rows.
    """

    contract: Contract
    session: ort.InferenceSession
    size: int
    steady: bool

    @property
    def provider(self) -> str:
        """First execution provider of the session, such as CPUExecutionProvider."""
        return str(self.session.get_providers()[0])

    def run(self, feeds: Mapping[str, npt.NDArray[np.float32]], names: Sequence[str] = ()) -> Arrays:
        """Run the graph.

        feeds: the inputs of `contract.inputs()`, float32 (n, ...).
        names: names of outputs; default: all.

        Returns: the outputs by name, (n, ...).

        Raises: any error of onnxruntime.
        """
        names = list(names or self.contract.outputs())
        options = ort.RunOptions()
        options.add_run_config_entry(
            "gpu_graph_id", "-1"
        )  # no CUDA graph: a CUDA graph needs arrays at fixed addresses
        return dict(zip(names, self.session.run(names, dict(feeds), options), strict=True))


def load(path: Path, providers: Providers = (CPU,), threads: int = 0) -> Artifact:
    """Load a sampler, and check the graph against the contract.

    path: path of model.onnx.
    providers: providers of onnxruntime, the preferred provider first.
    threads: threads of one run on the CPU; 0 for one per core.

    Returns: the sampler, after two runs of two rows.

    Raises: ArtifactError naming the file and the fault.
    """
    try:
        content = path.read_bytes()
        session = open_session(content, providers, threads)
        contract = Contract.from_metadata(session.get_modelmeta().custom_metadata_map)
        _check_signature(session, contract)
        artifact = Artifact(contract, session, len(content), steady=not any(sign in content for sign in _BRANCHES))
        _check_run(artifact)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a broken file can raise any error, from onnxruntime, pydantic or NumPy
        raise ArtifactError(f"{path}: {error!r}") from error
    return artifact


def open_session(content: bytes, providers: Providers = (CPU,), threads: int = 0) -> ort.InferenceSession:
    """Open a self-contained ONNX file as an onnxruntime session.

    content: bytes of the file.
    providers: providers of onnxruntime, the preferred provider first.
    threads: threads of one run on the CPU; 0 for one per core.

    Raises: ArtifactError if onnxruntime cannot open the content; the message does not name the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # log fatal faults only, because onnxruntime also raises each fault
    # Idle threads must not spin: other processes need the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # An impossible folder for external weights, so that the graph cannot read other files.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    try:
        return ort.InferenceSession(content, options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # onnxruntime's errors have no narrower common base
        fault = str(error).split(" : ")[-1].strip()
        if "xternal" in fault:
            raise ArtifactError(f"it keeps weights in another file; an artifact is one file ({fault})") from error
        raise ArtifactError(f"it is truncated, or no ONNX file that onnxruntime can run ({fault})") from error


def _check_signature(session: ort.InferenceSession, contract: Contract) -> None:
    inputs = {name: ("tensor(float)", shape) for name, shape in contract.inputs().items()}
    for what, nodes, expected in (
        ("input", session.get_inputs(), inputs),
        ("output", session.get_outputs(), contract.outputs()),
    ):
        found = {node.name: node for node in nodes}
        if found.keys() != expected.keys():
            raise ArtifactError(
                f"a {contract.kind} sampler has the {what}s {', '.join(expected)}; this file has {', '.join(found)}"
            )
        for name, (type_, shape) in expected.items():
            if found[name].type != type_:
                raise ArtifactError(f"{what} {name!r} is {found[name].type}, not {type_}")
            batch, *rest = found[name].shape
            if isinstance(batch, int):
                raise ArtifactError(f"{what} {name!r} has a fixed batch of {batch}; the first axis must be dynamic")
            if rest != list(shape):
                raise ArtifactError(f"{what} {name!r} has shape {rest} after the batch axis, not {list(shape)}")


def _check_run(artifact: Artifact) -> None:
    """Run two rows of the prior twice, and each component of the mixture once.

    All outputs must be finite. If the two runs differ, the graph draws noise itself.

    Raises: ArtifactError, and any error of onnxruntime.
    """
    contract = artifact.contract
    feeds = contract.feeds(noise.words(0, 0, 2, contract.latent_shape), contract.default_temperature)
    try:
        first, second = artifact.run(feeds), artifact.run(feeds)
    except Exception as error:  # onnxruntime's errors have no narrower common base
        raise ArtifactError(f"it does not run on two rows of its prior: {error}") from error
    tolerance = 0.0 if artifact.provider == CPU else ROUNDING
    for name, array in first.items():
        _check_finite(name, array, "the prior")
        if not np.allclose(array, second[name], rtol=0, atol=255 * tolerance if name == "pixels" else tolerance):
            raise ArtifactError(f"output {name!r} differs between two runs on the same input: the graph draws noise")

    weights, components = contract.mixture_arrays()
    for begin in range(0, len(weights), COMPONENTS_PER_RUN):
        parameters = {name: array[begin : begin + COMPONENTS_PER_RUN] for name, array in components.items()}
        words = noise.words(0, begin, min(COMPONENTS_PER_RUN, len(weights) - begin), contract.latent_shape)
        for name, array in artifact.run(contract.feeds(words, contract.default_temperature, parameters)).items():
            _check_finite(name, array, "the mixture")


def _check_finite(name: str, array: npt.NDArray[Any], what: str) -> None:
    if not np.isfinite(array).all():
        raise ArtifactError(f"output {name!r} holds NaN or infinity for {what}")
