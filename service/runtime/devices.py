"""Which onnxruntime provider runs the models, and why."""

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from reparam.service.artifact.file import CPU
from reparam.service.settings import Settings

CUDA = "CUDAExecutionProvider"
MOST_WORKERS = 4  # processes; each loads the models
MOST_RUNNERS = 8  # threads that run batches on the CPU; more would wait for the GIL
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC"}  # algorithms by rule, not by timing: the same on every start


class DeviceError(Exception):
    """The device asked for is not there; the message says what is missing."""


@dataclass(frozen=True)
class Device:
    """attempts: lists of providers; a model runs with the first that takes it. runners: batches that run at a time,
    one on a GPU. threads: cores that each of them uses on the CPU. workers: processes that serve side by side."""

    name: Literal["cpu", "cuda"]
    attempts: tuple[tuple[Any, ...], ...]
    reason: str
    runners: int = 1
    threads: int = 0
    workers: int = 1


@lru_cache(1)
def device_of(settings: Settings) -> Device:
    """Looked for once: to ask CUDA takes a second. Raises DeviceError."""
    return choose(settings)


def choose(settings: Settings) -> Device:
    """Raises DeviceError if cuda is asked for and CUDA does not work, or workers cannot share a port here."""
    wanted, workers = settings.device, settings.workers
    if workers > 1 and sys.platform != "linux":
        raise DeviceError(f"REPARAM_WORKERS={workers}, but only Linux lets processes share a port evenly: use 1")
    gpu_workers = workers or 1  # each would need memory of its own for the models
    threads = settings.threads or _cores()
    workers = workers or (min(threads, MOST_WORKERS) if sys.platform == "linux" else 1)
    runners = settings.runners or min(-(-threads // workers), MOST_RUNNERS)
    each = max(1, threads // (runners * workers))
    cpu = partial(Device, "cpu", ((CPU,),), runners=runners, threads=each, workers=workers)
    if wanted == "cpu":
        return cpu("REPARAM_DEVICE=cpu")
    if not settings.tf32:  # else onnxruntime takes it where cuDNN has nothing more exact; read when CUDA is loaded
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    missing = _missing_for_cuda()
    if missing is None:
        reason = f"REPARAM_DEVICE={wanted} and CUDA works"
        return Device("cuda", cuda_attempts(settings), reason, workers=gpu_workers)
    if wanted == "cuda":
        raise DeviceError(f"REPARAM_DEVICE=cuda, but {missing}; REPARAM_DEVICE=auto would run on the CPU")
    return cpu(f"REPARAM_DEVICE=auto, and {missing}")


def cuda_attempts(settings: Settings) -> tuple[tuple[Any, ...], ...]:
    """Lists of providers. Some graphs cannot be captured as a CUDA graph, such as those of which a part runs on the
    CPU."""
    options = {**CUDA_OPTIONS, "use_tf32": str(int(settings.tf32))}
    captured, plain = ((CUDA, {**options, "enable_cuda_graph": "1"}), CPU), ((CUDA, options), CPU)
    return (captured, plain) if settings.cuda_graphs else (plain,)


def with_tensor_cores(providers: tuple[Any, ...]) -> tuple[Any, ...]:
    """For a decoder of float16: onnxruntime keeps its convolutions off the tensor cores too, unless TF32 is allowed."""
    return tuple((CUDA, {**each[1], "use_tf32": "1"}) if each[0] == CUDA else each for each in providers)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _missing_for_cuda() -> str | None:
    if CUDA not in ort.get_available_providers():
        return f"this onnxruntime {ort.__version__} has no CUDA provider: install onnxruntime-gpu"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1): install it, or give the container a GPU"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver shows no GPU"
    ort.preload_dlls()  # from the nvidia packages of the `cuda` dependency group, where they are installed
    return cuda_fault()


def cuda_fault() -> str | None:
    """Why CUDA computes nothing, or nothing any more. Asks onnxruntime itself, by a convolution: it falls back to the
    CPU if a library of CUDA cannot be loaded, and looks for cuDNN, and for kernels that suit the GPU, only when it
    needs them."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(_CONVOLUTION, options, providers=[CUDA, CPU], enable_fallback=0)
        if session.get_providers()[0] == CUDA:
            session.run(None, {"x": np.ones((1, 1, 1, 1), np.float32)})
            return None
    except Exception as error:  # onnxruntime's errors have no common base but this
        fault = str(error).partition("\n")[0]
        return f"onnxruntime cannot compute on the GPU ({fault}): it needs the `cuda` dependency group and its cuDNN"
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(provider))  # only for the loader's message, which names the library that is missing
    except OSError as error:
        return f"the CUDA provider cannot be loaded ({error}): install the `cuda` dependency group"
    return "onnxruntime refused to use CUDA, though its libraries are there"


# A small ONNX model: y = Conv(x, x), float32 (1, 1, 1, 1).
_CONVOLUTION = bytes.fromhex(
    "08083a4e0a0f0a01780a01781201792204436f6e761201735a1b0a017812160a14080112100a0208010a0208010a0208010a020801621b0a01"
    "7912160a14080112100a0208010a0208010a0208010a02080142040a00100b"
)
