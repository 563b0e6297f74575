"""What Gaussian noise costs that is counted without any sampling: in closed form, for devices that have no SciPy.

`precision` is Σ 1/noise² over all releases, each with noise of standard deviation `noise` over what one client can move: together
they tell exactly as much as one with that precision. The tests hold all of it against Google's dp-accounting.
"""

from __future__ import annotations

import math

_STEPS = 200  # of a bisection: more than a float64 has bits
WHOLE_ORDERS = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024, 4096, 16384)
_LARGEST = 1e6  # ε: nothing is promised by that


def epsilon_of(precision: float, delta: float) -> float:
    """ε at `delta` of Gaussian noise: the analytic Gaussian mechanism (Balle & Wang 2018, ICML, theorem 8)."""
    if precision <= 0:
        return 0.0
    reach = math.sqrt(precision)
    if _delta(reach, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(reach, high) > delta:
        low, high = high, 2 * high
        if high > _LARGEST:
            return math.inf
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(reach, middle) > delta else (low, middle)
    return high


def noise_for_epsilon(epsilon: float, delta: float) -> float:
    """The least noise of one release that costs no more than `epsilon` at `delta`."""
    low, high = 0.0, 1.0
    while epsilon_of(high**-2, delta) > epsilon:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle == 0 or epsilon_of(middle**-2, delta) > epsilon else (low, middle)
    return high


def epsilon_of_integers(precision: float, delta: float) -> float:
    """The same of noise that is known to cost no more than Gaussian noise at integer orders: by Rényi differential privacy.

    From RDP to ε by Canonne, Kamath & Steinke 2020 (NeurIPS), proposition 12.
    """
    if precision <= 0:
        return 0.0
    return max(0.0, min(_of_order(order, precision, delta) for order in WHOLE_ORDERS))


def _of_order(order: int, precision: float, delta: float) -> float:
    return order * precision / 2 + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _delta(reach: float, epsilon: float) -> float:
    """δ(ε) of two normals of deviation 1 that are `reach` apart."""
    left, right = reach / 2 - epsilon / reach, -reach / 2 - epsilon / reach
    return _normal(left) - math.exp(epsilon + _log_normal(right))


def _normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _log_normal(x: float) -> float:
    """Log Φ(x), also where Φ is no float64 any more (Abramowitz & Stegun 26.2.12)."""
    if x > -30:
        return math.log(_normal(x))
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2 + math.log1p(-1 / x**2 + 3 / x**4)
