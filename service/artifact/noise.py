"""Noise as a pure function of seed and row (`noise_version` 1).

Each row owns counters of NumPy's Philox 4x64-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").
So a row is the same in every batch, request and replica. Only raw words are used, because NumPy promises never to
change raw words (NEP 19). docs/architecture.md specifies every step.
"""

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

NOISE_VERSION = 1
LATENT_STREAM, COMPONENT_STREAM = 0, 1  # further streams of a seed are reserved

Words = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

WORDS_PER_BLOCK = 4
_WORD = 2**64 - 1
_BELOW_ONE = 1 - 2.0**-53


class Source:
    """Draws random words. Used by one thread.

    Each draw sets the state of one generator, because a new generator takes ten times as long.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._at: dict[str, Any] = {"counter": (0, 0, 0, 0), "key": (0, 0)}
        empty_buffer = {"buffer": (0, 0, 0, 0), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        self._state: Any = {"bit_generator": "Philox", "state": self._at, **empty_buffer}

    def draw(self, seed: int, start: int, n: int, blocks: int, stream: int = LATENT_STREAM) -> Words:
        """Draw the random words of rows start .. start + n - 1 of a seed.

        seed: 0 .. 2**64 - 1.
        start, n: first row and number of rows.
        blocks: blocks of four words per row; row r begins at counter r * blocks.
        stream: 0 .. 2**64 - 1; each stream of a seed has other words.

        Returns: uint64 (n * 4 * blocks,).
        """
        counter = start * blocks
        self._at["counter"] = (counter & _WORD, counter >> 64, 0, 0)
        self._at["key"] = (seed, stream)
        self._philox.state = self._state
        words: Words = self._philox.random_raw(n * blocks * WORDS_PER_BLOCK)
        return words


def words(seed: int, start: int, n: int, shape: tuple[int, ...], stream: int = LATENT_STREAM) -> Words:
    """Draw the random words of rows start .. start + n - 1 of a seed.

    Each row uses whole blocks of four words. The surplus words of its last block are dropped.

    seed, stream: 0 .. 2**64 - 1.
    start, n: first row and number of rows.
    shape: shape of one row.

    Returns: uint64 (n, *shape).
    """
    elements = prod(shape)
    drawn = Source().draw(seed, start, n, blocks_of(elements), stream)
    return drawn.reshape(n, -1)[:, :elements].reshape(n, *shape)


def blocks_of(elements: int) -> int:
    """Return the number of four-word blocks for a row with this number of elements."""
    return -(-elements // WORDS_PER_BLOCK)


def component(words: Words, cumulative_weights: Float64) -> Int64:
    """Draw a component of a mixture for each row, by inversion of the cumulative distribution function.

    words: uint64 (n,), the first word of each row in COMPONENT_STREAM.
    cumulative_weights: float64 (C,), cumulative sum of the weights; every weight is positive.

    Returns: int64 (n,), 0 .. C - 1.
    """
    thresholds = uniform(words) * cumulative_weights[-1]
    components: Int64 = np.searchsorted(cumulative_weights[:-1], thresholds, side="right")
    return components


def uniform(words: Words) -> Float64:
    """Map words to uniform draws (word + 0.5) * 2**-64, at most 1 - 2**-53. Small values keep all digits.

    words: uint64, any shape.

    Returns: float64 of the same shape, 2**-65 .. 1 - 2**-53.
    """
    uniform: Float64 = np.add(words, 0.5, dtype=np.float64)
    uniform *= 2.0**-64
    return np.minimum(uniform, _BELOW_ONE, out=uniform)


def normal(words: Words) -> Float32:
    """Map words to standard normal draws by inversion of the distribution function, computed in float64.

    words: uint64, any shape.

    Returns: float32 of the same shape.
    """
    return ndtri(uniform(words)).astype(np.float32)


def gumbel(words: Words) -> Float32:
    """Map words to standard Gumbel draws: -log(-log(1 - u)) in float64, where u is the uniform draw of a word.

    The largest draws come from the smallest u. log1p keeps all digits of a small u, and u is at least 2**-65. So the
    outer log never gets 0, and no epsilon is needed. With g a draw, argmax(logits + g) selects even a category of
    probability 1e-15 at the right rate.

    words: uint64, any shape.

    Returns: float32 of the same shape.
    """
    return -np.log(-np.log1p(-uniform(words))).astype(np.float32)
