"""ε in closed form, held against Google's dp-accounting."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from choral.privacy.accounting import Release, epsilon
from choral.privacy.gaussian import WHOLE_ORDERS, epsilon_of, epsilon_of_integers, noise_for_epsilon
from dp_accounting import rdp

NOISES = [0.05, 0.3, 1.0, 2.5, 20.0, 500.0]
DELTAS = [1e-3, 1e-5, 1e-9]


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("noise", NOISES)
def test_it_is_what_the_library_says(noise: float, delta: float) -> None:
    assert epsilon_of(noise**-2, delta) == pytest.approx(dp_accounting.get_epsilon_gaussian(noise, delta), rel=1e-6, abs=1e-9)
    accountant = rdp.RdpAccountant(WHOLE_ORDERS)
    accountant.compose(dp_accounting.GaussianDpEvent(noise))
    assert epsilon_of_integers(noise**-2, delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-6, abs=1e-9)
    assert epsilon_of_integers(noise**-2, delta) >= epsilon_of(noise**-2, delta)


@pytest.mark.parametrize("delta", DELTAS)
def test_many_releases_are_one_of_their_precision(delta: float) -> None:
    together = epsilon_of(3 * 4.0**-2 + 2 * 7.0**-2, delta)
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_accounting.GaussianDpEvent(4.0), 3).compose(dp_accounting.GaussianDpEvent(7.0), 2)
    assert together == pytest.approx(accountant.get_epsilon(delta), abs=1e-3)


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
def test_the_noise_for_an_epsilon(target: float) -> None:
    noise = noise_for_epsilon(target, 1e-5)
    assert noise == pytest.approx(dp_accounting.get_sigma_gaussian(target, 1e-5), rel=1e-6)
    assert epsilon_of(noise**-2, 1e-5) <= target * (1 + 1e-9)


def test_the_ends() -> None:
    assert epsilon_of(0.0, 1e-5) == epsilon_of_integers(0.0, 1e-5) == 0.0
    assert epsilon_of(1e-12, 1e-5) == 0.0
    assert epsilon_of(1e30, 1e-5) == math.inf


def test_releases_at_whole_orders_are_counted_so_with_others_too() -> None:
    whole, plain = Release(2.0, whole=True), Release(3.0)
    assert epsilon({whole: 4}, 1e-5) == pytest.approx(epsilon_of_integers(1.0, 1e-5), rel=1e-6)
    assert epsilon({whole: 4, plain: 9}, 1e-5) == pytest.approx(epsilon_of_integers(2.0, 1e-5), rel=1e-6)
    assert epsilon({Release(2.0): 4}, 1e-5) <= epsilon({whole: 4}, 1e-5)
