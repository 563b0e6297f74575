"""What privacy asks of the rounds of a run: what clients are told, what results are added to, and what is spent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from choral.metrics import Metric, weighted_mean
from choral.plan import Kind, Plan, PrivatePlan, SecurePlan
from choral.privacy.told import Range, scale_for, scaled, told_by, told_of, unscaled
from choral.secagg.fixed_point import FixedPoint
from choral.secagg.summand import layout_of

from choral_server.aggregate import WeightedSum
from choral_server.cohort import Draw
from choral_server.config import RunSettings
from choral_server.ledger import Ledger
from choral_server.noised_sum import NoisedStatistics, NoisedSum
from choral_server.privacy import Privacy, noise_of
from choral_server.private_means import PrivateStatistics, noised_metrics
from choral_server.private_sum import PrivateSum, Terms
from choral_server.records import DISTRIBUTED, LOCAL, SpendingRecord, SpendingState
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.store import Store

Noised = NoisedSum | NoisedStatistics | PrivateSum | PrivateStatistics | WeightedSum


class PrivateRounds:
    """The private rounds of run `name`, for a model of `size` averaged elements.

    `metrics` are what clients measure, `features` the ranges of what is standardised.
    """

    def __init__(
        self, settings: RunSettings, name: str, size: int, metrics: Sequence[str], features: Sequence[Range] | None, store: Store
    ) -> None:
        assert settings.privacy is not None, "only then"
        self._run = settings
        self._privacy: Privacy = settings.privacy
        self._name = name
        self._size = size
        self._metrics = metrics
        self._features = tuple(features or ())
        self._spendings = store.spendings
        self.ledger = Ledger(self._privacy, settings.cohort_size, store.spendings)

    # What a round costs

    async def price(self, number: int, kind: Kind, draw: Draw, now: datetime) -> SpendingRecord:
        """What a round costs, over these clients."""
        ledger = self.ledger
        return await asyncio.to_thread(ledger.price, self._name, number, kind, draw, ledger.clip(self._name), now)

    def spending(self, round: Round) -> SpendingRecord | None:
        """What was set aside for a round."""
        return self._spendings.get((round.run, round.number))

    def suits(self, round: Round) -> bool:
        """Whether a round was opened as these settings would open it: where clients add the noise, they would be told of these."""
        spending, privacy = self.spending(round), self._privacy
        if spending is None or spending.mode != privacy.mode:
            return False
        release = spending.release
        noise = privacy.noise_in(round.kind, release.expected, self._run.cohort_size)
        return not privacy.on_devices or (privacy.charged(noise), self.ledger.clip(self._name)) == (release.noise, spending.clip)

    def spent(self, closed: Round, within: float | None) -> tuple[SpendingRecord, ...]:
        """What was set aside for a round is spent; and how long updates may be next, if the share `within` was no longer."""
        if (spending := self.spending(closed)) is None:
            return ()
        after = replace(spending, state=SpendingState.SPENT)
        if self._privacy.adaptive is None or within is None:
            return (after,)
        return (replace(after, next_clip=self._privacy.adaptive.next(spending.clip, within)),)

    # What clients are told

    def plan(self, kind: Kind, goal: int, evaluate: bool) -> PrivatePlan | None:
        """The noise that clients add, in a round of `goal` results; None: it is not they who do."""
        if not self._privacy.on_devices:
            return None
        return private_plan(self._run, kind, goal, self.ledger.clip(self._name), self._ranges(kind, evaluate))

    def secure(self, plan: SecurePlan, kind: Kind, private: PrivatePlan) -> SecurePlan:
        """How noised vectors are summed: in the finest steps that leave room for a sum of them, and for the noise."""
        told = told_of(kind, private, self._size, masked=True)
        scale = scale_for(told, plan.most_clients, private.clients, plan.ring_bits)
        least = max(plan.least_clients, least_clients(self._run, kind))
        steps = replace(plan, clip=scale.clip, fraction_bits=scale.fraction_bits)
        return replace(steps, least_clients=least, weight_cap=1, max_norm=0.0)

    # What results are added to

    def aggregate(self, kind: Kind, spending: SpendingRecord, plan: Plan) -> Noised | None:
        """An empty aggregate for a round of this kind, for which that was set aside."""
        release = spending.release
        if plan.private is not None:
            told = told_by(plan, self._size)
            if self._privacy.mode == DISTRIBUTED:
                assert plan.secure is not None, "its noise is in a secure sum"
                secure = plan.secure
                scale = FixedPoint(secure.clip, secure.fraction_bits, secure.ring_bits, secure.most_clients)
                layout = layout_of(plan, self._size, None, self._metrics)
                return NoisedSum(layout, scale, told, plan, self._metrics, release.expected)
            if kind is Kind.TRAINING:
                return WeightedSum(self._size, 1)
            return NoisedStatistics(self._features, told.deviation) if kind is Kind.STATISTICS else None
        source, shares = self._privacy.source(), self._privacy.shares
        if kind is Kind.STATISTICS:
            return PrivateStatistics(self._features, release.noise, release.expected, source)
        if kind is Kind.EVALUATION:
            return None
        clip_noise = noise_of(shares.clip, release.noise) if shares.clip else None
        terms = Terms(spending.clip, shares.update(release.noise), release.expected, clip_noise)
        return PrivateSum(self._size, terms, source)

    def measured(self, closed: Round) -> tuple[Metric, ...]:
        """What the clients of a closed round have measured, together, with the coordinator's noise."""
        spending, privacy = self.spending(closed), self._privacy
        if spending is None or privacy.metrics is None or closed.kind is Kind.STATISTICS:
            return ()
        accepted = [part for part in closed.parts.values() if part.state is PartState.ACCEPTED]
        if privacy.mode == LOCAL:
            return _means(accepted, privacy.metrics)
        total = spending.release.noise
        noise = total if closed.kind is Kind.EVALUATION else noise_of(privacy.shares.metrics, total)
        return noised_metrics(accepted, privacy.metrics, noise, spending.release.expected, privacy.source())

    def _ranges(self, kind: Kind, evaluate: bool) -> tuple[Range, ...]:
        """Of what is told in a round of this kind beside the update."""
        ranges = self._privacy.metrics or {}
        measured = tuple(ranges[name] for name in self._metrics if name in ranges)
        return self._features if kind is Kind.STATISTICS else measured if evaluate else ()


def private_plan(run: RunSettings, kind: Kind, goal: int, clip: float, ranges: tuple[Range, ...]) -> PrivatePlan:
    """The noise that clients add in a round of `goal` results, who tell numbers in these `ranges` beside an update."""
    assert run.privacy is not None, "only then"
    privacy, clients = run.privacy, 1
    if (secure := run.secure_aggregation) is not None:
        clients = math.ceil(privacy.honest * max(secure.minimum_cohort, least_clients(run, kind)))
    shares = privacy.shares
    clip_share, metrics_share = (shares.clip, shares.metrics) if kind is Kind.TRAINING else (0.0, 0.0)
    return PrivatePlan(privacy.noise_in(kind, goal, run.cohort_size), clients, clip, clip_share, metrics_share, ranges)


def least_clients(run: RunSettings, kind: Kind) -> int:
    """Of how many results a round is made at the least, whose noise must be enough."""
    return 1 if kind is Kind.EVALUATION else run.needed


def returned(spending: SpendingRecord | None, before: Round, after: Round) -> tuple[SpendingRecord, ...]:
    """What comes back from a round that was abandoned; of one that was closed already, what it gives may have been written.

    Where the coordinator is not to be trusted, nothing comes back once it may have seen something: a masked result that arrived, or
    any that was asked for and is not masked, which may still come.
    """
    if spending is None or after.state is not RoundState.ABANDONED:
        return ()
    arrived = before.count(PartState.ACCEPTED) or after.count(PartState.ACCEPTED)
    seen = spending.mode == LOCAL or (spending.mode == DISTRIBUTED and arrived)
    back = before.state is RoundState.OPEN and not seen
    return (replace(spending, state=SpendingState.RETURNED if back else SpendingState.SPENT),)


def _means(parts: Sequence[Part], ranges: Mapping[str, Range]) -> tuple[Metric, ...]:
    """Of what each client has told with noise of its own: the means, which are within the range again."""
    means = weighted_mean(replace(metric, examples=1) for part in parts for metric in part.held_out)
    return tuple(replace(mean, value=unscaled(scaled(mean.value, ranges[mean.name]), ranges[mean.name])) for mean in means)
