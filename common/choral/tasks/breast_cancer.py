"""Wisconsin diagnostic breast cancer: malignant or benign, from 30 features of 569 cell images (Wolberg et al. 1995)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from choral import Standardize, Table, Task, Training

FEATURES = tuple(f"x{index}" for index in range(30))


def network() -> nn.Module:
    """30 → 16 → 2."""
    return nn.Sequential(Standardize(30), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of examples whose most probable class is the right one."""
    return (prediction.argmax(dim=1) == target).to(torch.float32).mean()


task = Task(
    name="breast_cancer",
    model=network,
    loss=cross_entropy,
    metrics={"accuracy": accuracy},
    load=Table(FEATURES, target="target", kind="class"),
    training=Training(epochs=2, batch_size=16, learning_rate=0.05),
)
