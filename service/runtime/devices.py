"""The device: which onnxruntime provider runs the models, and why."""

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
MAX_WORKERS = 4  # processes; each loads the models
MAX_RUNNERS = 8  # threads that run batches on the CPU; more would wait for the GIL
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC"}  # by rule, not by timing: the same algorithms on every start


class DeviceError(Exception):
    """The device cannot be used; the message says what is missing."""


@dataclass(frozen=True)
class Device:
    """A device, and how it is shared.

    attempts: lists of providers; a model runs with the first list that can run it.
    reason: why this device was chosen.
    runners: batches that run at a time; 1 on a GPU.
    threads: cores that a run uses on the CPU.
    workers: processes that serve side by side.
    """

    name: Literal["cpu", "cuda"]
    attempts: tuple[tuple[Any, ...], ...]
    reason: str
    runners: int = 1
    threads: int = 0
    workers: int = 1


@lru_cache(1)
def device_of(settings: Settings) -> Device:
    """Choose the device, once for equal settings: trying CUDA takes a second. Raises DeviceError."""
    return choose(settings)


def choose(settings: Settings) -> Device:
    """Choose the device.

    Raises: DeviceError, if `cuda` is chosen and CUDA does not work, or if workers cannot share a port here
    """
    wanted, workers = settings.device, settings.workers
    if workers > 1 and sys.platform != "linux":
        raise DeviceError(f"REPARAM_WORKERS={workers}, but only Linux lets processes share a port evenly: use 1")
    gpu_workers = workers or 1  # each would need memory of its own for the models
    threads = settings.threads or _cores()
    workers = workers or (min(threads, MAX_WORKERS) if sys.platform == "linux" else 1)
    runners = settings.runners or min(-(-threads // workers), MAX_RUNNERS)
    each = max(1, threads // (runners * workers))
    cpu = partial(Device, "cpu", ((CPU,),), runners=runners, threads=each, workers=workers)
    if wanted == "cpu":
        return cpu("REPARAM_DEVICE=cpu")
    if not settings.tf32:  # or onnxruntime would use TF32 where cuDNN has no exact algorithm; read when CUDA is loaded
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    missing = _missing_for_cuda()
    if missing is None:
        reason = f"REPARAM_DEVICE={wanted} and CUDA works"
        return Device("cuda", cuda_attempts(settings), reason, workers=gpu_workers)
    if wanted == "cuda":
        raise DeviceError(f"REPARAM_DEVICE=cuda, but {missing}; REPARAM_DEVICE=auto would run on the CPU")
    return cpu(f"REPARAM_DEVICE=auto, and {missing}")


def cuda_attempts(settings: Settings) -> tuple[tuple[Any, ...], ...]:
    """List the providers to try. A graph of which a part runs on the CPU cannot be captured as a CUDA graph."""
    options = {**CUDA_OPTIONS, "use_tf32": str(int(settings.tf32))}
    captured, plain = ((CUDA, {**options, "enable_cuda_graph": "1"}), CPU), ((CUDA, options), CPU)
    return (captured, plain) if settings.cuda_graphs else (plain,)


def with_tensor_cores(providers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Allow TF32, without which onnxruntime keeps float16 convolutions off the tensor cores too."""
    return tuple((CUDA, {**each[1], "use_tf32": "1"}) if each[0] == CUDA else each for each in providers)


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _missing_for_cuda() -> str | None:
    """Say what CUDA lacks; None if CUDA works."""
    if CUDA not in ort.get_available_providers():
        return f"this onnxruntime {ort.__version__} has no CUDA provider: install onnxruntime-gpu"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1): install it, or give the container a GPU"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver shows no GPU"
    ort.preload_dlls()  # from the nvidia packages of the extra `cuda`, where they are installed
    return cuda_fault()


def cuda_fault() -> str | None:
    """Say why CUDA does not compute, or not any more; None if it does.

    The test is a convolution: onnxruntime falls back to the CPU if a library of CUDA cannot be loaded, and looks for
    cuDNN and for kernels that suit the GPU only when it needs them.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(_CONVOLUTION, options, providers=[CUDA, CPU], enable_fallback=0)
        if session.get_providers()[0] == CUDA:
            session.run(None, {"x": np.ones((1, 1, 1, 1), np.float32)})
            return None
    except Exception as error:  # onnxruntime's errors have no narrower common base
        fault = str(error).partition("\n")[0]
        return f"onnxruntime cannot compute on the GPU ({fault}): it needs the extra `cuda` with its cuDNN"
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(provider))  # for the loader's message, which names the missing library
    except OSError as error:
        return f"the CUDA provider cannot be loaded ({error}): install the extra `cuda`"
    return "onnxruntime refused to use CUDA, though its libraries are there"


# A small ONNX model: y = Conv(x, x), float32 (1, 1, 1, 1).
_CONVOLUTION = bytes.fromhex(
    "08083a4e0a0f0a01780a01781201792204436f6e761201735a1b0a017812160a14080112100a0208010a0208010a0208010a020801621b0a01"
    "7912160a14080112100a0208010a0208010a0208010a02080142040a00100b"
)
