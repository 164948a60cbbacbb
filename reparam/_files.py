"""Atomic files: a file appears under its name only when complete."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR, ENOENT
from pathlib import Path
from typing import BinaryIO


def check_place(path: Path) -> None:
    """Check that the folder of `path` exists, and that `path` is not a folder. Raises: OSError."""
    if not path.parent.is_dir():
        raise FileNotFoundError(ENOENT, "no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "a folder has this name", str(path))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file under a temporary name. At the end of the block the file replaces `path`.

    After an error the new file is removed, and `path` stays as before.

    Yields: the file, open for writing bytes.

    Raises: OSError.
    """
    check_place(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
