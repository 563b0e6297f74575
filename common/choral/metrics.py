"""Metrics: numbers measured on examples, and their mean over clients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Metric:
    """One number: the mean of something over `examples` examples, in its own unit."""

    name: str
    value: float
    examples: int


def weighted_mean(measured: Iterable[Metric]) -> tuple[Metric, ...]:
    """One metric per name: the mean weighted by examples. Order of names: first seen."""
    total: dict[str, float] = {}
    examples: dict[str, int] = {}
    for metric in measured:
        total[metric.name] = total.get(metric.name, 0.0) + metric.value * metric.examples
        examples[metric.name] = examples.get(metric.name, 0) + metric.examples
    return tuple(Metric(name, total[name] / examples[name], examples[name]) for name in total if examples[name] > 0)


def value_of(metrics: Iterable[Metric], name: str) -> float | None:
    """The value of the metric called `name`, or None."""
    return next((metric.value for metric in metrics if metric.name == name), None)
