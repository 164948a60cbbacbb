"""Where training and evaluation compute: on which device, and on how many cores of a CPU at a time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from reparam.export.config import Device
from reparam.export.errors import RunError

Map = Callable[..., Iterable[Any]]


def use_device(name: Device | None) -> torch.device:
    """By default a GPU if torch finds one. Convolutions then repeat themselves and keep the digits of a float32. Raises
    RunError."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        built = "finds no GPU" if torch.version.cuda else "was built for CPUs alone"
        raise RunError(f"device 'cuda': this torch {built}; --device cpu uses the CPU (a training that began there)")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    return torch.device("cuda" if found and name != "cpu" else "cpu")


@contextmanager
def one_core_each(shares: int) -> Iterator[Map]:
    """A `map` that does `shares` things at the same time. Small networks gain little when several cores share one
    operation; half a batch on each of two cores is up to 1.5 times as fast."""
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
