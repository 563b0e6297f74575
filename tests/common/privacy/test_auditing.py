"""The lower bound on ε: sound where the promise holds, and close where it is broken."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from choral.errors import ConfigError
from choral.privacy.auditing import least_epsilon, p_value
from scipy import stats

CANARIES, GUESSES, CONFIDENCE = 1000, 200, 0.95


def test_guesses_no_better_than_a_coin_refute_nothing() -> None:
    assert least_epsilon(CANARIES, GUESSES, GUESSES // 2, 1e-5, CONFIDENCE) == 0


def test_without_delta_it_is_a_binomial_tail() -> None:
    for epsilon, right in ((0.5, 130), (1.0, 150), (3.0, 195)):
        tail = stats.binom.sf(right - 1, GUESSES, math.exp(epsilon) / (1 + math.exp(epsilon)))
        assert p_value(CANARIES, GUESSES, right, epsilon, 0.0) == pytest.approx(tail)


def test_delta_makes_it_weaker_and_never_by_less_than_nothing() -> None:
    bounds = [least_epsilon(CANARIES, GUESSES, 190, delta, CONFIDENCE) for delta in (0.0, 1e-6, 1e-5, 1e-4, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]


def test_the_bound_is_where_the_tail_meets_the_confidence() -> None:
    bound = least_epsilon(CANARIES, GUESSES, 180, 1e-5, CONFIDENCE)
    assert p_value(CANARIES, GUESSES, 180, bound, 1e-5) == pytest.approx(1 - CONFIDENCE, rel=0.01)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_answers_seldom_seem_to_break_their_promise(epsilon: float) -> None:
    """Each tells the truth with probability e^ε/(1 + e^ε): exactly ε. The bound is above it as seldom as its confidence says."""
    rng = np.random.default_rng(1)
    right = rng.binomial(GUESSES, math.exp(epsilon) / (1 + math.exp(epsilon)), size=400)
    bounds = [least_epsilon(GUESSES, GUESSES, int(number), 0.0, CONFIDENCE) for number in right]
    above = sum(bound > epsilon for bound in bounds)
    assert stats.binomtest(above, 400, 1 - CONFIDENCE, alternative="greater").pvalue > 1e-6
    assert np.median(bounds) > 0.4 * epsilon


def test_a_missing_library_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"pip install 'choral\[privacy\]'"):
        p_value(10, 5, 3, 1.0, 1e-5)
