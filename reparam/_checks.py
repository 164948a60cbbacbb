"""Checks of single arguments.

Each check takes the name and the value of an argument, and returns the value in a plain type.
"""

from math import inf
from operator import index
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

SEEDS = 2**64


def string(name: str, value: str) -> str:
    """Check a string. Raises: TypeError."""
    if isinstance(value, str):
        return value
    raise TypeError(f"{name} must be a string, got {value!r}")


def flag(name: str, value: bool) -> bool:
    """Check a Boolean. Raises: TypeError."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def integer(name: str, value: SupportsIndex) -> int:
    """Check an integer of any integer type. Raises: TypeError, also for True and False."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def number(name: str, value: float) -> float:
    """Check a number of any real type.

    Returns: the number; infinity for an integer beyond the range of a float.

    Raises: TypeError.
    """
    try:
        if not isinstance(value, bool | np.bool_ | str | bytes):
            return float(value)
    except OverflowError:
        return inf
    except TypeError:
        pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def count(name: str, value: SupportsIndex) -> int:
    """Check a number of rows. Raises: TypeError, ValueError below 1."""
    rows = integer(name, value)
    if rows < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return rows


def seed(name: str, value: SupportsIndex) -> int:
    """Check a seed. Raises: TypeError, ValueError outside 0 .. 2**64 - 1."""
    chosen = integer(name, value)
    if not 0 <= chosen < SEEDS:
        raise ValueError(f"{name} must be 0 .. 2**64 - 1, got {value}; leave it out for a fresh one")
    return chosen


def start(name: str, value: SupportsIndex) -> int:
    """Check the number of a first row. Raises: TypeError, ValueError below 0."""
    first = integer(name, value)
    if first < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return first


def temperature(name: str, value: float) -> float:
    """Check a temperature. Raises: TypeError, ValueError for a negative number, NaN and infinity."""
    scale = number(name, value)
    if not 0 <= scale < inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return scale


def array(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Check an array of finite real numbers.

    Returns: a copy as float64, of the same shape.

    Raises: ValueError.
    """
    try:
        given = np.asarray(values)
        if given.dtype.kind == "O":  # integers of more than 64 bits, or values other than numbers
            given = np.asarray(values, np.float64)
        if given.dtype.kind not in "iuf":
            raise ValueError(f"they are {given.dtype}")
        numbers = given.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    if not np.isfinite(numbers).all():
        at = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(numbers)))
        raise ValueError(f"{name} must be finite, got {numbers[at]} at {at}")
    return numbers
