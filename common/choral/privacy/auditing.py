"""A lower bound on ε from one run in which some took part by the toss of a coin (Steinke, Nasr & Jagielski 2023, NeurIPS)."""

from __future__ import annotations

from choral.errors import ConfigError

_MOST_EPSILON = 100.0
_DIGITS = 1e-4


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely `right` of `guesses` guesses, or more, are at the most, if an (ε, δ) promise holds: theorem 5.2.

    Of each of `canaries` a fair coin has decided whether it took part, and it was guessed, or not, which way the coin fell.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ConfigError(f"the audit needs the extra privacy ({error}): pip install 'choral[privacy]'") from error
    import numpy as np

    coin = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
    beta, alpha = float(coin.sf(right - 1)), 0.0
    if delta > 0 and right > 0:
        fewer = np.cumsum(coin.pmf(np.arange(right - 1, -1, -1)))  # P(right - i ≤ number < right), for i = 1, 2, …
        alpha = float((fewer / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2 * canaries * delta * alpha)


def least_epsilon(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The ε that is refuted, and all below it, at this confidence; 0: none is. The promise cannot have been a better one."""
    low, high = 0.0, _MOST_EPSILON
    if p_value(canaries, guesses, right, low, delta) >= 1 - confidence:
        return 0.0
    while high - low > _DIGITS:
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low
