"""Atomic file writes, and tensors in safetensors files."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

# Errors raised by a file of tensors that is damaged or has other contents.
READ_ERRORS = (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Returns: tensors by name, and the metadata of the file.

    Raises: one of READ_ERRORS if the file is damaged or holds NaN or infinity.
    """
    with safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # `file` is not a dict
        about: dict[str, str] = file.metadata() or {}
    if not all_finite(tensors.values()):
        raise ValueError("the file holds NaN or infinity")
    return tensors, about


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **about: str) -> None:
    """Write a safetensors file, as `write_atomically` does.

    about: metadata of the file, by key.

    Raises: OSError.
    """
    write_atomically(path, save(dict(tensors), about))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old content or the whole new content.

    Raises: OSError naming the file; no part of the new content is left then.
    """
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
    """Return True if no tensor holds NaN or infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
