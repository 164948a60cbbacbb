"""Device and CPU threads of training and evaluation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from reparam.export.config import Device
from reparam.export.errors import RunError

Map = Callable[..., Iterable[Any]]


def use_device(name: Device | None) -> torch.device:
    """Choose the device and make its convolutions deterministic and exact to float32.

    name: "cpu" or "cuda"; None: a GPU if torch finds one.

    Raises: RunError for "cuda" without a GPU.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        built = "finds no GPU" if torch.version.cuda else "was built for CPUs only"
        raise RunError(
            f"device 'cuda': this torch {built}; --device cpu uses the CPU (and resumes runs started on a CPU)"
        )
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    return torch.device("cuda" if found and name != "cpu" else "cpu")


@contextmanager
def parallel_map(shares: int) -> Iterator[Map]:
    """Make a `map` function that computes several items at the same time, each on a part of the CPU threads.

    Several threads in one operation gain little in a small network. Half a batch on each of two cores is up to 1.5
    times as fast.

    shares: number of items at the same time; 1 is the plain `map`.

    Yields: the function. Inside the block torch uses the number of CPU threads divided by `shares`.
    """
    if shares == 1:
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // shares))
    try:
        with ThreadPoolExecutor(shares) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)
