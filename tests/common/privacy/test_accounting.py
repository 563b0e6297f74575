"""ε against the library itself, against another library, and against what is known of it."""

from __future__ import annotations

import sys
from dataclasses import replace

import dp_accounting as dp
import pytest
from choral.errors import ConfigError
from choral.privacy.accounting import Account, Accountant, Release, Sampling, epsilon, noise_for, rounds_for
from dp_accounting import pld, rdp
from opacus.accountants import PRVAccountant

DELTA = 1e-5
REFERENCE = Release(1.0, Sampling.POISSON, 50, 1000)


@pytest.mark.parametrize(("accountant", "known"), [(Accountant.RDP, 5.367864), (Accountant.PLD, 4.765920)])
def test_the_reference(accountant: Accountant, known: float) -> None:
    assert epsilon({REFERENCE: 200}, DELTA, accountant) == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("noise", [0.7, 1.0, 2.5])
@pytest.mark.parametrize(("expected", "population", "rounds"), [(50, 1000, 200), (10, 10_000, 1000), (30, 60, 3)])
def test_both_accountants_are_those_of_the_library(noise: float, expected: int, population: int, rounds: int) -> None:
    releases = {Release(noise, Sampling.POISSON, expected, population): rounds}
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(expected / population, dp.GaussianDpEvent(noise)), rounds)
    for accountant, theirs in ((Accountant.RDP, rdp.RdpAccountant()), (Accountant.PLD, pld.PLDAccountant())):
        assert epsilon(releases, DELTA, accountant) == pytest.approx(theirs.compose(event).get_epsilon(DELTA), abs=1e-6)


@pytest.mark.parametrize("noise", [0.8, 1.0, 1.5])
def test_another_library_agrees(noise: float) -> None:
    theirs = PRVAccountant()
    for _ in range(200):
        theirs.step(noise_multiplier=noise, sample_rate=0.05)
    ours = epsilon({replace(REFERENCE, noise=noise): 200}, DELTA, Accountant.PLD)
    assert ours == pytest.approx(theirs.get_epsilon(DELTA, eps_error=0.005), abs=0.02)


def test_a_fixed_cohort_is_counted_with_another_client_in_place_of_one() -> None:
    one = dp.NeighboringRelation.REPLACE_ONE
    event = dp.SampledWithoutReplacementDpEvent(1000, 50, dp.GaussianDpEvent(2.0))  # the sum moves by two clips: half the noise
    theirs = rdp.RdpAccountant(neighboring_relation=one).compose(event, 200).get_epsilon(DELTA)
    assert epsilon({Release(4.0, Sampling.FIXED, 50, 1000): 200}, DELTA) == pytest.approx(theirs, abs=1e-6)


def test_who_knows_who_was_drawn_is_told_no_amplification() -> None:
    everybody = epsilon({Release(1.0): 200}, DELTA)
    assert epsilon({REFERENCE: 200}, DELTA, amplified=False) == everybody
    assert everybody > 30 * epsilon({REFERENCE: 200}, DELTA)
    theirs = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE).compose(dp.GaussianDpEvent(2.0), 7)
    known = epsilon({Release(4.0, Sampling.FIXED, 50, 1000): 7}, DELTA, amplified=False)
    assert known == pytest.approx(theirs.get_epsilon(DELTA), abs=1e-6)


def test_a_round_of_everybody_has_no_amplification() -> None:
    for sampling in Sampling:
        release = Release(3.0, sampling, 10, 10)
        assert epsilon({release: 5}, DELTA) == epsilon({release: 5}, DELTA, amplified=False)


def test_rounds_of_different_terms_add_up() -> None:
    other, everybody = replace(REFERENCE, population=500), Release(2.0)
    theirs = rdp.RdpAccountant()
    for rate, noise, count in ((0.05, 1.0, 20), (0.1, 1.0, 30)):
        theirs.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), count)
    theirs.compose(dp.GaussianDpEvent(2.0), 2)
    assert epsilon({REFERENCE: 20, other: 30, everybody: 2}, DELTA) == pytest.approx(theirs.get_epsilon(DELTA), abs=1e-6)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon({}, DELTA) == 0
    assert epsilon({REFERENCE: 0}, DELTA) == 0


@pytest.mark.parametrize("accountant", Accountant)
def test_as_much_noise_as_a_budget_needs_and_hardly_more(accountant: Accountant) -> None:
    noise = noise_for(4.0, DELTA, lambda noise: {replace(REFERENCE, noise=noise): 200}, accountant)
    assert epsilon({replace(REFERENCE, noise=noise): 200}, DELTA, accountant) <= 4.0
    assert epsilon({replace(REFERENCE, noise=noise * 0.999): 200}, DELTA, accountant) > 4.0


def test_a_budget_that_no_noise_keeps() -> None:
    with pytest.raises(ConfigError, match=r"no noise up to 10000 keeps ε at 1e-09"):
        noise_for(1e-9, DELTA, lambda noise: {Release(noise): 1000})


def test_so_many_rounds_and_not_one_more() -> None:
    spent = {Release(5.0): 3}
    rounds = rounds_for(4.0, DELTA, REFERENCE, spent=spent)
    assert rounds > 0
    assert epsilon({**spent, REFERENCE: rounds}, DELTA) <= 4.0 < epsilon({**spent, REFERENCE: rounds + 1}, DELTA)
    assert rounds_for(0.1, DELTA, Release(1.0)) == 0


@pytest.mark.parametrize("amplified", [True, False])
def test_what_one_accountant_cannot_do_the_other_does(amplified: bool) -> None:
    mixed = {Release(4.0, Sampling.FIXED, 5, 10): 2, REFERENCE: 3}
    by_pld, by_rdp = (epsilon(mixed, DELTA, accountant, amplified=amplified) for accountant in (Accountant.PLD, Accountant.RDP))
    assert by_pld == by_rdp


def test_a_missing_library_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'choral\[privacy\]'"):
        epsilon({REFERENCE: 1}, DELTA)


@pytest.mark.parametrize("accountant", Accountant)
@pytest.mark.parametrize("amplified", [True, False])
def test_what_is_settled_is_counted_once_and_changes_nothing(accountant: Accountant, amplified: bool) -> None:
    account, releases = Account(accountant, amplified), dict[Release, int]()
    for population in (100, 200, 100, 400):
        account.settle(releases)
        release = replace(REFERENCE, population=population)
        more = {**releases, release: releases.get(release, 0) + 1}
        assert account.epsilon(more, DELTA) == pytest.approx(epsilon(more, DELTA, accountant, amplified=amplified), abs=1e-7)
        releases = more
    fewer = {replace(REFERENCE, population=200): 1}  # some of it was never released
    assert account.epsilon(fewer, DELTA) == pytest.approx(epsilon(fewer, DELTA, accountant, amplified=amplified), abs=1e-7)
    account.settle(fewer)
    assert account.epsilon(fewer, DELTA) == pytest.approx(epsilon(fewer, DELTA, accountant, amplified=amplified), abs=1e-7)


def test_another_kind_of_sampling_is_counted_from_the_beginning() -> None:
    account, fixed = Account(), Release(4.0, Sampling.FIXED, 5, 100)
    account.settle({REFERENCE: 3})
    both = {REFERENCE: 3, fixed: 1}
    assert account.epsilon(both, DELTA) == epsilon(both, DELTA)
    account.settle(both)
    assert account.epsilon(both, DELTA) == epsilon(both, DELTA)
