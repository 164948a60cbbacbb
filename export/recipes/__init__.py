"""Recipes: complete training configurations, a TOML file each with fields of TrainConfig."""

import tomllib
from pathlib import Path
from typing import Any

from reparam.export.errors import RunError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """List the names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def recipe(name: str) -> dict[str, Any]:
    """Read a recipe.

    Returns: the values set by the recipe, by field of TrainConfig.

    Raises: RunError for an unknown name.
    """
    if name not in names():
        raise RunError(f"no recipe {name!r}; there are: {', '.join(names())}")
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text())
