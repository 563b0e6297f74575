"""Numbers as integers of a ring, and what is refused because its sum could be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from choral.errors import ConfigError
from choral.secagg.fixed_point import FixedPoint, fixed_point
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(("terms", "bits"), [(2, 29), (64, 24), (100, 24), (127, 24), (128, 23), (1000, 21), (10_000, 17)])
def test_the_steps_are_as_fine_as_the_ring_allows(terms: int, bits: int) -> None:
    assert fixed_point(terms, 1.0) == FixedPoint(1.0, bits, 32, terms)


@given(st.integers(1, 10_000), st.floats(1e-6, 1e6), st.sampled_from([32, 64]))
def test_the_largest_sum_and_the_smallest_are_right(terms: int, clip: float, ring_bits: int) -> None:
    try:
        point = fixed_point(terms, clip, ring_bits)
    except ConfigError:
        assert ring_bits == 32
        assert terms >= 2**21  # which needs more bits than there are, whatever the clip
        return
    each = point.encode(np.array([clip, -clip]))
    total = (each.astype(object) * terms % 2**ring_bits).astype(point.dtype)
    assert np.abs(point.decode(total) - [terms * clip, -terms * clip]).max() <= point.error + 2 * np.spacing(terms * clip)


@pytest.mark.parametrize("clip", [1e-8, 1e-3, 0.7, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("ring_bits", [32, 64])
def test_small_and_large_clips_have_as_many_steps(clip: float, ring_bits: int) -> None:
    point = fixed_point(10, clip, ring_bits)
    assert 2.0**23 <= clip * 2.0**point.fraction_bits < 2.0**53
    assert point.decode(point.encode(np.array([clip / 3]))) == pytest.approx([clip / 3], rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.0001, 1000.0, math.nan])
def test_a_weight_is_above_zero_and_one_at_most(weight: float) -> None:
    with pytest.raises(ValueError, match=r"a weight of .*: it must be above 0, and 1 at most"):
        fixed_point(10, 1.0).encode(np.array([0.5]), weight)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.integers(1, 50), st.floats(0.01, 1))
def test_a_sum_is_off_by_half_a_step_for_each_term_at_most(values: list[float], terms: int, weight: float) -> None:
    point = fixed_point(terms, 1.0)
    vector = np.array(values, dtype=np.float32)
    total = np.zeros(len(vector), dtype=point.dtype)
    for _ in range(terms):
        total += point.encode(vector, weight)
    exact = np.array([math.fsum([weight * float(value)] * terms) for value in vector])
    assert np.abs(point.decode(total) - exact).max() <= point.error * (1 + 1e-9)


@pytest.mark.parametrize("value", [1.0001, -1.0001, math.inf, -math.inf, math.nan])
def test_what_cannot_be_told_is_refused_and_not_cut_off(value: float) -> None:
    point = fixed_point(10, 1.0)
    with pytest.raises(ValueError, match="beyond the clip of 1"):
        point.encode(np.array([0.5, value], dtype=np.float32))


def test_nothing_is_encoded_as_nothing() -> None:
    point = fixed_point(10, 1.0)
    assert point.decode(point.encode(np.zeros(0, dtype=np.float32))).size == 0


@pytest.mark.parametrize(
    ("terms", "clip", "ring_bits", "fraction_bits", "told"),
    [
        (10, 1.0, 16, None, "a ring of 16 bits: it must be one of 32, 64"),
        (0, 1.0, 32, None, "a sum of 0 clients: it must have one at the least"),
        (10, 0.0, 32, None, "a clip of 0: it must be 9e-10 to 1e"),
        (10, -1.0, 32, None, "a clip of -1: it must be 9e-10 to 1e"),
        (10, 1e-310, 32, None, "a clip of 1e-310: it must be 9e-10 to 1e"),
        (10, math.nan, 32, None, "a clip of nan: it must be 9e-10 to 1e"),
        (10, math.inf, 32, None, "a clip of inf: it must be 9e-10 to 1e"),
        (2**24, 1.0, 32, None, r"16777216 · 1 · 2\^bits must stay below 2\^31; at least 8 are needed"),
        (100, 1.0, 32, 25, r"must be 8 to 24, since 100 · 1 · 2\^bits must stay below 2\^31"),
        (100, 1.0, 32, 7, "must be 8 to 24"),
        (2, 1.0, 64, 62, "must be 8 to 52"),
    ],
)
def test_what_could_overflow_is_refused_with_the_arithmetic(
    terms: int, clip: float, ring_bits: int, fraction_bits: int | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        fixed_point(terms, clip, ring_bits, fraction_bits)
