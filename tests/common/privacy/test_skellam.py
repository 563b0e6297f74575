"""Skellam noise: of the right distribution, from its smallest rate to its largest, and what it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from choral.privacy.gaussian import WHOLE_ORDERS
from choral.privacy.skellam import LEAST_RATE, LEAST_VARIANCE, Skellam, as_gaussian
from scipy import stats

MANY = 200_000
SURELY = 1e-9
"""a test that chance fails so seldom is not repeated"""


@pytest.mark.parametrize("variance", [2 * LEAST_RATE, 300.0, 5000.5])
def test_each_number_is_as_often_there_as_it_should_be(variance: float) -> None:
    drawn = Skellam(variance)(MANY)
    assert drawn.dtype == np.int64
    edge = int(3 * math.sqrt(variance))
    inner = np.arange(-edge, edge + 1)
    expected = np.append(
        stats.skellam.pmf(inner, variance / 2, variance / 2), 2 * stats.skellam.sf(edge, variance / 2, variance / 2)
    )
    counted = np.bincount(np.clip(np.where(np.abs(drawn) > edge, edge + 1, drawn) + edge, 0, 2 * edge + 1), minlength=2 * edge + 2)
    assert stats.chisquare(counted, expected / expected.sum() * MANY).pvalue > SURELY


@pytest.mark.parametrize("variance", [2.0**20, 2.0**32 + 0.7, 2.0**56])
def test_with_a_large_rate_it_is_normal_to_its_last_bits(variance: float) -> None:
    drawn = Skellam(variance)(MANY)
    assert stats.kstest(drawn / math.sqrt(variance), "norm").pvalue > SURELY
    assert SURELY < stats.chi2.cdf(np.square(drawn / math.sqrt(variance)).sum(), MANY) < 1 - SURELY
    assert stats.chisquare(np.bincount(drawn & 255, minlength=256)).pvalue > SURELY


def test_a_sum_of_parts_is_the_whole() -> None:
    """The noise of a hundred clients, of whom each adds a hundredth."""
    variance, clients = 2.0**24, 100
    total = np.sum([Skellam(variance / clients)(MANY // 10) for _ in range(clients)], axis=0)
    assert SURELY < stats.chi2.cdf(np.square(total / math.sqrt(variance)).sum(), MANY // 10) < 1 - SURELY


@pytest.mark.parametrize("count", [0, 1, 7])
def test_so_many_as_were_asked_for_and_never_the_same(count: int) -> None:
    source = Skellam(1e12)
    assert source(count).shape == (count,)
    assert not np.array_equal(source(40), Skellam(1e12)(40))


@pytest.mark.parametrize("variance", [0.0, 1.0, -5.0, math.inf, math.nan, 2.0**70])
def test_what_it_cannot_draw_is_refused(variance: float) -> None:
    with pytest.raises(ValueError, match="Skellam noise of variance"):
        Skellam(variance)


def test_it_costs_no_more_than_the_gaussian_that_is_charged() -> None:
    """Rényi divergence of Skellam noise and the same moved by Δ, computed from its probabilities, at whole orders."""
    variance, moved = 400.0, 10
    support = np.arange(-1500, 1501)
    here, there = (stats.skellam.logpmf(support - by, variance / 2, variance / 2) for by in (0, moved))
    noise = math.sqrt(variance) / moved / math.sqrt(1 + 4 / variance)
    for order in range(2, 20):
        terms = order * here - (order - 1) * there
        keep = np.isfinite(terms)
        divergence = float(np.logaddexp.reduce(terms[keep])) / (order - 1)
        assert divergence <= order / (2 * noise**2) * (1 + 1e-9)
        assert divergence >= order / (2 * (math.sqrt(variance) / moved) ** 2) * 0.95  # and hardly less than a Gaussian


def test_what_is_charged_is_a_little_less_noise() -> None:
    assert as_gaussian(3.0) < 3.0
    assert as_gaussian(3.0) == pytest.approx(3.0, rel=3 / LEAST_VARIANCE)
    assert min(WHOLE_ORDERS) == 2
    assert all(isinstance(order, int) for order in WHOLE_ORDERS)
