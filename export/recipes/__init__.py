"""Recipes: whole configurations of a training, one file each. A recipe is data: the fields of TrainConfig."""

import tomllib
from pathlib import Path
from typing import Any

from reparam.export.errors import RunError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def recipe(name: str) -> dict[str, Any]:
    """The fields that the recipe sets. Raises RunError."""
    if name not in names():
        raise RunError(f"no recipe {name!r}; there are: {', '.join(names())}")
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text())
