"""The privacy budget: what counts, what a round costs, and when there is no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from choral.plan import Kind
from choral.privacy.accounting import Accountant, Release, Sampling, epsilon
from choral_server.cohort import Draw
from choral_server.ledger import Ledger, RoundKey
from choral_server.privacy import LARGEST_CLIP, LEAST_CLIP, AdaptiveClip, Privacy
from choral_server.records import SpendingRecord, SpendingState
from server.home import NOON

TERMS = Privacy(epsilon=3.0, delta=1e-5, noise=2.0, clip=0.5, sampling="poisson")
DRAW = Draw(("a", "b"), 2, 20)
Spendings = dict[RoundKey, SpendingRecord]


def spend(ledger: Ledger, spendings: Spendings, number: int, run: str = "run", kind: Kind = Kind.TRAINING) -> SpendingRecord:
    spending = ledger.price(run, number, kind, DRAW, ledger.clip(run), NOON)
    spendings[run, number] = spending
    return spending


def test_each_round_costs_what_the_accountant_says_of_all_until_then() -> None:
    spendings: Spendings = {}
    ledger = Ledger(TERMS, 2, spendings)
    release = Release(2.0, Sampling.POISSON, 2, 20)
    for number in range(4):
        spent = spend(ledger, spendings, number)
        assert (spent.release, spent.clip, spent.delta, spent.state) == (release, 0.5, 1e-5, SpendingState.RESERVED)
        assert spent.epsilon_models == pytest.approx(epsilon({release: number + 1}, 1e-5))
        assert spent.epsilon_coordinator == pytest.approx(epsilon({release: number + 1}, 1e-5, amplified=False))


@pytest.mark.parametrize("kind", [Kind.STATISTICS, Kind.EVALUATION])
def test_of_other_rounds_everybody_is_asked_and_bears_more_noise(kind: Kind) -> None:
    everybody = Draw(tuple("abcdef"), 6, 6)
    price = Ledger(TERMS, 2, {}).price("run", 0, kind, everybody, 1.0, NOON)
    assert price.release == Release(3 * 2.0, Sampling.NONE, 6, 6)
    assert Ledger(TERMS, 9, {}).price("run", 0, kind, everybody, 1.0, NOON).release.noise == 2.0


def test_what_is_set_aside_and_what_is_spent_count_and_what_is_returned_does_not() -> None:
    spendings: Spendings = {}
    ledger = Ledger(TERMS, 2, spendings)
    first = spend(ledger, spendings, 0)
    reserved = spend(ledger, spendings, 1).epsilon_models
    spendings["run", 1] = replace(spendings["run", 1], state=SpendingState.RETURNED)
    assert spend(ledger, spendings, 2).epsilon_models == pytest.approx(reserved)
    spendings["run", 2] = replace(spendings["run", 2], state=SpendingState.SPENT)
    assert spend(ledger, spendings, 3).epsilon_models > reserved > first.epsilon_models


def test_another_run_over_the_same_clients_has_no_other_budget() -> None:
    spendings: Spendings = {}
    ledger = Ledger(TERMS, 2, spendings)
    before = spend(ledger, spendings, 0)
    assert spend(ledger, spendings, 0, run="run-2").epsilon_models > before.epsilon_models


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_round_that_would_overspend_is_named_with_the_figures(accountant: str) -> None:
    spendings: Spendings = {}
    ledger = Ledger(Privacy(epsilon=1.0, delta=1e-5, noise=8.0, accountant=accountant), 2, spendings)
    number = 0
    while (reason := ledger.overspent(last := ledger.price("run", number, Kind.TRAINING, DRAW, 1.0, NOON))) is None:
        spendings["run", number] = last
        number += 1
    counted = Accountant(accountant)
    assert number > 0
    spent, more = (epsilon({Release(8.0, Sampling.NONE, 2, 20): count}, 1e-5, counted) for count in (number, number + 1))
    assert spent <= 1.0 < more
    assert f"ε is {spent:.4g} at δ 1e-05, a further training round of 2 of 20 clients would make it {more:.4g}" in reason
    assert "run.privacy.epsilon allows 1" in reason


def test_how_many_rounds_are_left() -> None:
    spendings: Spendings = {}
    ledger = Ledger(TERMS, 2, spendings)
    for number in range(3):
        spend(ledger, spendings, number)
    left = ledger.left()
    assert left.epsilon_models == pytest.approx(spendings["run", 2].epsilon_models)
    for number in range(3, 3 + left.rounds_left):
        spendings["run", number] = replace(spendings["run", 0], round=number)
    assert ledger.overspent(ledger.price("run", 10**6, Kind.TRAINING, DRAW, 1.0, NOON)) is not None
    assert ledger.left().rounds_left == 0


def test_the_clip_goes_on_from_where_the_run_left_it() -> None:
    spendings: Spendings = {}
    ledger = Ledger(TERMS.model_copy(update={"adaptive": AdaptiveClip()}), 2, spendings)
    spend(ledger, spendings, 0)
    assert ledger.clip("run") == 0.5
    spendings["run", 0] = replace(spendings["run", 0], state=SpendingState.SPENT, next_clip=0.4)
    spend(ledger, spendings, 1)
    assert spendings["run", 1].clip == 0.4
    assert (ledger.clip("run"), ledger.clip("run-2")) == (0.4, 0.5)
    assert Ledger(TERMS, 2, spendings).clip("run") == 0.5  # it does not follow any more


@pytest.mark.parametrize(
    ("within", "moves"), [(0.5, 1.0), (1.0, 2.718281828**-0.1), (0.0, 2.718281828**0.1), (7.0, 2.718281828**-0.1)]
)
def test_the_clip_follows_the_quantile_by_no_more_than_its_rate(within: float, moves: float) -> None:
    assert AdaptiveClip().next(2.0, within) == pytest.approx(2.0 * moves)


def test_the_clip_stays_within_what_can_be_configured() -> None:
    clip = 1.0
    for _ in range(1000):
        clip = AdaptiveClip(quantile=0.01, rate=1.0).next(clip, 1.0)
    assert clip == LEAST_CLIP
    for _ in range(1000):
        clip = AdaptiveClip(quantile=0.99, rate=1.0).next(clip, 0.0)
    assert clip == LARGEST_CLIP


def test_what_is_charged_is_as_the_rounds_were_that_it_stands_for() -> None:
    """Also if the noise is added by somebody else now."""
    spendings: Spendings = {}
    settings = Privacy(epsilon=50.0, delta=1e-5, noise=2.0, mode="distributed")
    spend(Ledger(settings, 2, spendings), spendings, 0)
    charged = Ledger(Privacy(epsilon=50.0, delta=1e-5, noise=2.0), 2, spendings).charge("run", 3, NOON)
    assert (charged.mode, charged.release) == ("distributed", spendings["run", 0].release)
    assert charged.release.whole
    assert charged.epsilon_models == pytest.approx(epsilon({charged.release: 4}, 1e-5))
