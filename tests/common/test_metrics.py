from __future__ import annotations

import math

import pytest
from choral.metrics import Metric, value_of, weighted_mean
from hypothesis import given
from hypothesis import strategies as st


def test_the_mean_is_weighted_by_examples_and_names_keep_their_order() -> None:
    alice = (Metric("mse", 10.0, 30), Metric("loss", 1.0, 30))
    bob = (Metric("loss", 5.0, 10), Metric("mae", 2.0, 10))
    assert weighted_mean([*alice, *bob]) == (Metric("mse", 10.0, 30), Metric("loss", 2.0, 40), Metric("mae", 2.0, 10))


def test_nothing_measured_gives_nothing() -> None:
    assert weighted_mean([]) == ()
    assert weighted_mean([Metric("loss", 3.0, 0)]) == ()
    assert weighted_mean([Metric("loss", 3.0, 0), Metric("loss", 4.0, 2)]) == (Metric("loss", 4.0, 2),)


def test_an_undefined_value_is_not_hidden() -> None:
    (mean,) = weighted_mean([Metric("loss", math.nan, 1), Metric("loss", 1.0, 1000)])
    assert math.isnan(mean.value)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 10_000)), min_size=1, max_size=20))
def test_the_mean_over_clients_is_the_mean_over_all_examples(measured: list[tuple[float, int]]) -> None:
    (mean,) = weighted_mean(Metric("loss", value, examples) for value, examples in measured)
    total = math.fsum(value * examples for value, examples in measured)
    assert mean.examples == sum(examples for _, examples in measured)
    assert mean.value == pytest.approx(total / mean.examples, rel=1e-9, abs=1e-6)


def test_a_value_is_found_by_name() -> None:
    metrics = (Metric("loss", 1.0, 1), Metric("mae", 2.0, 1))
    assert value_of(metrics, "mae") == 2.0
    assert value_of(metrics, "mse") is None
