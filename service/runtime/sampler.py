"""Rows of a request, and the one way to compute them: batches of rows of any requests for one model."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from reparam.service.artifact import noise
from reparam.service.artifact.contract import Arrays, Output, Prior
from reparam.service.errors import ModelFailed, NonFiniteSample, Problem
from reparam.service.runtime.graphs import Buckets
from reparam.service.runtime.repository import Model

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
Share = tuple["Rows", int, int]  # rows lo .. hi - 1 of a request


@dataclass(slots=True, eq=False)
class Rows:
    """Rows start .. start + n - 1 of a seed, with their parameters.

    prior: what each row's parameters are drawn from. parameters: those given instead, float32, (*latent_shape) for all
        rows or (n, *latent_shape).
    temperature: for all rows. hard: draw at temperature 0, where a Gumbel code is one-hot. outputs: what of the rows is
        asked for.
    """

    model: Model
    seed: int
    start: int
    n: int
    prior: Prior
    parameters: Mapping[str, Float32]
    temperature: float
    hard: bool
    outputs: tuple[Output, ...]


def compute(batch: Sequence[Share], buckets: Buckets) -> list[Arrays | Problem]:
    """Compute a batch of rows of one model in its buckets, at most as many as they hold.

    Returns for each share the outputs it asked for, or what went wrong with it alone. Raises what onnxruntime raises.
    """
    outputs = buckets.run(_fill(buckets, batch))
    finite = _finite(outputs, buckets.checked)
    selected: Arrays = {}
    results: list[Arrays | Problem] = []
    not_finite: list[int] = []
    end = 0
    for index, (rows, lo, hi) in enumerate(batch):
        begin, end = end, end + hi - lo
        result: Arrays = {}
        results.append(result)
        if not finite and not _finite(outputs, buckets.checked, slice(begin, end)):
            not_finite.append(index)
            continue
        for name in rows.outputs:
            if name not in selected:
                selected[name] = _SELECT[name](outputs)
            result[name] = selected[name][begin:end]
    if not_finite:  # and nobody needs the graph's outputs any more
        problems = _blame([batch[index] for index in not_finite], buckets)
        for index, problem in zip(not_finite, problems, strict=True):
            results[index] = problem
    return results


def _fill(buckets: Buckets, batch: Sequence[Share]) -> int:
    """Write the graph's inputs for the batch. Returns its rows."""
    contract, inputs, draw, blocks = buckets.artifact.contract, buckets.inputs, buckets.source.draw, buckets.blocks
    total = sum(hi - lo for _, lo, hi in batch)
    if len(buckets.weights):
        buckets.fill_components(_components(buckets, batch))
    else:
        buckets.fill_prior(total)
    drawn, temperatures, counts = [], [], []
    end = 0
    for rows, lo, hi in batch:
        n = hi - lo
        begin, end = end, end + n
        drawn.append(draw(rows.seed, rows.start + lo, n, blocks))
        temperatures.append(0.0 if rows.hard else rows.temperature)
        counts.append(n)
        for name, array in rows.parameters.items():
            buckets.spoil_prior(begin)
            inputs[name][begin:end] = array[lo:hi] if array.ndim == inputs[name].ndim else array
    if len(batch) == 1:
        inputs["temperature"][:total] = temperatures[0]
        words = drawn[0]
    else:
        inputs["temperature"][:total] = np.repeat(temperatures, counts)
        words = np.concatenate(drawn)
    words = words.reshape(total, -1)[:, : contract.elements]
    inputs["noise"][:total] = buckets.noise(words).reshape(total, *contract.latent_shape)
    return total


def _components(buckets: Buckets, batch: Sequence[Share]) -> noise.Int64:
    """The component of the mixture that each row is drawn from, -1 for the standard prior."""
    draw = buckets.source.draw
    words = [draw(rows.seed, rows.start + lo, hi - lo, 1, noise.COMPONENT_STREAM) for rows, lo, hi in batch]
    components = noise.component(np.concatenate(words)[:: noise.WORDS_PER_BLOCK], buckets.weights)
    end = 0
    for rows, lo, hi in batch:
        begin, end = end, end + hi - lo
        if rows.prior == "standard":
            components[begin:end] = -1
    return components


def _finite(outputs: Arrays, checked: Sequence[str], rows: slice = slice(None)) -> bool:
    """Whether these outputs hold neither NaN nor infinity, which never leave the service as a sample."""
    return all(np.isfinite(outputs[name][rows]).all() for name in checked)


def _blame(shares: Sequence[Share], buckets: Buckets) -> list[Problem]:
    """Of shares that are not finite: the caller's parameters, if without them the same rows are; else the model."""
    contract = buckets.artifact.contract
    plain = [
        (replace(rows, parameters={}, temperature=contract.default_temperature), lo, hi) for rows, lo, hi in shares
    ]
    outputs = buckets.run(_fill(buckets, plain))
    problems: list[Problem] = []
    end = 0
    for share in shares:
        rows, lo, hi = share
        begin, end = end, end + hi - lo
        if _finite(outputs, buckets.checked, slice(begin, end)):
            names = (*(("temperature",) if rows.temperature else ()), *contract.traits.parameters)
            problems.append(
                NonFiniteSample(
                    f"the parameters given overflow {contract.precision} at temperature {rows.temperature:g}: lower "
                    f"{' or '.join(names)}"
                )
            )
        else:
            log.error("NaN or infinity", extra=about(share))
            problems.append(
                ModelFailed(
                    f"{told(share)} are NaN or infinity, also at the default temperature and without parameters: ask "
                    "for other rows, and tell whoever trained the model"
                )
            )
    return problems


def about(share: Share) -> dict[str, Any]:
    """The rows, for a log."""
    rows, lo, hi = share
    model = rows.model
    return {"model": model.name, "version": model.version, "seed": rows.seed, "start": rows.start + lo, "n": hi - lo}


def told(share: Share) -> str:
    """The rows, for a message."""
    rows, lo, hi = share
    return (
        f"rows {rows.start + lo} .. {rows.start + hi - 1} of seed {rows.seed} of model {rows.model.name!r} version "
        f"{rows.model.version}"
    )


# From the graph's outputs to those of an answer: images are uint8 pixels, indices int32. Copies, for the next batch
# overwrites the graph's outputs.
_SELECT: dict[str, Callable[[Arrays], npt.NDArray[Any]]] = {
    "images": lambda outputs: outputs["pixels"].copy(),
    "latents": lambda outputs: outputs["latents"].copy(),
    "codes": lambda outputs: outputs["codes"].copy(),
    "indices": lambda outputs: outputs["codes"].argmax(-1).astype(np.int32),
}


@lru_cache(1024)
def row_bytes(model: Model, outputs: tuple[Output, ...]) -> int:
    """What one row of an answer counts for: its raw bytes, but at least 1 KiB, for encoding it costs time."""
    latent, image = prod(model.contract.latent_shape), prod(model.contract.image_shape)
    indices = prod(model.contract.latent_shape[:-1])
    sizes = {"images": image, "latents": 4 * latent, "codes": 4 * latent, "indices": 4 * indices}
    return max(1024, sum(sizes[output] for output in outputs))
