"""The noise contract: golden values, the law of the draws, and their tails."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from reparam.service.artifact import noise

Float32 = npt.NDArray[np.float32]
Draw = Callable[[noise.Words], Float32]

DRAWS = 10_000_000
TAILS = (1e-6, 1e-9, 1e-12, 1e-15)


def test_golden_values() -> None:
    """If this test fails, every seed has other rows: add a noise version, do not change the test."""
    words = noise.words(2**64 - 1, 2**40, 1, (5,))
    assert [hex(word) for word in words[0].tolist()] == [
        "0x543426df1f97af07",
        "0xeac788a2fe224bd1",
        "0x76bd4a28c16ebbf4",
        "0x8ca73b0adee6a96d",
        "0x576745dd1137cba0",
    ]
    normal = np.array([-0.44289517, 1.385873, -0.09079981, 0.12421313, -0.40859196], np.float32)
    gumbel = np.array([0.91912454, -0.9123656, 0.47273338, 0.22660631, 0.87306690], np.float32)
    assert np.array_equal(noise.normal(words)[0], normal)
    assert np.array_equal(noise.gumbel(words)[0], gumbel)


def test_golden_rows_of_a_small_seed() -> None:
    words = noise.words(7, 5, 2, (3,))
    assert [[hex(word) for word in row] for row in words.tolist()] == [
        ["0x744d5f450bc87293", "0x5cdae2a625544a9f", "0x4efc841430f874e5"],
        ["0x9850fa988f216382", "0x42e1c821b73657aa", "0x45457db9d8f7d589"],
    ]


def test_a_row_owns_whole_blocks_of_four_words() -> None:
    philox = np.random.Philox(key=7, counter=3 * 2)  # five elements: two blocks a row, so row 3 begins at block 6
    assert noise.words(7, 3, 1, (5,)).tolist() == [philox.random_raw(8)[:5].tolist()]


def test_rows_do_not_depend_on_the_request_they_are_drawn_in() -> None:
    whole = noise.words(9, 2**40, 64, (4, 5))
    parts = [noise.words(9, 2**40 + row, 1, (4, 5)) for row in range(64)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_the_last_row_of_the_last_seed_exists() -> None:
    last = noise.words(2**64 - 1, 2**64 - 1, 1, (7,))
    assert last.shape == (1, 7)
    assert not np.array_equal(last, noise.words(2**64 - 1, 2**64 - 2, 1, (7,)))


def test_counters_go_beyond_64_bits() -> None:
    """A row of two blocks owns two counters, so from row 2**63 on counters have more than 64 bits."""
    for row in (2**63, 2**64 - 1):
        philox = np.random.Philox(key=1, counter=2 * row)
        assert noise.words(1, row, 1, (7,)).tolist() == [philox.random_raw(8)[:7].tolist()]


def test_streams_of_a_seed_differ() -> None:
    assert not np.array_equal(noise.words(1, 0, 1, (4,), stream=0), noise.words(1, 0, 1, (4,), stream=1))


def test_the_extreme_words_give_finite_draws() -> None:
    extremes = np.array([0, 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)
    assert np.isfinite(noise.normal(extremes)).all()
    assert np.isfinite(noise.gumbel(extremes)).all()
    assert noise.gumbel(extremes)[0] == pytest.approx(64 * np.log(2) + np.log(2), abs=1e-5)


@pytest.mark.parametrize(("draw", "law"), [(noise.normal, stats.norm), (noise.gumbel, stats.gumbel_r)])
def test_ten_million_draws_follow_their_law(draw: Draw, law: stats.rv_continuous) -> None:
    draws = draw(noise.words(1, 0, DRAWS // 20, (20,))).ravel()
    assert draws.dtype == np.float32
    assert stats.kstest(draws, law.cdf).pvalue > 0.001


@pytest.mark.parametrize("p", TAILS)
def test_a_rare_category_is_drawn_exactly_with_its_probability(p: float) -> None:
    """Counts all 2**64 words of the rare category by bisection, for a grid of words of the frequent category."""
    others = ((np.arange(100_000) + 0.5) / 100_000 * 2.0**64).astype(np.uint64)
    frequency = _frequency(p, noise.gumbel(others), noise.gumbel, low_word_wins=True, words=2**64)
    assert frequency == pytest.approx(p, rel=1e-3)


@pytest.mark.parametrize("p", TAILS)
def test_the_usual_float32_formula_is_wrong_in_the_tail(p: float) -> None:
    """Runs the test above on -log(-log(u + 1e-7) + 1e-7) with the 24 random bits of a float32, and finds the fault."""

    def usual(words: npt.NDArray[np.uint64]) -> Float32:
        u = words.astype(np.float32) * np.float32(2**-24)
        epsilon = np.float32(1e-7)
        draws: Float32 = -np.log(-np.log(u + epsilon) + epsilon)
        return draws

    others = ((np.arange(100_000) + 0.5) / 100_000 * 2.0**24).astype(np.uint64)
    frequency = _frequency(p, usual(others), usual, low_word_wins=False, words=2**24)
    assert abs(frequency / p - 1) > 0.01
    assert p > 1e-7 or frequency == 0


def _frequency(p: float, others: Float32, draw: Draw, *, low_word_wins: bool, words: int) -> float:
    """Compute how often a category of probability p wins against the other category.

    others: draws of the other category.

    Returns: the share of all words that win, found by bisection because a draw is monotone in its word.
    """
    logit, other_logit = np.float32(np.log(p)), np.float32(np.log1p(-p))
    low, high = np.zeros(len(others), np.uint64), np.full(len(others), words - 1, np.uint64)
    for _ in range(words.bit_length()):
        middle = low + (high - low) // np.uint64(2)
        wins = logit + draw(middle) > other_logit + others
        onward = wins == low_word_wins
        low, high = np.where(onward & (middle < high), middle + np.uint64(1), low), np.where(onward, high, middle)
    winning = low.astype(np.float64) if low_word_wins else words - low.astype(np.float64)
    # Bisection never counts the last word: negligible in 2**64 words, but in 2**24 only this word may win.
    if not low_word_wins:
        winning = np.where(logit + draw(np.full_like(low, words - 1)) > other_logit + others, winning, 0)
    return float(winning.mean() / words)
