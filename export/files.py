"""Files that a reader sees whole, or not at all."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

# What a damaged file of tensors raises: read, or taken for what it is not.
DAMAGED = (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, all finite, and what the file says of them. Raises one of DAMAGED."""
    with safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        about: dict[str, str] = file.metadata() or {}
    if not all_finite(tensors.values()):
        raise ValueError("it holds NaN or infinity")
    return tensors, about


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **about: str) -> None:
    """As `write_atomically`."""
    write_atomically(path, save(dict(tensors), about))


def write_atomically(path: Path, content: bytes) -> None:
    """Raises OSError, with the name of the file that was not written; nothing of it is left then."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}: not written", str(path)) from error


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
