"""Handwritten digits: 1 797 images of 8 × 8 pixels, ten classes (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cross_entropy

from choral import Standardize, Table, Task, Training
from choral.tasks.breast_cancer import accuracy

FEATURES = tuple(f"x{index}" for index in range(64))


def network() -> nn.Module:
    """64 → 32 → 10."""
    return nn.Sequential(Standardize(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


task = Task(
    name="digits",
    model=network,
    loss=cross_entropy,
    metrics={"accuracy": accuracy},
    load=Table(FEATURES, target="target", kind="class"),
    ranges=[(0.0, 16.0)] * len(FEATURES),
    training=Training(epochs=2, batch_size=16, learning_rate=0.05),
)
