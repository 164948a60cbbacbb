"""The sampler of a model: the bound graph, and the inputs that rows of requests fill."""

import numpy as np
import numpy.typing as npt

from reparam.service.artifact import noise
from reparam.service.artifact.contract import Arrays, Contract, Prior
from reparam.service.artifact.file import Artifact
from reparam.service.runtime.graphs import BoundGraph

STANDARD_COMPONENT = -1  # index of the standard prior: the last row of each table of parameters


def bind_sampler(artifact: Artifact, max_rows: int, apart: bool | None = None) -> BoundGraph:
    """Bind the graph of a sampler.

    artifact: the loaded file.
    max_rows, apart: as in BoundGraph.
    """
    contract = artifact.contract
    return BoundGraph(
        artifact.session,
        contract.inputs(),
        contract.outputs(),
        lambda arrays: SamplerInputs(contract, arrays),
        checked=(contract.family.latents, "images"),
        summed="images",
        max_rows=max_rows,
        apart=apart,
    )


class SamplerInputs:
    """The inputs of a sampler's graph, filled by works.

    For each work, `draw` stores random words, and `give` notes parameters from the request. Then `finish` turns the
    words of the whole batch into noise at once, and writes the parameters.

    arrays: noise and parameters, float32 (max_rows, *latent_shape); temperature, float32 (max_rows,).
    """

    def __init__(self, contract: Contract, arrays: Arrays) -> None:
        self.arrays = arrays
        self._contract = contract
        self._elements = contract.elements
        self._blocks = noise.blocks_of(contract.elements)
        self._noise = contract.family.noise
        self._draw = noise.Source().draw
        max_rows = len(arrays["temperature"])
        self._words_per_row = noise.WORDS_PER_BLOCK * self._blocks
        self._words = np.zeros(max_rows * self._words_per_row, np.uint64)
        self._temperature = arrays["temperature"]
        self._prior = contract.prior_arrays()
        # Without a mixture: rows 0 .. _rows_of_prior - 1 of the parameter arrays hold the standard prior already.
        self._rows_of_prior = 0
        weights, components = contract.mixture_arrays()
        self._cumulative_weights = weights.cumsum()
        self._has_mixture = len(weights) > 0
        self._tables = {name: np.concatenate([components[name], array[None]]) for name, array in self._prior.items()}
        self._component_words = np.zeros(max_rows, np.uint64)
        self._standard: list[slice] = []  # rows with the standard prior, in a model with a mixture
        self._given: list[tuple[str, slice, npt.NDArray[np.float32]]] = []

    def begin(self) -> None:
        self._standard.clear()
        self._given.clear()

    def draw(self, at: int, n: int, seed: int, start: int, temperature: float, prior: Prior) -> None:
        """Set input rows at .. at + n - 1 to rows start .. start + n - 1 of a seed.

        at: first input row.
        n: number of rows.
        seed: 0 .. 2**64 - 1.
        start: first row of the seed.
        temperature: temperature of these rows.
        prior: distribution of the rows' parameters; "mixture" only if the model has a mixture.
        """
        width = self._words_per_row
        self._words[at * width : (at + n) * width] = self._draw(seed, start, n, self._blocks)
        self._temperature[at : at + n] = temperature
        if self._has_mixture:
            if prior == "mixture":
                words = self._draw(seed, start, n, 1, noise.COMPONENT_STREAM)
                self._component_words[at : at + n] = words[:: noise.WORDS_PER_BLOCK]
            else:
                self._standard.append(slice(at, at + n))

    def give(self, name: str, at: int, n: int, values: npt.NDArray[np.float32]) -> None:
        """Set a parameter of input rows at .. at + n - 1, in place of the prior.

        name: name of the parameter.
        values: float32 (n, *latent_shape), or (*latent_shape) for all n rows.
        """
        self._given.append((name, slice(at, at + n), values))

    def finish(self, n: int) -> None:
        """Compute noise and parameters of the first n rows."""
        if self._has_mixture:
            self._fill_components(n)
        elif n > self._rows_of_prior:  # otherwise the arrays still hold the prior from an earlier batch
            for name, array in self._prior.items():
                self.arrays[name][self._rows_of_prior : n] = array
            self._rows_of_prior = n
        for name, rows, values in self._given:
            self._rows_of_prior = min(self._rows_of_prior, rows.start)
            self.arrays[name][rows] = values
        words = self._words[: n * self._words_per_row].reshape(n, -1)[:, : self._elements]
        self.arrays["noise"][:n] = self._noise(words).reshape(n, *self._contract.latent_shape)

    def _fill_components(self, n: int) -> None:
        components = noise.component(self._component_words[:n], self._cumulative_weights)
        for rows in self._standard:
            components[rows] = STANDARD_COMPONENT
        for name, table in self._tables.items():
            np.take(table, components, 0, out=self.arrays[name][:n], mode="wrap")
