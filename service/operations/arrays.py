"""Arrays in JSON bodies: nested lists to float32, checked for shape and range."""

from functools import cache
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from reparam.service.artifact.contract import FLOAT32_MAX, Contract
from reparam.service.operations.faults import faults_of, invalid, wrong_shape


def parameter(name: str, values: list[Any], n: int, contract: Contract) -> npt.NDArray[np.float32]:
    """Read a parameter of the distribution.

    name: name of the parameter, such as `mu`.
    values: nested lists of numbers, (*latent_shape) or (n, *latent_shape).
    n: number of rows of the request.
    contract: contract of the model.

    Returns: float32 of the shape of `values`.

    Raises: InvalidRequest for another shape, for values other than numbers, and for numbers out of range.
    """
    shape = contract.latent_shape
    shapes = (shape, (n, *shape))
    depth = _depth(values)
    if depth not in (len(shape), len(shape) + 1):
        raise wrong_shape(name, shapes, f"{depth} nested lists")
    if len(values) != shapes[depth - len(shape)][0]:
        raise wrong_shape(name, shapes, f"a list of {len(values)}")
    try:
        checked = _nested(depth, contract.family.parameters[name]).validate_python(values)
    except ValidationError as refusal:
        raise invalid(
            [((name, *location), message, value) for location, message, value in faults_of(refusal)]
        ) from None
    try:
        array = np.array(checked, np.float32)
    except ValueError:
        raise wrong_shape(name, shapes, "lists of different lengths") from None
    if array.shape not in shapes:
        raise wrong_shape(name, shapes, f"shape {list(array.shape)}")
    return array


def _depth(values: Any) -> int:
    depth = 0
    while isinstance(values, list):
        depth, values = depth + 1, values[0] if values else None
    return depth


@cache
def _nested(depth: int, largest: float) -> TypeAdapter[Any]:
    """Make a validator of numbers in `depth` nested lists.

    largest: largest number allowed; the smallest number is -FLOAT32_MAX.
    """
    adapter: Any = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-FLOAT32_MAX, le=largest)]
    for _ in range(depth):
        adapter = Annotated[list[adapter], Field(fail_fast=True)]
    return TypeAdapter(adapter)
