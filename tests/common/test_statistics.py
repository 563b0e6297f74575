from __future__ import annotations

import math

import numpy as np
import pytest
from choral.errors import InvalidMessage
from choral.statistics import Moments, merge, merge_all
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

# as a Table gives them: float32, from very small to very large
CELLS = st.floats(-1e6, 1e6, width=32)
SHARDS = st.integers(1, 4).flatmap(
    lambda features: st.lists(
        st.integers(1, 20).flatmap(lambda rows: arrays(np.float32, (rows, features), elements=CELLS)), min_size=1, max_size=5
    )
)


def test_moments_by_hand() -> None:
    moments = Moments.of(np.array([[1.0, 10.0], [2.0, 10.0], [6.0, 10.0]]))
    assert moments.count == 3
    assert moments.mean.tolist() == [3.0, 10.0]
    assert moments.m2.tolist() == [14.0, 0.0]  # 4 + 1 + 9
    assert moments.deviation.tolist() == [math.sqrt(14 / 3), 1.0]  # a constant feature is divided by 1


def test_merging_by_hand() -> None:
    a, b = Moments.of(np.array([[1.0], [3.0]])), Moments.of(np.array([[8.0]]))
    both = merge(a, b)
    assert (both.count, both.mean.tolist(), both.m2.tolist()) == (3.0, [4.0], [26.0])  # 9 + 1 + 16


@given(SHARDS)
def test_merged_moments_are_the_pooled_ones(shards: list[NDArray[np.float32]]) -> None:
    merged = merge_all(map(Moments.of, shards))
    pooled = np.concatenate(shards).astype(np.float64)
    scale = np.abs(pooled).max(axis=0)
    assert merged.count == len(pooled)
    np.testing.assert_allclose(merged.mean, pooled.mean(axis=0), rtol=1e-12, atol=1e-12 * scale.max())
    np.testing.assert_allclose(merged.m2, pooled.var(axis=0) * len(pooled), rtol=1e-9, atol=1e-12 * len(pooled) * (scale**2).max())


def test_a_large_common_offset_does_not_cancel() -> None:
    """The sum of squares minus the square of the sum would lose every digit here."""
    x = 1e9 + np.array([[0.0], [1.0], [2.0], [3.0]])
    merged = merge(Moments.of(x[:1]), Moments.of(x[1:]))
    assert merged.m2[0] == pytest.approx(5.0, rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6 / 3])
def test_a_constant_feature_is_divided_by_one(value: float, dtype: type) -> None:
    shards = [np.full((rows, 1), value, dtype) for rows in (3, 7, 1, 50)]
    merged = merge_all(map(Moments.of, shards))
    assert merged.deviation.tolist() == [1.0]


@pytest.mark.parametrize("m2", [0.0, 1e-300, 1e-92, 1e-60])
def test_a_deviation_is_never_zero_in_the_float32_of_the_models_buffer(m2: float) -> None:
    assert Moments(4.0, np.zeros(1), np.array([m2])).deviation.astype(np.float32) > 0


@given(SHARDS)
def test_vectors_round_trip(shards: list[NDArray[np.float32]]) -> None:
    moments = merge_all(map(Moments.of, shards))
    again = Moments.from_vector(moments.to_vector())
    assert again.count == moments.count
    assert again.mean.tolist() == moments.mean.tolist()
    assert again.m2.tolist() == moments.m2.tolist()


@pytest.mark.parametrize(
    ("vector", "told"),
    [
        ([], "statistics of 0 numbers"),
        ([5.0], "statistics of 1 numbers"),
        ([5.0, 1.0, 1.0, 1.0], "statistics of 4 numbers; 1 \\+ 2 × features are expected"),
        ([5.0, math.nan, 1.0], "not finite"),
        ([5.0, 1.0, math.inf], "not finite"),
        ([math.inf, 1.0, 1.0], "not finite"),
        ([0.0, 0.0, 0.0], "of 0.0 examples; at least one is needed"),
        ([-4.0, 0.0, 0.0], "of -4.0 examples"),
        ([5.0, 1.0, 2.0, 3.0, -1e-9], "negative sum of squares"),
    ],
)
def test_refuses_vectors_that_are_no_moments(vector: list[float], told: str) -> None:
    with pytest.raises(InvalidMessage, match=told):
        Moments.from_vector(np.array(vector))
