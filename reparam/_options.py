"""Options of a sample: one table of names, types and checks."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypedDict, get_type_hints

import numpy as np
import numpy.typing as npt

from reparam import _checks as check


class SampleOptions(TypedDict, total=False):
    """Options of `sample` and `iter_samples`. A missing option, or None, means the default.

    model: name of the model. Default: the service's default model.
    version: version of the model. Default: the latest.
    temperature: at least 0. Gaussian: scale of the noise; 0 gives z = mu. Gumbel: temperature of the relaxation; 0
        gives one-hot codes. Default: the model's.
    hard: one-hot codes at any temperature (Gumbel). Default: False.
    prior: distribution of rows without parameters. "standard" is the same distribution for every row. "mixture" draws
        one of several distributions for each row. Default: "mixture" if the model has a mixture.
    seed: 0 .. 2**64 - 1. Default: a fresh seed, drawn by the client.
    start: number of the first row. A seed defines an endless sequence of rows, counted from 0. Default: 0.
    mu, log_var: parameters of a Gaussian model, in place of `prior`: (*latent_shape) for all rows, or
        (n, *latent_shape). Default: the standard prior. The service accepts bodies of up to 8 MiB. For more parameters,
        make several calls, each with a `start` of its own.
    logits: parameters of a Gumbel model, (variables, categories) for all rows, or (n, variables, categories). Default:
        the standard prior.
    """

    model: Annotated[str | None, check.string]
    version: Annotated[int | None, check.integer]
    temperature: Annotated[float | None, check.temperature]
    hard: Annotated[bool | None, check.flag]
    prior: Annotated[str | None, check.string]
    seed: Annotated[int | None, check.seed]
    start: Annotated[int | None, check.start]
    mu: Annotated[npt.ArrayLike | None, check.array]
    log_var: Annotated[npt.ArrayLike | None, check.array]
    logits: Annotated[npt.ArrayLike | None, check.array]


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(SampleOptions, include_extras=True).items()
}


def checked(options: Mapping[str, Any], others: tuple[str, ...]) -> dict[str, Any]:
    """Check the options of a call.

    options: options by name.
    others: names of the other arguments of the call, for the message.

    Returns: the options other than None, in plain types; arrays as float64.

    Raises: TypeError for an unknown name or a value of a wrong type, ValueError for a wrong value.
    """
    for name in options:
        if name not in CHECKS:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join([*others, *CHECKS])}")
    return {name: CHECKS[name](name, value) for name, value in options.items() if value is not None}


def parameters(options: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Select the arrays among checked options: mu and log_var, or logits, by name."""
    return {name: value for name, value in options.items() if isinstance(value, np.ndarray)}


def latent_dims(n: int, options: Mapping[str, Any]) -> int:
    """Guess the number of dimensions of a latent from the parameters of n rows.

    n: number of rows.
    options: checked options.

    The number decides whether a parameter is shared by all rows or has a row each. The guess can be wrong only if every
    parameter is shared, and the first dimension of each happens to be n. The service refuses slices of such parameters,
    because the shape of a slice does not fit.

    Returns: the number of dimensions; 0 without parameters.
    """
    arrays = parameters(options)
    if not arrays:
        return 0
    if "logits" in arrays:
        return 2  # variables, categories
    dims = {array.ndim for array in arrays.values()}
    fewest = min(dims)
    rows_each = len(dims) == 1 and fewest > 1 and all(len(array) == n for array in arrays.values())
    return fewest - 1 if rows_each else fewest


def of_rows(options: Mapping[str, Any], rows: slice, latent_dims: int) -> dict[str, Any]:
    """Select the options of some rows. Parameters with a row each are sliced, shared parameters stay whole.

    options: checked options.
    rows: slice of the rows.
    latent_dims: number of dimensions of a latent.

    Returns: all options by name, with the sliced parameters.
    """
    each = {name: array[rows] for name, array in parameters(options).items() if array.ndim > latent_dims}
    return {**options, **each}
