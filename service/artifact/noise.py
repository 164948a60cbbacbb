"""Noise as a pure function of seed and row (`noise_version` 1).

Each row owns its own counters of NumPy's Philox 4x64-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1,
2, 3"), so a row is the same whatever batch, request or replica draws it. Only raw words are used, the one output that
NumPy promises never to change (NEP 19); docs/architecture.md specifies every step.
"""

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

NOISE_VERSION = 1
LATENT_STREAM, COMPONENT_STREAM = 0, 1  # the other streams of a seed are kept for later uses

Words = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

WORDS_PER_BLOCK = 4
_WORD = 2**64 - 1
_BELOW_ONE = 1 - 2.0**-53


class Source:
    """Draws random words; for one thread. It has one generator, whose state it sets anew each time: to make a NumPy
    generator takes ten times as long."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._at: dict[str, Any] = {"counter": (0, 0, 0, 0), "key": (0, 0)}
        nothing_left = {"buffer": (0, 0, 0, 0), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        self._state: Any = {"bit_generator": "Philox", "state": self._at, **nothing_left}

    def draw(self, seed: int, start: int, n: int, blocks: int, stream: int = LATENT_STREAM) -> Words:
        """The random words of rows start .. start + n - 1 of a seed, uint64 (n * 4 * blocks,).

        seed and stream: 0 .. 2**64 - 1. Row r begins at counter r * blocks.
        """
        counter = start * blocks
        self._at["counter"] = (counter & _WORD, counter >> 64, 0, 0)
        self._at["key"] = (seed, stream)
        self._philox.state = self._state
        words: Words = self._philox.random_raw(n * blocks * WORDS_PER_BLOCK)
        return words


def words(seed: int, start: int, n: int, shape: tuple[int, ...], stream: int = LATENT_STREAM) -> Words:
    """The random words of rows start .. start + n - 1, uint64 (n, *shape): of a row's blocks as many as it needs."""
    elements = prod(shape)
    drawn = Source().draw(seed, start, n, blocks_of(elements), stream)
    return drawn.reshape(n, -1)[:, :elements].reshape(n, *shape)


def blocks_of(elements: int) -> int:
    """Blocks of four words that a row of so many elements owns."""
    return -(-elements // WORDS_PER_BLOCK)


def component(words: Words, weights: Float64) -> Int64:
    """The component of a mixture that each row is drawn from, 0 .. C - 1, by inversion of its distribution function.

    words: (n,), the first of each row in COMPONENT_STREAM. weights: (C,), positive.
    """
    sums = weights.cumsum()
    components: Int64 = np.searchsorted(sums[:-1], uniform(words) * sums[-1], side="right")
    return components


def uniform(words: Words) -> Float64:
    """(word + 0.5) * 2**-64 in float64, in [2**-65, 1 - 2**-53]: never 0, never 1, and small values keep all digits."""
    uniform: Float64 = np.minimum((words + 0.5) * 2.0**-64, _BELOW_ONE)
    return uniform


def normal(words: Words) -> Float32:
    """Standard normal draws by inversion of the distribution function, computed in float64."""
    return ndtri(uniform(words)).astype(np.float32)


def gumbel(words: Words) -> Float32:
    """Standard Gumbel draws, -log(-log(1 - u)) computed in float64.

    Large draws come from small u, where log1p loses nothing: no epsilon is needed, and argmax(logits + g) selects
    categories of probability 1e-15 as often as it should.
    """
    return -np.log(-np.log1p(-uniform(words))).astype(np.float32)
