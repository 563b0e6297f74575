"""Noise: of the right size and shape, whole, and never the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from choral.privacy import noise
from choral.privacy.noise import STEPS, Bits, Noise, discrete_gaussian, gaussian
from scipy import stats

SOURCES = [gaussian, discrete_gaussian]
MANY = 200_000
SURELY = 1e-9
"""a test that chance fails so seldom is not repeated"""


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_normal_with_the_deviation_that_is_promised(source: Callable[[], Noise]) -> None:
    drawn = source()(MANY) / STEPS
    assert stats.kstest(drawn, "norm").pvalue > SURELY
    assert SURELY < stats.chi2.cdf(np.square(drawn).sum(), MANY) < 1 - SURELY
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 6 / math.sqrt(MANY)


@pytest.mark.parametrize("source", SOURCES)
def test_its_last_bits_are_those_of_any_integer(source: Callable[[], Noise]) -> None:
    drawn = source()(MANY)
    assert drawn.dtype == np.int64
    assert stats.chisquare(np.bincount(drawn & 255, minlength=256)).pvalue > SURELY


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1000])
def test_so_many_as_were_asked_for(source: Callable[[], Noise], count: int) -> None:
    assert source()(count).shape == (count,)


@pytest.mark.parametrize("source", SOURCES)
def test_no_two_are_alike(source: Callable[[], Noise]) -> None:
    one, other = source(), source()
    draws = [tuple(draw(8)) for draw in (one, one, other)]
    assert len(set(draws)) == 3


def test_the_exponential_coin_is_exact() -> None:
    """Bernoulli(exp(-n/d)) without an exponential."""
    bits = Bits()
    for numerator in (0, 1, 3, 7, 10):
        heads = noise._exp(bits, np.full(MANY, numerator, np.uint64), 10).sum()
        probability = math.exp(-numerator / 10)
        assert stats.binomtest(int(heads), MANY, probability).pvalue > SURELY


def test_integers_below_a_limit_are_equally_likely() -> None:
    bits = Bits()
    for limit in (1, 3, 10, 255):
        assert stats.chisquare(np.bincount(bits.below(limit, MANY).astype(int), minlength=limit)).pvalue > SURELY or limit == 1
    large = bits.below((1 << 62) + 1, 1000)
    assert int(large.max()) <= 1 << 62


def test_a_number_that_would_be_favoured_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bits, asked = Bits(), list[int]()
    limit = 3 << 61  # of 2^64 a quarter is left over, and must not count
    words = bits.words
    monkeypatch.setattr(bits, "words", lambda count: asked.append(count) or words(count))
    drawn = bits.below(limit, MANY)
    assert sum(asked) > 1.2 * MANY
    halves = [int((drawn < np.uint64(limit // 2)).sum()), int((drawn >= np.uint64(limit // 2)).sum())]
    assert stats.chisquare(halves).pvalue > SURELY
