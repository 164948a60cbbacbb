"""Files that appear under their name once they are whole."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR, ENOENT
from pathlib import Path
from typing import BinaryIO


def check_place(path: Path) -> None:
    """Check that a file can have this name. Raises: OSError."""
    if not path.parent.is_dir():
        raise FileNotFoundError(ENOENT, "no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "a folder has this name", str(path))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` once all is written. A failure removes the file. Raises: OSError."""
    check_place(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
