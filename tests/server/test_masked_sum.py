"""What comes of masked results: the means, moments and measurements that plain results would have given, or a named error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choral.metrics import Metric, weighted_mean
from choral.plan import Kind, Plan, SecurePlan, Training
from choral.secagg import wide
from choral.secagg.fixed_point import fixed_point
from choral.secagg.masks import KEY_BYTES, Mask
from choral.secagg.summand import Layout, Summand, layout_of
from choral.statistics import Moments
from choral_client.contribution import of_features, of_measurements, of_update
from choral_server.masked_sum import BadSum, MaskedSum
from choral_server.rounds import Part
from hypothesis import given
from hypothesis import strategies as st

CAP, METRICS = 16, ("loss", "mae")
WHY = "some client has sent something else than it should, and nobody can see which"
Change = Callable[[Summand], None]


def secure(ring_bits: int = 32, clip: float = 8.0, max_norm: float = 0.0, clients: int = 10) -> SecurePlan:
    bits = fixed_point(clients, clip, ring_bits).fraction_bits
    return SecurePlan("run/1", 2, clients, 0.0, clip, bits, ring_bits, CAP, max_norm)


class Round:
    """A sum of what clients send, each under a mask of its own."""

    def __init__(self, folder: Path, kind: Kind = Kind.TRAINING, plan: SecurePlan | None = None, size: int = 3) -> None:
        self.plan = plan or secure()
        whole = Plan(kind, "small", "1", Training(), 0, kind is not Kind.STATISTICS, 3, self.plan)
        self.layout: Layout = layout_of(whole, size, size, METRICS)
        self.scale = fixed_point(self.plan.most_clients, self.plan.clip, self.plan.ring_bits, self.plan.fraction_bits)
        self.sum = MaskedSum(self.layout, self.scale, self.plan, METRICS)
        self._path = folder / "one"
        self._keys: list[bytes] = []

    def sends(self, summand: Summand) -> None:
        """A masked result comes in."""
        number = len(self._keys)
        self._keys.append(number.to_bytes(KEY_BYTES, "big"))
        summand.add_mask(Mask([self._keys[-1]], ()))
        self._path.write_bytes(b"".join(summand.pieces()))
        self.sum.fold(Part(f"run/3/{number}", str(number)), self._path)

    def update(self, values: Any, examples: int = 10, *held_out: Metric, change: Change = lambda summand: None) -> None:
        """A client's update; `change` makes it another than it should be."""
        vector = np.asarray(values, np.float32)
        summand = of_update(lambda: iter([vector]), self.layout, self.plan, examples, held_out)
        change(summand)
        self.sends(summand)

    def features(self, x: np.ndarray) -> None:
        self.sends(of_features(self.layout, x))

    def measured(self, *held_out: Metric) -> None:
        self.sends(of_measurements(self.layout, self.plan, held_out))

    def unmasked(self, also: Sequence[bytes] = ()) -> MaskedSum:
        """The sum, once the masks are off; `also` are masks that nobody has added."""
        self.sum.unmask(Mask((), [*self._keys, *also]))
        return self.sum

    def adding(self, name: str, number: float) -> Change:
        """What adds to one of the numbers."""
        more = self.layout.numbers({name: number})
        return lambda summand: wide.add(summand.numbers, more)


@pytest.fixture
def round(tmp_path: Path) -> Round:
    return Round(tmp_path)


# Means


@pytest.mark.parametrize("ring_bits", [32, 64])
def test_the_mean_is_weighted_by_examples_up_to_the_cap(tmp_path: Path, ring_bits: int) -> None:
    one = Round(tmp_path, plan=secure(ring_bits))
    rng = np.random.default_rng(1)
    updates, examples = rng.normal(0, 1, (7, 3)).astype(np.float32), [1, 2, 3, 15, 16, 17, 10_000]
    for values, count in zip(updates, examples, strict=True):
        one.update(values, count)
    total, weights = one.unmasked(), np.minimum(examples, CAP)
    expected = np.average(updates.astype(float), axis=0, weights=weights)
    bound = 7 * 2.0 ** -(one.plan.fraction_bits + 1) * CAP / weights.sum()
    assert np.abs(total.mean() - expected).max() <= bound * (1 + 1e-9)
    assert total.mean(1, 3).tolist() == total.mean()[1:3].tolist()
    assert total.mean(2).size == 1
    assert total.contained == {f"run/3/{number}" for number in range(7)}


@given(st.lists(st.tuples(st.floats(-8, 8, width=32), st.integers(1, 40)), min_size=1, max_size=10), st.sampled_from([32, 64]))
def test_the_error_of_the_mean_is_bounded(
    tmp_path_factory: pytest.TempPathFactory, sent: list[tuple[float, int]], bits: int
) -> None:
    one = Round(tmp_path_factory.mktemp("round"), plan=secure(bits), size=1)
    for value, examples in sent:
        one.update([value], examples)
    weights = [min(examples, CAP) for _, examples in sent]
    expected = sum(value * weight for (value, _), weight in zip(sent, weights, strict=True)) / sum(weights)
    bound = len(sent) * 2.0 ** -(one.plan.fraction_bits + 1) * CAP / sum(weights)
    assert abs(one.unmasked().mean()[0] - expected) <= bound + 1e-14


def test_a_mean_is_told_with_how_many_were_clipped(round: Round) -> None:
    round.update([100.0, 0.0, 0.0])
    round.update([1.0, 2.0, 3.0])
    total = round.unmasked()
    assert total.clipped == 1
    assert total.mean() == pytest.approx([4.5, 1.0, 1.5], abs=1e-6)


def test_who_measures_nothing_counts_in_the_update_alone(round: Round) -> None:
    round.update([1.0, 1.0, 1.0], 10, Metric("loss", 2.0, 4))
    round.update([2.0, 2.0, 2.0], 10)
    total = round.unmasked()
    assert total.held_out() == (Metric("loss", 2.0, 4),)
    assert total.mean() == pytest.approx([1.5, 1.5, 1.5], abs=1e-6)


# Measurements


def test_what_was_measured_is_the_weighted_mean(tmp_path: Path) -> None:
    one = Round(tmp_path, Kind.EVALUATION)
    measured = [
        (Metric("loss", 0.25, 3), Metric("mae", 1.5, 3)),
        (Metric("loss", 7.125, 15), Metric("mae", -2.0, 15)),
        (Metric("loss", 1e-9, 1000), Metric("mae", 1e9, 1000)),
    ]
    for each in measured:
        one.measured(*each)
    expected = weighted_mean(replace(metric, examples=min(metric.examples, CAP)) for each in measured for metric in each)
    found = one.unmasked().held_out()
    assert [(metric.name, metric.examples) for metric in found] == [(metric.name, metric.examples) for metric in expected]
    assert [metric.value for metric in found] == pytest.approx([metric.value for metric in expected], rel=1e-15)
    assert one.sum.clipped == 0


def test_what_nobody_measured_is_not_told(round: Round) -> None:
    round.update([1.0, 1.0, 1.0])
    round.update([1.0, 1.0, 1.0])
    assert round.unmasked().held_out() == ()


# Moments


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6, -1e6])
def test_moments_are_those_of_the_pooled_data(tmp_path: Path, mean: float) -> None:
    """Also of a feature with a mean of a million times its deviation, of which float64 sums keep four digits of the variance."""
    one, rng = Round(tmp_path, Kind.STATISTICS, size=2), np.random.default_rng(2)
    shards = [rng.normal(mean, 1.0, (rows, 2)).astype(np.float32) for rows in (2000, 1, 37)]
    for x in shards:
        one.features(x)
    found, pooled = one.unmasked().moments(), Moments.of(np.concatenate(shards).astype(float))
    assert found.count == pooled.count == 2038
    assert found.mean == pytest.approx(pooled.mean, rel=1e-15, abs=1e-15)
    assert found.m2 == pytest.approx(pooled.m2, rel=1e-9)
    assert found.deviation == pytest.approx(pooled.deviation, rel=1e-9)
    assert one.sum.held_out() == ()


def test_a_constant_feature_has_no_variance(tmp_path: Path) -> None:
    one = Round(tmp_path, Kind.STATISTICS, size=2)
    for rows in (3, 1000):
        one.features(np.full((rows, 2), [0.1, 3e8], np.float32))
    moments = one.unmasked().moments()
    assert moments.m2.tolist() == [0.0, 0.0]
    assert moments.deviation.tolist() == [1.0, 1.0]


# Sums that cannot be


def test_with_masks_left_on_it_there_is_no_sum(round: Round) -> None:
    round.update([1.0, 2.0, 3.0])
    round.update([1.0, 2.0, 3.0])
    with pytest.raises(BadSum, match=f"^the sum of 'clients' is .* where 2 can be: {WHY}$"):
        round.unmasked([bytes([9]) * KEY_BYTES])


@pytest.mark.parametrize(
    ("name", "number", "told"),
    [
        ("clients", 1, "the sum of 'clients' is 3 where 2 can be"),
        ("clients", -1, "the sum of 'clients' is 1 where 2 can be"),
        ("clients", 0.5, "the sum of 'clients' is 2.5 where 2 can be"),
        ("weight", 13, "the sum of 'weight' is 33 where 2 to 32 can be"),
        ("weight", -19, "the sum of 'weight' is 1 where 2 to 32 can be"),
        ("weight", 0.25, "the sum of 'weight' is 20.25 where 2 to 32 can be"),
        ("clipped", 3, "the sum of 'clipped' is 3 where 0 to 2 can be"),
        ("clipped", -1, "the sum of 'clipped' is -1 where 0 to 2 can be"),
        ("loss examples", 33, "the sum of 'loss examples' is 33 where 0 to 32 can be"),
        ("mae examples", -1, "the sum of 'mae examples' is -1 where 0 to 32 can be"),
        ("mae examples", 0.5, "the sum of 'mae examples' is 0.5 where 0 to 32 can be"),
        ("loss total", 1.9e35, "the sum of 'loss total' is 1.9e+35, which 2 clients cannot have sent"),
        ("loss total", -1.9e35, "the sum of 'loss total' is -1.9e+35, which 2 clients cannot have sent"),
    ],
)
def test_a_number_that_cannot_be_is_told(round: Round, name: str, number: float, told: str) -> None:
    def change(summand: Summand) -> None:
        for _ in range(4):  # no number that is told may be so large at once
            round.adding(name, number / 4)(summand)

    round.update([1.0, 2.0, 3.0])
    round.update([1.0, 2.0, 3.0], change=change)
    with pytest.raises(BadSum) as bad:
        round.unmasked()
    assert str(bad.value) == f"{told}: {WHY}"


@pytest.mark.parametrize(
    ("name", "number", "told"),
    [
        ("count", -4, "the sum of 'count' is 1 where 2 to 2.19902e+12 can be"),
        ("count", 0.5, "the sum of 'count' is 5.5 where 2 to 2.19902e+12 can be"),
        ("feature 1", 1e35, "the sum of 'feature 1' is 2e+35, which 2 clients cannot have sent"),
        ("feature 0 squared", 1e35, "the sum of 'feature 0 squared' is 2e+35, which 2 clients cannot have sent"),
    ],
)
def test_so_it_is_of_statistics(tmp_path: Path, name: str, number: float, told: str) -> None:
    one = Round(tmp_path, Kind.STATISTICS, size=2)
    one.features(np.zeros((2, 2), np.float32))
    bad = of_features(one.layout, np.zeros((3, 2), np.float32))
    for _ in range(4):
        one.adding(name, number / 2 if number > 1 else number / 4)(bad)
    one.sends(bad)
    with pytest.raises(BadSum) as told_:
        one.unmasked()
    assert str(told_.value) == f"{told}: {WHY}"


@pytest.mark.parametrize("ring_bits", [32, 64])
def test_an_entry_that_cannot_be_is_told(tmp_path: Path, ring_bits: int) -> None:
    one = Round(tmp_path, plan=secure(ring_bits, clip=1.0))
    step = 2.0**-one.plan.fraction_bits

    def beyond(summand: Summand) -> None:
        summand.vector[1] += round_up(2.5 / step)

    one.update([1.0, 1.0, -1.0], CAP)
    one.update([1.0, 1.0, -1.0], CAP, change=beyond)
    with pytest.raises(BadSum) as bad:
        one.unmasked()
    assert str(bad.value) == f"an entry of the sum of updates is 4.5 where at most 2 can be: {WHY}"


def round_up(value: float) -> int:
    return int(np.ceil(value))


def test_the_largest_that_can_be_is_not_refused(tmp_path: Path) -> None:
    one = Round(tmp_path, plan=secure(clip=1.0))
    for _ in range(10):
        one.update([1.0, -1.0, 5.0], CAP)
    assert one.unmasked().mean() == pytest.approx([1.0, -1.0, 1.0], abs=1e-6)


def test_a_sum_that_is_too_long_is_told(tmp_path: Path) -> None:
    one = Round(tmp_path, plan=secure(max_norm=1.0))

    def longer(summand: Summand) -> None:
        summand.vector[0] += round_up(2.0 * 2.0**one.plan.fraction_bits)

    one.update([1.0, 0.0, 0.0], CAP)
    one.update([0.0, 0.0, 1.0], CAP, change=longer)
    with pytest.raises(BadSum) as bad:
        one.unmasked()
    told = "the sum of updates has a norm of 3.16228 where at most 2.002 can be (run.max_update_norm)"
    assert str(bad.value) == f"{told}: {WHY}"


@pytest.mark.parametrize("examples", [1, CAP])
def test_the_longest_that_can_be_is_not_refused(tmp_path: Path, examples: int) -> None:
    one = Round(tmp_path, plan=secure(max_norm=1.0), size=1000)
    for seed in range(10):
        one.update(np.abs(np.random.default_rng(seed).normal(0, 1, 1000)) + 2, examples)
    assert np.linalg.norm(one.unmasked().mean()) <= 1.001
    assert one.sum.clipped == 10
