"""What a client adds to a secure sum: bounds are kept on the device, and what they change is told as a count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from choral.errors import Declined
from choral.metrics import Metric
from choral.plan import SecurePlan
from choral.secagg import wide
from choral.secagg.summand import Layout, Summand, feature_sums
from choral_client.contribution import check_terms, of_features, of_measurements, of_nothing, of_update, scale_of
from structlog.testing import capture_logs

SECURE = SecurePlan("run/1", 3, 10, 0.0, 8.0, 24, 32, 16)
NAMES = ("clients", "clipped", "weight", "loss examples", "loss total")


def update(
    values: list[float] | np.ndarray, secure: SecurePlan = SECURE, examples: int = 16, *held_out: Metric, blocks: int = 2
) -> Summand:
    vector = np.asarray(values, np.float32)

    def cut() -> Iterator[np.ndarray]:
        yield from np.array_split(vector, blocks)

    return of_update(cut, Layout(vector.size, secure.ring_bits, NAMES), secure, examples, held_out)


def entries(summand: Summand, secure: SecurePlan = SECURE) -> list[float]:
    """What the entries stand for: weight · value."""
    values: list[float] = scale_of(secure).decode(summand.vector).tolist()
    return values


def told(summand: Summand, names: tuple[str, ...] = NAMES) -> dict[str, float]:
    return dict(zip(names, wide.decode(summand.numbers), strict=True))


def test_an_update_is_weighted_by_its_share_of_the_cap() -> None:
    one = update([1.0, -2.0, 0.5], SECURE, 4)
    assert entries(one) == [0.25, -0.5, 0.125]
    assert told(one) == {"clients": 1, "clipped": 0, "weight": 4, "loss examples": 0, "loss total": 0}


@pytest.mark.parametrize(("examples", "weight"), [(1, 1), (15, 15), (16, 16), (17, 16), (10**9, 16)])
def test_no_client_weighs_more_than_the_cap(examples: int, weight: int) -> None:
    one = update([8.0], SECURE, examples, Metric("loss", 0.5, examples))
    assert entries(one) == [8.0 * weight / 16]
    assert told(one) == {"clients": 1, "clipped": 0, "weight": weight, "loss examples": weight, "loss total": weight / 2}


@pytest.mark.parametrize("ring_bits", [32, 64])
def test_an_entry_beyond_the_clip_is_cut_off_told_as_a_count_and_logged(ring_bits: int) -> None:
    secure = replace(SECURE, ring_bits=ring_bits)
    with capture_logs() as logs:
        one = update([9.0, -100.0, 8.0, 1.0], secure)
    assert entries(one, secure) == [8.0, -8.0, 8.0, 1.0]
    assert told(one)["clipped"] == 1  # how many clients, not how many entries: those are its own
    assert [(log["event"], log["entries"], log["of"], log["clip"]) for log in logs] == [("update clipped", 2, 4, 8.0)]


def test_nothing_is_told_of_what_is_within_the_bounds() -> None:
    with capture_logs() as logs:
        one = update([8.0, -8.0], replace(SECURE, max_norm=11.4))
    assert told(one)["clipped"] == 0
    assert logs == []


@pytest.mark.parametrize("clip", [0.1, 0.3, 0.7, 1e-3])
def test_a_clip_that_no_float32_is_equal_to_is_not_exceeded(clip: float) -> None:
    """float32(0.1) is 0.1000000015: entries cut to that would be beyond the clip, and the sum could overflow."""
    secure = replace(SECURE, clip=clip)
    beyond = np.nextafter(np.float32(clip), np.float32(1))
    one = update(np.array([beyond, -beyond, 1.0]), secure)
    assert max(map(abs, entries(one, secure))) <= clip + scale_of(secure).error
    assert told(one)["clipped"] == 1


def test_a_long_update_is_shortened_to_the_largest_norm() -> None:
    secure = replace(SECURE, max_norm=2.5)
    with capture_logs() as logs:
        one = update([3.0, 0.0, 4.0, 0.0], secure, blocks=3)
    assert entries(one, secure) == pytest.approx([1.5, 0.0, 2.0, 0.0], abs=1e-6)
    assert told(one)["clipped"] == 1
    assert [(log["event"], log["norm"], log["max_norm"]) for log in logs] == [("update shortened", 5.0, 2.5)]


def test_an_update_is_shortened_before_its_entries_are_cut_off() -> None:
    one = update([30.0, 40.0], replace(SECURE, max_norm=5.0))
    assert entries(one) == pytest.approx([3.0, 4.0], abs=1e-5)


def test_no_norm_is_no_bound() -> None:
    assert entries(update([8.0] * 100)) == [8.0] * 100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_an_undefined_update_is_declined(bad: float, max_norm: float) -> None:
    with pytest.raises(Declined, match="the update holds an infinite or undefined number: lower the learning rate"):
        update([1.0, 2.0, 3.0, bad], replace(SECURE, max_norm=max_norm))


@pytest.mark.parametrize(
    "change", [{"fraction_bits": 25}, {"ring_bits": 16}, {"clip": 0.0}, {"clip": float("nan")}, {"most_clients": 0}]
)
def test_a_sum_that_cannot_be_right_is_declined(change: dict[str, float]) -> None:
    with pytest.raises(Declined, match="the coordinator asks for a sum that cannot be right: "):
        scale_of(replace(SECURE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e36, -1e31])
def test_a_metric_that_is_undefined_or_too_large_is_left_out_and_nobody_is_told(value: float) -> None:
    one = update([1.0], SECURE, 4, Metric("loss", value, 3))
    assert (told(one)["loss examples"], told(one)["loss total"]) == (0, 0)


def test_an_update_that_is_no_number_adds_nothing() -> None:
    one = of_nothing(Layout(3, 32, NAMES), SECURE, (Metric("loss", 0.5, 2),))
    assert entries(one) == [0, 0, 0]
    assert told(one) == {"clients": 1, "clipped": 1, "weight": 1, "loss examples": 2, "loss total": 1}


@pytest.mark.parametrize("change", [{"weight_cap": 0}, {"max_norm": -1.0}, {"max_norm": float("nan")}])
def test_terms_that_make_no_sum_are_declined_before_any_work(change: dict[str, float]) -> None:
    check_terms(SECURE)
    with pytest.raises(Declined, match="the coordinator asks for a sum that cannot be right"):
        check_terms(replace(SECURE, **change))  # type: ignore[arg-type]


def test_measurements_are_sent_alone() -> None:
    names = ("clients", "loss examples", "loss total")
    one = of_measurements(Layout(0, 32, names), SECURE, (Metric("loss", 2.5, 40),))
    assert one.vector.size == 0
    assert told(one, names) == {"clients": 1, "loss examples": 16, "loss total": 40.0}


def layout_of(features: int) -> Layout:
    return Layout(0, 32, ("clients", "count", *(name for number in range(features) for name in feature_sums(number))))


def test_features_are_sent_as_their_sums_and_those_of_their_squares() -> None:
    layout = layout_of(2)
    one = of_features(layout, np.array([[1, 2], [3, -4], [0, 0.5]], np.float32))
    assert wide.decode(one.numbers) == [1, 3, 4.0, 10.0, -1.5, 20.25]
    assert one.vector.size == 0


def test_the_sums_of_float32_features_are_exact() -> None:
    """A float64 of the squares' sum would be off by more than the variance is, of a feature like this."""
    x = (np.random.default_rng(3).normal(1e6, 1.0, (1000, 1))).astype(np.float32)
    whole = [int(value * 2**20) for value in x[:, 0].astype(float).tolist()]
    assert [value / 2**20 for value in whole] == x[:, 0].tolist()
    steps = wide.integers(of_features(layout_of(1), x).numbers)
    assert steps[2] == sum(whole) << (wide.FRACTION_BITS - 20)
    assert steps[3] == sum(value * value for value in whole) << (wide.FRACTION_BITS - 40)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_features_that_are_undefined_or_too_large_are_declined(bad: float) -> None:
    with pytest.raises(Declined, match="scale the features or the metrics of the task"):
        of_features(layout_of(1), np.array([[1.0], [bad]]))


def test_two_infinities_are_declined_as_well() -> None:
    with pytest.raises(Declined, match="scale the features"):
        of_features(layout_of(1), np.array([[np.inf], [-np.inf]]))
