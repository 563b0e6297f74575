from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from choral.metrics import Metric
from choral_server.objective import Objective, Progress, exhausted, judge
from pydantic import ValidationError


def _after(objective: Objective, values: Sequence[float], metric: str = "loss") -> Progress:
    progress = Progress()
    for version, value in enumerate(values, start=1):
        progress = judge(objective, progress, version, [Metric("other", -99.0, 1), Metric(metric, value, 1)])
    return progress


LESS, MORE = Objective(), Objective(metric="accuracy", mode="max")


@pytest.mark.parametrize(
    ("values", "best", "value", "stale"),
    [
        ([], None, None, 0),
        ([3.0], 1, 3.0, 0),
        ([3.0, 2.0, 1.0], 3, 1.0, 0),
        ([3.0, 1.0, 2.0, 1.5], 2, 1.0, 2),
        ([3.0, 3.0], 1, 3.0, 1),  # equal is not better
        ([3.0, 4.0, 2.0], 3, 2.0, 0),  # better again: nothing is stale
        ([math.nan, math.nan], None, None, 2),
        ([math.nan, 3.0, math.nan], 2, 3.0, 1),
        ([3.0, math.inf, -math.inf], 3, -math.inf, 0),
    ],
)
def test_less_is_better(values: list[float], best: int | None, value: float | None, stale: int) -> None:
    assert _after(LESS, values) == Progress(best, value, stale)


@pytest.mark.parametrize(
    ("values", "best", "value", "stale"),
    [
        ([0.5, 0.75, 0.6], 2, 0.75, 1),
        ([math.nan, 0.5], 2, 0.5, 0),
        ([0.5, 0.5, math.nan], 1, 0.5, 2),
        ([0.0, -1.0], 1, 0.0, 1),
    ],
)
def test_more_is_better(values: list[float], best: int | None, value: float | None, stale: int) -> None:
    assert _after(MORE, values, "accuracy") == Progress(best, value, stale)


def test_the_best_must_be_beaten_by_min_delta() -> None:
    assert _after(Objective(min_delta=0.5), [3.0, 2.75, 2.5]) == Progress(1, 3.0, 2)
    assert _after(Objective(min_delta=0.5), [3.0, 2.75, 2.25]) == Progress(3, 2.25, 0)
    assert _after(Objective(metric="accuracy", mode="max", min_delta=0.25), [0.5, 0.75], "accuracy") == Progress(1, 0.5, 1)
    assert _after(Objective(metric="accuracy", mode="max", min_delta=0.25), [0.5, 0.875], "accuracy") == Progress(2, 0.875, 0)


def test_what_does_not_measure_the_metric_changes_nothing() -> None:
    progress = Progress(3, 1.0, 2)
    assert judge(LESS, progress, 4, []) is progress
    assert judge(LESS, progress, 4, [Metric("accuracy", 0.1, 5)]) is progress


def test_patience() -> None:
    patient = Objective(patience_rounds=2)
    values = [3.0, 1.0, 2.0, 1.5, 0.5]
    assert [exhausted(patient, _after(patient, values[:count])) for count in range(6)] == [False, False, False, False, True, False]
    assert not exhausted(LESS, _after(LESS, [1.0] * 100))
    assert exhausted(patient, _after(patient, [math.nan, math.nan]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "least"),
        ("on", "server"),
        ("patience_rounds", 0),
        ("min_delta", -0.1),
        ("min_delta", math.nan),
        ("min_delta", math.inf),
    ],
)
def test_refuses_what_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Objective(**{field: value})  # type: ignore[arg-type]
