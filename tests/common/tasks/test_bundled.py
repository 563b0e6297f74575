from __future__ import annotations

import pytest
import torch
from choral.flat import describe
from choral.manifest import EntryKind
from choral.plan import Training
from choral.standardize import standardize_of
from choral.task import load_task
from choral.tasks.breast_cancer import accuracy


@pytest.mark.parametrize(
    ("name", "parameters", "features"),
    [
        ("boston_housing", 13 * 32 + 32 + 32 * 24 + 24 + 24 * 16 + 16 + 16 + 1, 13),
        ("breast_cancer", 30 * 16 + 16 + 16 * 2 + 2, 30),
        ("digits", 64 * 32 + 32 + 32 * 10 + 10, 64),
    ],
)
def test_networks(name: str, parameters: int, features: int) -> None:
    task = load_task(f"choral.tasks.{name}:task")
    model = task.initial_model(0)
    manifest = describe(model)
    layer = standardize_of(model)
    assert task.name == name
    assert manifest.size == parameters
    assert layer is not None
    assert layer.mean.numel() == features
    assert [entry.name for entry in manifest.entries if entry.kind is EntryKind.STATISTIC] == ["0.mean", "0.scale"]


def test_boston_housing_is_as_in_the_original() -> None:
    task = load_task("choral.tasks.boston_housing:task")
    assert task.training == Training(epochs=5, batch_size=8, learning_rate=0.001)
    layer = standardize_of(task.initial_model(0))
    assert layer is not None
    assert layer.keep == (3,)  # CHAS
    assert task.loss(torch.tensor([[1.0], [4.0]]), torch.tensor([[1.0], [1.0]])) == 4.5


def test_accuracy_by_hand() -> None:
    prediction = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert accuracy(prediction, torch.tensor([0, 1, 1, 1])) == 0.75
