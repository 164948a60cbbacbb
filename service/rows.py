"""Rows of a request, and the one way to compute them: batches of rows of any requests for one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from service import noise
from service.artifact import Arrays
from service.errors import ModelFailed, NonFiniteSample, Problem
from service.repository import Model

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Rows start .. start + n - 1 of a seed, with their parameters.

    parameters: every parameter of the model's kind, float32, (*latent_shape) for all rows or (n, *latent_shape).
    temperature: for all rows. hard: draw at temperature 0, where a Gumbel code is one-hot. given: whether the caller
        chose any of these.
    """

    model: Model
    seed: int
    start: int
    n: int
    parameters: Mapping[str, Float32]
    temperature: float
    hard: bool
    given: bool

    def part(self, lo: int, hi: int) -> "Rows":
        """Rows lo .. hi - 1 of these."""
        depth = len(self.model.contract.latent_shape)
        cut = {name: array[lo:hi] if array.ndim > depth else array for name, array in self.parameters.items()}
        return replace(self, start=self.start + lo, n=hi - lo, parameters=cut)

    def feeds(self) -> dict[str, Float32]:
        """The graph's inputs for these rows."""
        contract = self.model.contract
        shape = (self.n, *contract.latent_shape)
        return {
            "noise": contract.traits.noise(noise.words(self.seed, self.start, self.n, contract.latent_shape)),
            **{name: np.broadcast_to(array, shape) for name, array in self.parameters.items()},
            "temperature": np.full(self.n, 0 if self.hard else self.temperature, np.float32),
        }


def run(batch: Sequence[Rows]) -> list[Arrays | Problem]:
    """Compute a batch of rows of one model. Returns for each member its outputs, or what went wrong with it alone."""
    members = [rows.feeds() for rows in batch]
    feeds = {name: np.concatenate([member[name] for member in members]) for name in members[0]}
    outputs = batch[0].model.artifact.run(feeds)
    results: list[Arrays | Problem] = []
    end = 0
    for rows in batch:
        begin, end = end, end + rows.n
        results.append(_checked(rows, {name: array[begin:end] for name, array in outputs.items()}))
    return results


def _checked(rows: Rows, outputs: Arrays) -> Arrays | Problem:
    """NaN and infinity never leave the service as a sample."""
    latents = rows.model.contract.traits.latents
    if np.isfinite(outputs[latents]).all() and np.isfinite(outputs["images"]).all():
        return outputs
    if rows.given:
        return NonFiniteSample(
            f"the parameters given overflow float32 at temperature {rows.temperature:g}: "
            f"lower temperature or {' or '.join(rows.parameters)}"
        )
    return ModelFailed(f"model {rows.model.name!r} version {rows.model.version} answered NaN or infinity")
