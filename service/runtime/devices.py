"""The choice of the device: the onnxruntime provider that runs the models, and how many workers, runners, threads."""

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
MAX_WORKERS = 4  # processes by default; each process loads the models
MAX_RUNNERS = 8  # threads that run batches on the CPU; more would wait for the GIL
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC"}  # no choice by timing, so each start uses the same algorithms


class DeviceError(Exception):
    """The device cannot be used; the message names the missing part."""


@dataclass(frozen=True)
class Device:
    """A device, and the division of the device between processes and threads.

    name: "cpu" or "cuda".
    attempts: lists of providers. A model runs with the first list that works for the model.
    reason: why this device was chosen, for the log.
    runners: number of runner threads per worker, and so of batches at a time; 1 on a GPU.
    threads: number of CPU threads per run; 0 for one per core.
    workers: number of serving processes.
    """

    name: Literal["cpu", "cuda"]
    attempts: tuple[tuple[Any, ...], ...]
    reason: str
    runners: int = 1
    threads: int = 0
    workers: int = 1


@lru_cache(1)
def device_of(settings: Settings) -> Device:
    """Choose the device as `choose` does. The choice is cached, because a test of CUDA takes a second.

    Raises: DeviceError, as `choose`.
    """
    return choose(settings)


def choose(settings: Settings) -> Device:
    """Choose the device.

    Raises: DeviceError if the settings demand CUDA and CUDA does not work, or if workers cannot share a port on this
        system.
    """
    wanted, workers = settings.device, settings.workers
    if workers > 1 and sys.platform != "linux":
        raise DeviceError(f"REPARAM_WORKERS={workers}, but only Linux lets processes share a port evenly: use 1")
    gpu_workers = workers or 1  # each worker needs GPU memory for its own copy of the models
    threads = settings.threads or _cores()
    workers = workers or (min(threads, MAX_WORKERS) if sys.platform == "linux" else 1)
    runners = settings.runners or min(-(-threads // workers), MAX_RUNNERS)
    each = max(1, threads // (runners * workers))
    cpu = partial(Device, "cpu", ((CPU,),), runners=runners, threads=each, workers=workers)
    if wanted == "cpu":
        return cpu("REPARAM_DEVICE=cpu")
    # Without this variable, onnxruntime uses TF32 if cuDNN has no exact algorithm. CUDA reads the variable when loaded.
    if not settings.tf32:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    missing = _missing_for_cuda()
    if missing is None:
        reason = f"REPARAM_DEVICE={wanted} and CUDA works"
        return Device("cuda", cuda_attempts(settings), reason, workers=gpu_workers)
    if wanted == "cuda":
        raise DeviceError(f"REPARAM_DEVICE=cuda, but {missing}; REPARAM_DEVICE=auto would run on the CPU")
    return cpu(f"REPARAM_DEVICE=auto, and {missing}")


def cuda_attempts(settings: Settings) -> tuple[tuple[Any, ...], ...]:
    """List the providers to try, with and then without CUDA graphs.

    A model cannot be captured as a CUDA graph if a part of the model runs on the CPU.

    Returns: lists of providers, as in `Device.attempts`.
    """
    options = {**CUDA_OPTIONS, "use_tf32": str(int(settings.tf32))}
    captured, plain = ((CUDA, {**options, "enable_cuda_graph": "1"}), CPU), ((CUDA, options), CPU)
    return (captured, plain) if settings.cuda_graphs else (plain,)


def with_tensor_cores(providers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the providers with TF32 allowed. Otherwise onnxruntime keeps even float16 off the tensor cores."""
    return tuple((CUDA, {**each[1], "use_tf32": "1"}) if each[0] == CUDA else each for each in providers)


def _cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _missing_for_cuda() -> str | None:
    """Return the missing part of CUDA and the way out; None if CUDA works."""
    if CUDA not in ort.get_available_providers():
        return f"this onnxruntime {ort.__version__} has no CUDA provider: install onnxruntime-gpu"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1): install it, or give the container a GPU"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver shows no GPU"
    ort.preload_dlls()  # loads CUDA and cuDNN from the nvidia packages of the extra `cuda`, if installed
    return cuda_fault()


def cuda_fault() -> str | None:
    """Test CUDA by a convolution.

    Opening a session is no test. If a CUDA library cannot be loaded, onnxruntime falls back to the CPU. cuDNN and the
    kernels for this GPU are loaded only when needed.

    Returns: why CUDA does not compute; None if CUDA works.
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
        ctypes.CDLL(str(provider))  # the loader's error message names the missing library
    except OSError as error:
        return f"the CUDA provider cannot be loaded ({error}): install the extra `cuda`"
    return "onnxruntime refused to use CUDA, though its libraries are there"


# A small ONNX model: y = Conv(x, x), float32 (1, 1, 1, 1).
_CONVOLUTION = bytes.fromhex(
    "08083a4e0a0f0a01780a01781201792204436f6e761201735a1b0a017812160a14080112100a0208010a0208010a0208010a020801621b0a01"
    "7912160a14080112100a0208010a0208010a0208010a02080142040a00100b"
)
