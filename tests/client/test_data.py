from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from choral import Table, Task
from choral.errors import DataError, TaskError
from choral.evaluation import batches
from choral_client.data import load_shard
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset, IterableDataset, TensorDataset


class Pairs(Dataset[Any]):
    """A map-style dataset that is no TensorDataset: x is `(1, 2)`, y `(1,)`, both made from the row's number."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= self._count:
            raise IndexError(index)
        return torch.tensor([[index, 2.0 * index]]), torch.tensor([float(index)])


def task(load: Any) -> Task:
    return Task("rows", lambda: nn.Linear(1, 1), mse_loss, load)


def rows_task(count: int, generic: bool = False) -> Task:
    numbers = torch.arange(count, dtype=torch.float32)[:, None]
    return task(lambda path: Pairs(count) if generic else TensorDataset(numbers, numbers))


def rows(part: Dataset[Any] | None) -> list[int]:
    return [] if part is None else [int(y) for _, target in batches(part, 3) for y in target.flatten()]


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize(
    ("count", "holdout", "held"), [(10, 0.0, 0), (10, 0.1, 1), (9, 0.1, 0), (10, 0.35, 3), (1, 0.9, 0), (404, 0.1, 40)]
)
def test_both_parts_together_are_all_rows_once(count: int, holdout: float, held: int, generic: bool) -> None:
    shard = load_shard(rows_task(count, generic), Path("any.csv"), holdout)
    training, held_out = rows(shard.training), rows(shard.held_out)
    assert (len(held_out), len(training), shard.size) == (held, count - held, count - held)
    assert sorted(training + held_out) == list(range(count))
    assert (shard.held_out is None) == (held == 0)


@pytest.mark.parametrize("generic", [False, True])
def test_the_same_file_always_holds_out_the_same_rows(generic: bool) -> None:
    torch.manual_seed(1)
    once = load_shard(rows_task(50, generic), Path("any.csv"), 0.2)
    torch.manual_seed(2)
    again = load_shard(rows_task(50, generic), Path("any.csv"), 0.2)
    assert rows(once.held_out) == rows(again.held_out)
    assert rows(once.training) == rows(again.training)
    assert sorted(rows(once.held_out)) != list(range(10))  # drawn, not cut from the top of a file that may be sorted


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_shard(rows_task(50), Path("any.csv"), 0.2)
    assert torch.equal(torch.rand(4), expected)


def test_a_tensor_dataset_stays_one() -> None:
    shard = load_shard(rows_task(10), Path("any.csv"), 0.5)
    assert isinstance(shard.training, TensorDataset)
    assert isinstance(shard.held_out, TensorDataset)


def test_features_are_flat_rows_of_the_training_part() -> None:
    shard = load_shard(rows_task(20, generic=True), Path("any.csv"), 0.25)
    expected = [[float(row), 2.0 * row] for row in rows(shard.training)]
    assert shard.features().tolist() == expected


def test_a_shard_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shard.csv"
    path.write_text("a,b,y\n1,2,3\n4,5,6\n")
    shard = load_shard(task(Table(["b", "a"], target="y")), path, 0)
    assert sorted(shard.features().tolist()) == [[2.0, 1.0], [5.0, 4.0]]


def test_too_little_to_train_on_is_refused() -> None:
    with pytest.raises(DataError, match=r"any\.csv: 0 examples leave none to train on; at least one is needed"):
        load_shard(rows_task(0), Path("any.csv"), 0.1)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def test_a_dataset_without_a_length_is_refused() -> None:
    with pytest.raises(TaskError, match=r"task rows: load\(\) gave a Endless; a map-style Dataset with a length is needed"):
        load_shard(task(lambda path: Endless()), Path("any.csv"), 0.1)


def test_code_that_raises_is_named() -> None:
    def load(path: Path) -> Dataset[Any]:
        raise RuntimeError("the disk is on fire")

    with pytest.raises(TaskError, match=r"task rows: load\('any\.csv'\) raised RuntimeError: the disk is on fire"):
        load_shard(task(load), Path("any.csv"), 0.1)
