"""The sampler of a model: its graph, and how the rows of requests become the graph's inputs."""

import numpy as np
import numpy.typing as npt

from reparam.service.artifact import noise
from reparam.service.artifact.contract import Arrays, Contract, Prior
from reparam.service.artifact.file import Artifact
from reparam.service.runtime.graphs import BoundGraph

STANDARD_COMPONENT = -1  # the last row of each table of parameters


def bind_sampler(artifact: Artifact, max_rows: int, apart: bool | None = None) -> BoundGraph:
    """Bind the graph of a sampler. The arguments are those of BoundGraph."""
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
    """The inputs of a sampler's graph, which works fill row by row.

    Only random words are drawn for each work. `finish` turns the words of a whole batch into noise at once.

    arrays: noise and parameters, float32 (max_rows, *latent_shape); temperature, float32 (max_rows,)
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
        self._rows_of_prior = 0  # the first rows of the parameters' arrays that hold the standard prior
        weights, components = contract.mixture_arrays()
        self._cumulative_weights = weights.cumsum()
        self._has_mixture = len(weights) > 0
        self._tables = {name: np.concatenate([components[name], array[None]]) for name, array in self._prior.items()}
        self._component_words = np.zeros(max_rows, np.uint64)
        self._standard: list[slice] = []  # rows that are not drawn from the mixture
        self._given: list[tuple[str, slice, npt.NDArray[np.float32]]] = []

    def draw(self, at: int, n: int, seed: int, start: int, temperature: float, prior: Prior) -> None:
        """Let rows at .. at + n - 1 of the inputs be rows start .. start + n - 1 of a seed, drawn from a prior."""
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
        """Let rows at .. at + n - 1 have these values of a parameter, (n, *latent_shape) or (*latent_shape)."""
        self._given.append((name, slice(at, at + n), values))

    def finish(self, n: int) -> None:
        """Compute noise and parameters of the first n rows."""
        if self._has_mixture:
            self._fill_components(n)
        elif n > self._rows_of_prior:  # otherwise the arrays still hold the prior from the batch before
            for name, array in self._prior.items():
                self.arrays[name][self._rows_of_prior : n] = array
            self._rows_of_prior = n
        if self._given:
            for name, rows, values in self._given:
                self.arrays[name][rows] = values
                self._rows_of_prior = min(self._rows_of_prior, rows.start)
            self._given.clear()
        words = self._words[: n * self._words_per_row].reshape(n, -1)[:, : self._elements]
        self.arrays["noise"][:n] = self._noise(words).reshape(n, *self._contract.latent_shape)

    def _fill_components(self, n: int) -> None:
        components = noise.component(self._component_words[:n], self._cumulative_weights)
        if self._standard:
            for rows in self._standard:
                components[rows] = STANDARD_COMPONENT
            self._standard.clear()
        for name, table in self._tables.items():
            np.take(table, components, 0, out=self.arrays[name][:n], mode="wrap")
