"""Wide numbers: what they stand for, alone and in sums, and that masks on them cancel."""

from __future__ import annotations

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from choral.secagg import wide
from choral.secagg.masks import KEY_BYTES, Mask
from hypothesis import given
from hypothesis import strategies as st

RING, STEP = 1 << wide.BITS, 1 << wide.FRACTION_BITS
ANY = st.integers(0, RING - 1)
EDGES = st.sampled_from([0, 1, RING - 1, RING // 2, (1 << 64) - 1, 1 << 64, (1 << 128) - 1, (1 << 192) - 1, RING - (1 << 64)])
NUMBERS = st.floats(-wide.LARGEST, wide.LARGEST)


def words(*numbers: int) -> wide.Wide:
    """Numbers of the ring, as they are."""
    content = b"".join((number % RING).to_bytes(wide.BYTES, "little") for number in numbers)
    return np.frombuffer(content, "<u8").astype(np.uint64).reshape(-1, 4)


def unsigned(numbers: wide.Wide) -> list[int]:
    return [number % RING for number in wide.integers(numbers)]


@given(st.lists(st.tuples(ANY | EDGES, ANY | EDGES), max_size=5))
def test_sums_and_differences_are_those_of_integers_modulo_the_ring(pairs: list[tuple[int, int]]) -> None:
    a, b = [words(*(pair[place] for pair in pairs)) for place in (0, 1)]
    total, rest = a.copy(), a.copy()
    wide.add(total, b)
    wide.subtract(rest, b)
    assert unsigned(total) == [(one + other) % RING for one, other in pairs]
    assert unsigned(rest) == [(one - other) % RING for one, other in pairs]
    wide.subtract(total, b)
    assert np.array_equal(total, a)


def test_a_carry_and_a_borrow_go_through_all_words() -> None:
    total = words(RING - 1, (1 << 192) - 1)
    wide.add(total, words(1, 1))
    assert unsigned(total) == [0, 1 << 192]
    wide.subtract(total, words(1, 1))
    assert unsigned(total) == [RING - 1, (1 << 192) - 1]


@given(st.lists(NUMBERS, max_size=20))
def test_a_sum_of_numbers_is_exact_but_for_a_step_each(values: list[float]) -> None:
    total = wide.encode([0.0])
    for value in values:
        wide.add(total, wide.encode([value]))
    exact = sum(map(Fraction, values), Fraction(0))
    assert abs(Fraction(wide.integers(total)[0], STEP) - exact) <= Fraction(len(values), 2 * STEP)


@given(st.lists(st.integers(-(2**53), 2**53), max_size=50))
def test_whole_numbers_add_up_exactly(values: list[int]) -> None:
    total = wide.encode([0.0])
    for value in values:
        wide.add(total, wide.encode([float(value)]))
    assert wide.integers(total) == [sum(values) * STEP]


@given(NUMBERS)
def test_a_number_comes_back_as_it_was_unless_it_is_tiny(value: float) -> None:
    [back] = wide.decode(wide.encode([value]))
    if abs(value) >= 2.0**-63 or value == 0:
        assert back == value
    else:
        assert abs(back - value) <= 2.0**-117


@given(st.integers(-(2**230), 2**230))
def test_a_fraction_keeps_more_than_a_float_has(steps: int) -> None:
    number = Fraction(steps, STEP)
    if abs(number) <= wide.LARGEST:
        assert wide.integers(wide.encode([number])) == [steps]


def test_rounding_is_to_the_nearest_step() -> None:
    step = 2.0**-wide.FRACTION_BITS
    assert wide.integers(wide.encode([0.4 * step, 0.6 * step, -0.6 * step, 1.0, -1.0])) == [0, 1, -1, STEP, -STEP]


def test_the_largest_and_nothing() -> None:
    assert wide.decode(wide.encode([wide.LARGEST, -wide.LARGEST])) == [wide.LARGEST, -wide.LARGEST]
    assert wide.encode([]).shape == (0, 4)
    assert wide.decode(wide.encode([])) == []
    wide.add(wide.encode([]), wide.encode([]))


def test_so_many_of_the_largest_are_told_apart_from_negative_ones() -> None:
    assert wide.TERMS * int(wide.LARGEST) * STEP < RING // 2


@pytest.mark.parametrize(
    ("value", "told"),
    [(math.nextafter(wide.LARGEST, math.inf), "8.30767e+34"), (-1e40, "-1e+40"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_what_is_too_large_or_undefined_is_refused(value: float, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told.replace('+', '.')} is beyond 8.30767e.34, the largest number that a secure sum"):
        wide.encode([1.0, value])


def test_a_fraction_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="is beyond"):
        wide.encode([Fraction(2**116) + Fraction(1, 2**60)])


# Under masks


@pytest.mark.parametrize("count", [0, 1, 3, 8192, 8193])  # a block is 8192 numbers
def test_masks_of_both_signs_cancel(count: int) -> None:
    keys = [os.urandom(KEY_BYTES) for _ in range(3)]
    numbers = words(*range(count))
    hidden = numbers.copy()
    Mask(keys[:1], keys[1:]).add_to_wide(hidden)
    assert count == 0 or not np.array_equal(hidden, numbers)
    Mask(keys[1:], keys[:1]).add_to_wide(hidden)
    assert np.array_equal(hidden, numbers)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@given(st.integers(0, 70_000), st.integers(0, 20), st.integers(0, 20))
def test_the_mask_of_the_numbers_follows_that_of_the_vector_however_both_are_cut(
    dtype: str, size: int, first: int, second: int
) -> None:
    key, width = bytes(range(KEY_BYTES)), np.dtype(dtype).itemsize
    stream = np.zeros(size * width + 32 * (first + second), np.uint8)
    Mask([key], ()).add_to(stream)
    vector, numbers, mask = np.zeros(size, dtype), words(*[0] * (first + second)), Mask([key], ())
    mask.add_to(vector[: size // 3])
    mask.add_to(vector[size // 3 :])
    mask.add_to_wide(numbers[:first])
    mask.add_to_wide(numbers[first:])
    assert vector.tobytes() + numbers.astype("<u8").tobytes() == stream.tobytes()


def test_what_a_mask_adds_to_a_number_is_added_with_its_carry() -> None:
    """Of the stream of ones the sum with 1 is 0, whatever the words."""
    key = bytes(KEY_BYTES)
    mask = words(0)
    Mask([key], ()).add_to_wide(mask)
    number = words(-unsigned(mask)[0])
    Mask([key], ()).add_to_wide(number)
    assert unsigned(number) == [0]
