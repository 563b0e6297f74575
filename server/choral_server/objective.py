"""Which version is best, and when more training does not help. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from choral.config import Settings
from choral.metrics import LOSS, Metric, value_of
from pydantic import Field


class Objective(Settings):
    """The metric by which versions are compared."""

    metric: str = LOSS
    """name of a metric of the task, or loss"""
    mode: Literal["min", "max"] = "min"
    """whether less or more is better"""
    on: Literal["test", "clients"] | None = None
    """where it is measured: on the coordinator's test set, or by clients on their held-out examples; test if there is a test set"""
    patience_rounds: Annotated[int, Field(ge=1)] | None = None
    """stop the run once so many versions in a row were no better than the best; never, if not given"""
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """by how much a version must beat the best to count as better"""


@dataclass(frozen=True, slots=True)
class Progress:
    """The best version so far, its value, and how many measured versions have passed since."""

    best: int | None = None
    value: float | None = None
    stale: int = 0


def judge(objective: Objective, progress: Progress, version: int, measured: Sequence[Metric]) -> Progress:
    """What the measurements of `version` make of the progress. A value that is not a number never counts as better."""
    value = value_of(measured, objective.metric)
    if value is None:
        return progress
    sign = 1.0 if objective.mode == "min" else -1.0
    if value == value and (progress.value is None or sign * value < sign * progress.value - objective.min_delta):
        return Progress(best=version, value=value)
    return replace(progress, stale=progress.stale + 1)


def exhausted(objective: Objective, progress: Progress) -> bool:
    """Whether training should stop early."""
    return objective.patience_rounds is not None and progress.stale >= objective.patience_rounds
