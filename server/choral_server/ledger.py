"""The privacy budget: what all that was released has cost, what a further round would, and whether that is allowed.

It counts every run in the database, for the same clients stand behind all of them. What is set aside for a round counts at once; of
an abandoned round nothing is released, and it counts no more. A rollback gives nothing back: what was released stays released.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from choral.errors import ConfigError
from choral.plan import Kind
from choral.privacy.accounting import Account, Accountant, Release, Sampling, epsilon, rounds_for

from choral_server.cohort import Draw
from choral_server.privacy import Privacy
from choral_server.records import SpendingRecord, SpendingState

RoundKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Left:
    """The budget, what is spent of it for either reader, and for how many rounds more it is enough at the least."""

    epsilon: float
    delta: float
    epsilon_models: float
    epsilon_coordinator: float
    rounds_left: int


class Ledger:
    """What `spendings`, by run and round and in their order, leave of the budget in `settings`; others add to them."""

    def __init__(self, settings: Privacy, cohort_size: int, spendings: dict[RoundKey, SpendingRecord]) -> None:
        self.settings = settings
        self._cohort_size = cohort_size
        self._spendings = spendings
        self._counting = threading.Lock()  # threads ask, for a round and for an operator
        self._accounts = {amplified: Account(settings.counted_by, amplified) for amplified in (True, False)}

    def price(self, run: str, round: int, kind: Kind, draw: Draw, clip: float, now: datetime) -> SpendingRecord:
        """What a round over these clients is set aside for. Slow: call it in a thread. Raises ConfigError."""
        settings = self.settings
        noise = settings.noise_in(kind, draw.expected, self._cohort_size)
        sampling = settings.drawn_by if kind is Kind.TRAINING else Sampling.NONE  # of the others, everybody is asked
        release = settings.release(noise, sampling, draw.expected, draw.population)
        return self._spending(run, round, kind, release, clip, now)

    def charge(self, run: str, rounds: int, now: datetime) -> SpendingRecord:
        """So many rounds like the newest of training, which were made and are not known any more. Slow.

        Raises ConfigError: no round is known that they could be like.
        """
        newest = next((one for one in reversed(list(self._spendings.values())) if one.kind is Kind.TRAINING), None)
        if newest is None:
            raise ConfigError(f"no private training round is in the ledger, so it cannot be known what {rounds} more have cost")
        number = min([0, *(round for name, round in list(self._spendings) if name == run)]) - 1
        made = self._spending(run, number, Kind.TRAINING, newest.release, newest.clip, now, rounds)
        return replace(made, state=SpendingState.SPENT, mode=newest.mode)

    def _spending(
        self, run: str, round: int, kind: Kind, release: Release, clip: float, now: datetime, rounds: int = 1
    ) -> SpendingRecord:
        settings, counted = self.settings, self._counted
        with self._counting:
            for account in self._accounts.values():
                account.settle(counted)
        models, known = self._both(counted + Counter({release: rounds}))
        return SpendingRecord(
            run, round, kind, now, release, clip, settings.delta, models, known, rounds=rounds, mode=settings.mode
        )

    def overspent(self, spending: SpendingRecord) -> str | None:
        """Why a round with this price is not to be opened; None: it may. Slow."""
        if spending.epsilon_models <= self.settings.epsilon:
            return None
        spent, release = self._both(self._counted)[0], spending.release
        return (
            f"the privacy budget is spent: ε is {spent:.4g} at δ {spending.delta:g}, a further {spending.kind.value} round of "
            f"{release.expected} of {release.population} clients would make it {spending.epsilon_models:.4g}, and "
            f"run.privacy.epsilon allows {self.settings.epsilon:g}"
        )

    def cost(self, spendings: Iterable[SpendingRecord]) -> float:
        """ε of these alone, for whoever knows who took part. Slow."""
        return epsilon(counted_releases(spendings), self.settings.delta, self.settings.counted_by, amplified=False)

    def left(self) -> Left:
        """What there was, what is spent, and for how many rounds like the newest it is still enough. Slow."""
        settings, counted = self.settings, self._counted
        models, known = self._both(counted)
        trained = (one.release for one in reversed(list(self._spendings.values())) if one.kind is Kind.TRAINING)
        release = next(trained, settings.release(settings.noise))
        rounds = rounds_for(settings.epsilon, settings.delta, release, Accountant.RDP, counted)  # which is fast, and never too many
        return Left(settings.epsilon, settings.delta, models, known, rounds)

    def _both(self, releases: Counter[Release]) -> tuple[float, float]:
        """ε for who does not know who was drawn, and for who does."""
        with self._counting:
            models, known = (self._accounts[amplified].epsilon(releases, self.settings.delta) for amplified in (True, False))
        return models, known

    @property
    def _counted(self) -> Counter[Release]:
        return counted_releases(list(self._spendings.values()))  # all at once: rounds may open meanwhile

    def clip(self, run: str) -> float:
        """What updates of the next round are shortened to."""
        known = (one for (name, _), one in reversed(self._spendings.items()) if name == run and one.next_clip is not None)
        newest = next(known, None)
        if self.settings.adaptive is None or newest is None or newest.next_clip is None:
            return self.settings.clip
        return newest.next_clip


def counted_releases(spendings: Iterable[SpendingRecord]) -> Counter[Release]:
    """What was released, or may yet be."""
    counted: Counter[Release] = Counter()
    for spending in spendings:
        if _counts(spending):
            counted[spending.release] += spending.rounds
    return counted


def _counts(spending: SpendingRecord) -> bool:
    return spending.state is not SpendingState.RETURNED
