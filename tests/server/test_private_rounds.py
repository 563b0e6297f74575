"""What becomes of the price of a round whose clients add the noise."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from choral.plan import Kind
from choral.privacy.skellam import as_gaussian
from choral_server.cohort import Draw
from choral_server.config import RunSettings
from choral_server.privacy import Privacy
from choral_server.private_rounds import PrivateRounds, returned
from choral_server.records import SpendingRecord, SpendingState
from choral_server.rounds import Part, Parts, PartState, Round, RoundState
from choral_server.secure_aggregation import SecureAggregation

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
MODES = ["central", "distributed", "local"]
ARRIVED = Part("run/0/alice", "alice", PartState.ACCEPTED)


class Store:
    """No more of it is needed."""

    def __init__(self) -> None:
        self.spendings: dict[tuple[str, int], SpendingRecord] = {}


def private(mode: str, store: Store, **changes: Any) -> PrivateRounds:
    settings = Privacy(epsilon=50.0, delta=1e-5, **{"mode": mode, "noise": 3.0} | changes)
    secure = SecureAggregation() if mode == "distributed" else None
    run = RunSettings(rounds=9, cohort_size=4, privacy=settings, secure_aggregation=secure)
    return PrivateRounds(run, "run", 10, ("loss",), None, cast("Any", store))


async def opened(mode: str) -> tuple[Store, Round]:
    store = Store()
    spending = await private(mode, store).price(0, Kind.TRAINING, Draw(("alice",) * 4, 4, 4), NOON)
    store.spendings["run", 0] = spending
    return store, Round("run", 0, Kind.TRAINING, 0, 4, 4, Parts([replace(ARRIVED, state=PartState.WORKING)]), NOON)


@pytest.mark.parametrize("mode", MODES)
async def test_a_round_is_taken_up_only_if_its_clients_would_be_told_the_same(mode: str) -> None:
    store, round = await opened(mode)
    assert private(mode, store).suits(round)
    for other in MODES:
        assert private(other, store).suits(round) == (other == mode)
    for changes in ({"noise": 0.1}, {"clip": 2.0}):
        assert private(mode, store, **changes).suits(round) == (mode == "central")  # which goes by what was set aside


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arrived", [False, True])
async def test_what_the_coordinator_may_have_seen_does_not_come_back(mode: str, arrived: bool) -> None:
    store, round = await opened(mode)
    before = replace(round, parts=Parts([ARRIVED])) if arrived else round
    (after,) = returned(store.spendings["run", 0], before, replace(before, state=RoundState.ABANDONED))
    back = {"central": True, "distributed": not arrived, "local": False}[mode]
    assert after.state is (SpendingState.RETURNED if back else SpendingState.SPENT)
    assert returned(store.spendings["run", 0], before, replace(before, state=RoundState.CLOSED)) == ()


@pytest.mark.parametrize(("honest", "clients"), [(1.0, 4), (0.5, 2), (0.3, 2), (0.1, 1)])
async def test_noise_is_divided_among_as_many_as_are_counted_on(honest: float, clients: int) -> None:
    store = Store()
    rounds = private("distributed", store, honest=honest)
    told = rounds.plan(Kind.TRAINING, 4, evaluate=False)
    assert told is not None
    assert (told.clients, told.noise, told.clip) == (clients, 3.0, 1.0)
    spending = await rounds.price(0, Kind.TRAINING, Draw(("alice",) * 4, 4, 4), NOON)
    assert (spending.release.noise, spending.release.whole) == (as_gaussian(3.0), True)
    assert private("central", store).plan(Kind.TRAINING, 4, evaluate=False) is None
