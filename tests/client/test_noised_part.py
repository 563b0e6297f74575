"""What a client tells under noise of its own: how far it can move what is told, and how much noise is on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from choral.errors import Declined
from choral.plan import Kind, Plan, PrivatePlan, SecurePlan, Training
from choral.privacy.noise import Integers
from choral.privacy.told import scale_for, scaled_metrics, told_of
from choral.secagg.summand import layout_of
from choral.statistics import Moments
from choral_client.noised_part import NOTHING, NoisedPart, hidden_moments, part_of, summand
from choral_server.noised_sum import NoisedSum
from numpy.typing import NDArray
from scipy import stats

SIZE, CLIP, NOISE = 300, 0.7, 1.3
RANGES = ((0.0, 10.0), (-1.0, 1.0))
METRICS = ("loss", "mae")
SURELY = 1e-9
LOCAL = PrivatePlan(NOISE, 1, CLIP)
RNG = np.random.default_rng(5)


def plan(private: PrivatePlan, secure: SecurePlan | None = None, kind: Kind = Kind.TRAINING) -> Plan:
    evaluate = kind is not Kind.STATISTICS and bool(private.ranges)
    return Plan(kind, "t", "1", Training(), 0, evaluate, 4, secure, True, private)


def secured(private: PrivatePlan, least: int = 3, most: int = 4, kind: Kind = Kind.TRAINING, size: int = SIZE) -> Plan:
    """As the coordinator makes it."""
    scale = scale_for(told_of(kind, private, size, masked=True), most, private.clients, 32)
    return plan(private, SecurePlan("run", least, most, 0.0, scale.clip, scale.fraction_bits, 32, 1), kind)


def silent(count: int) -> Integers:
    return np.zeros(count, np.int64)


def without_noise(made: NoisedPart) -> NoisedPart:
    return replace(made, noise=silent)


def blocks(update: NDArray[np.float32]) -> Any:
    def each() -> Iterator[NDArray[np.float32]]:
        yield from (update[start : start + 128] for start in range(0, update.size, 128))

    return each


def whole(made: NoisedPart, update: NDArray[np.float32], numbers: NDArray[np.float64]) -> Integers:
    told, shortened = made.update(blocks(update))
    return np.concatenate([*told, made.beside(numbers, shortened=shortened)])


HOSTILE = [
    np.zeros(SIZE, np.float32),
    np.full(SIZE, 3e38, np.float32),
    np.full(SIZE, -1e-30, np.float32),
    *(RNG.normal(scale=scale, size=SIZE).astype(np.float32) for scale in (1e-6, 0.03, 0.05, 4.0, 1e20)),
    *(np.eye(1, SIZE, 3, dtype=np.float32)[0] * np.float32(length) for length in (CLIP, 10.0, CLIP * (1 - 1e-7))),
]
FULL = PrivatePlan(NOISE, 2, CLIP, 0.02, 0.1, RANGES)


@pytest.mark.parametrize("terms", [LOCAL, replace(LOCAL, clip_share=0.1), replace(FULL, clients=1), replace(FULL, clip=1e-5)])
@pytest.mark.parametrize("update", HOSTILE)
def test_whatever_the_update_the_vector_is_no_longer_than_its_reach(terms: PrivatePlan, update: NDArray[np.float32]) -> None:
    """In whole steps, exactly: so the noise over what one can move is what is counted."""
    for masked in (True, False) if not terms.clip_share else (True,):
        asked = secured(terms) if masked else plan(replace(terms, clients=1))
        made = part_of(asked, SIZE, len(METRICS))
        numbers = np.array([math.inf, -5.0]) if terms.ranges else NOTHING
        vector = whole(without_noise(made), update, numbers)
        assert vector.size == made.told.size
        square = sum(int(entry) ** 2 for entry in vector)
        assert square <= (made.told.reach * made.steps) ** 2
        moves = 1 if masked else 2  # one client's, or another in its place
        assert made.told.deviation / (moves * made.told.reach) == pytest.approx(NOISE)


def test_shares_of_the_privacy_make_up_the_whole() -> None:
    told = told_of(Kind.TRAINING, FULL, SIZE, masked=True)
    parts = told.deviation / CLIP, told.deviation / told.clip_unit, told.deviation / (told.unit * math.sqrt(2))
    assert sum(part**-2 for part in parts) == pytest.approx(NOISE**-2)
    assert [part**-2 * NOISE**2 for part in parts] == pytest.approx([0.88, 0.02, 0.1])


def test_what_is_sent_alone_has_all_the_noise() -> None:
    size = 100_000
    made = part_of(plan(LOCAL), size, 0)
    told = np.concatenate(list(made.update_as_told(blocks(np.zeros(size, np.float32)))))
    assert told.dtype == np.float32
    deviation = NOISE * 2 * CLIP
    assert stats.kstest(told / deviation, "norm").pvalue > SURELY
    assert SURELY < stats.chi2.cdf(np.square(told / deviation, dtype=np.float64).sum(), size) < 1 - SURELY


class NoMask:
    def add_to(self, vector: Any) -> None:
        """There is none."""

    def add_to_wide(self, numbers: Any) -> None:
        """There is none."""


def summed(asked: Plan, updates: list[NDArray[np.float32]], numbers: NDArray[np.float64], expected: int, tmp: Any) -> NoisedSum:
    """Through the files that clients send, without masks."""
    secure, terms = asked.secure, asked.private
    assert secure is not None
    assert terms is not None
    size = updates[0].size
    told, layout = told_of(asked.kind, terms, size, masked=True), layout_of(asked, size, None, METRICS)
    made = NoisedSum(layout, scale_for(told, secure.most_clients, terms.clients, 32), told, asked, METRICS, expected)
    for number, update in enumerate(updates):
        path = tmp / str(number)
        part = part_of(asked, size, len(METRICS))
        path.write_bytes(b"".join(summand(part, layout, blocks(update), numbers).pieces()))
        assert path.stat().st_size == layout.payload_bytes
        made._sum.add_file(path)
        made.contained |= {str(number)}
    made.unmask(NoMask())  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("survivors", [3, 4, 6])
def test_as_few_as_may_survive_have_enough_noise(survivors: int, tmp_path: Any) -> None:
    """And more have more: each adds its part, whoever drops out (χ² of the whole update)."""
    size, least = 50_000, 3
    asked = secured(PrivatePlan(NOISE, least, CLIP), least, 6, size=size)
    made = summed(asked, [np.zeros(size, np.float32)] * survivors, NOTHING, 6, tmp_path)
    deviation = NOISE * CLIP * math.sqrt(survivors / least)
    noise = made.mean() * 6 / deviation
    assert SURELY < stats.chi2.cdf(np.square(noise).sum(), size) < 1 - SURELY
    assert deviation >= NOISE * CLIP


def test_what_comes_out_is_the_mean_with_everything_beside_it(tmp_path: Any) -> None:
    """With so little noise, over so many clients, that one can see it."""
    clients = 6
    terms = PrivatePlan(0.05, clients, 1.0, 0.3, 0.3, RANGES)
    updates = [RNG.normal(scale=scale, size=SIZE).astype(np.float32) for scale in (0.001, 0.01, 0.02, 0.5, 1.0, 9.0)]
    numbers = scaled_metrics({"loss": 2.5}, METRICS, RANGES)
    made = summed(secured(terms, clients, clients), updates, numbers, clients, tmp_path)
    shortened = [update * min(1.0, 1 / float(np.linalg.norm(update.astype(np.float64)))) for update in updates]
    assert made.mean() == pytest.approx(np.mean(shortened, axis=0), abs=0.2)
    assert np.abs(made.mean() - np.mean(shortened, axis=0)).std() < 0.03
    loss, mae = made.held_out()
    assert (loss.name, mae.name) == METRICS
    assert loss.value == pytest.approx(2.5, abs=1.5)
    assert mae.value == pytest.approx(0.0, abs=0.3)  # what was not measured is the middle of its range
    assert made.within == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_no_number_is_none(bad: float) -> None:
    update = np.full(SIZE, 1000.0, np.float32)
    update[7] = bad
    made = without_noise(part_of(plan(LOCAL), SIZE, 0))
    assert not np.concatenate([*made.update(blocks(update))[0]]).any()


BAD: list[tuple[PrivatePlan, dict[str, Any], str]] = [
    (replace(LOCAL, clients=2), {}, "divided among 2 clients is enough only in a sum"),
    (replace(LOCAL, noise=1e300), {}, "noise that cannot be right"),
    (replace(LOCAL, ranges=RANGES), {}, "noise that cannot be right"),
    (replace(LOCAL, metrics_share=0.1), {}, "noise that cannot be right"),
    (replace(LOCAL, clip_share=0.1), {}, "how many updates were shortened is told in a sum only"),
    (replace(FULL, clients=1, ranges=RANGES[:1]), {}, "1 ranges for 2 numbers"),
    (replace(LOCAL, clients=3), {"least_clients": 2}, "divided among 3 clients, and as few as 2 may be summed"),
    (replace(LOCAL, clients=2), {"fraction_bits": 31}, "noise that cannot be right"),
    (replace(LOCAL, clients=2), {"fraction_bits": 1}, "noise that cannot be right"),
    (replace(LOCAL, noise=1e9, clients=2), {}, "noise that cannot be right"),
]


@pytest.mark.parametrize(("terms", "changes", "reason"), BAD)
def test_a_coordinator_that_asks_for_nonsense_gets_nothing(terms: PrivatePlan, changes: dict[str, Any], reason: str) -> None:
    secure = secured(replace(LOCAL, clients=2)).secure
    assert secure is not None
    masked = bool(changes) or terms.noise == 1e9
    with pytest.raises(Declined, match=reason):
        part_of(plan(terms, replace(secure, **changes) if masked else None), SIZE, len(METRICS))


def test_statistics_in_which_no_example_can_be_found() -> None:
    """One example more, whatever it holds, moves the sums by √2d at the most; and with enough examples the noise is not seen."""
    features = np.column_stack([RNG.uniform(0, 10, 20_000), RNG.normal(0, 0.3, 20_000)])
    found, true = hidden_moments(features, RANGES, 1.0), Moments.of(np.clip(features, [0, -1], [10, 1]))
    assert found.mean == pytest.approx(true.mean, abs=0.02)
    assert found.deviation == pytest.approx(true.deviation, rel=0.05)
    noisy = [hidden_moments(np.full((4, 2), [5.0, 0.0]), RANGES, 2.0).mean for _ in range(2)]
    assert not np.array_equal(*noisy)
    with pytest.raises(Declined, match="1 ranges for 2 features"):
        hidden_moments(features, RANGES[:1], 1.0)


def test_every_kind_has_its_vector() -> None:
    for kind, masked in itertools.product((Kind.STATISTICS, Kind.EVALUATION), (True, False)):
        terms = PrivatePlan(NOISE, 1, CLIP, ranges=RANGES)
        made = part_of(secured(terms, kind=kind) if masked else plan(terms, kind=kind), SIZE, 2)
        beside = 4 if kind is Kind.STATISTICS else 2
        assert made.told.size == beside
        assert made.told.deviation / math.sqrt(beside) == pytest.approx(NOISE * (1 if masked else 2))
