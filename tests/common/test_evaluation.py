from __future__ import annotations

import pytest
import torch
from choral.errors import TaskError
from choral.evaluation import batches, evaluate, evaluating
from choral.metrics import Metric
from choral.table import Table
from choral.task import Task
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset, TensorDataset


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A plain dataset of the same examples as a TensorDataset."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._x[index], self._y[index]


def _spread(prediction: Tensor, target: Tensor) -> Tensor:
    """A metric that the means of batches do not give."""
    return (prediction - target).abs().max() - (prediction - target).abs().min()


def _task(**changes: object) -> Task:
    parts = {
        "name": "line",
        "model": lambda: nn.Linear(1, 1),
        "loss": mse_loss,
        "metrics": {"spread": _spread, "count": lambda prediction, target: len(target)},
        "load": Table(["x"], target="y"),
    }
    return Task(**{**parts, **changes})  # type: ignore[arg-type]


def _double() -> nn.Linear:
    """y = 2 x."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.zero_()
    return model


def test_loss_and_metrics_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [5.0], [2.0]])  # off by 0, 1 and 4
    assert evaluate(_task(), _double(), TensorDataset(x, y)) == (
        Metric("loss", pytest.approx(17 / 3), 3),
        Metric("spread", 4.0, 3),
        Metric("count", 3.0, 3),
    )


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2500])
def test_metrics_cover_all_examples_and_both_kinds_of_datasets_agree(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    x, y = torch.randn(count, 1, generator=generator), torch.randn(count, 1, generator=generator)
    model = _double()
    measured = evaluate(_task(), model, TensorDataset(x, y))
    assert measured == evaluate(_task(), model, Pairs(x, y))
    error = (2 * x - y).double()
    assert [metric.examples for metric in measured] == [count] * 3
    assert measured[0].value == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert measured[1].value == pytest.approx((error.abs().max() - error.abs().min()).item(), rel=1e-5)
    assert measured[2].value == count


def test_no_graph_is_built_for_gradients() -> None:
    wanted: list[bool] = []

    def metric(prediction: Tensor, target: Tensor) -> float:
        wanted.append(prediction.requires_grad)
        return 0.0

    evaluate(_task(metrics={"m": metric}), _double(), TensorDataset(torch.ones(1, 1), torch.ones(1, 1)))
    assert wanted == [False]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_measured_in_evaluation_mode_and_left_as_it_was(training: bool) -> None:
    model = nn.Sequential(_double(), nn.Dropout(0.99), nn.BatchNorm1d(1)).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (loss,) = evaluate(_task(metrics={}), model, TensorDataset(torch.ones(8, 1), torch.full((8, 1), 2.0)))
    assert loss.value == pytest.approx(0.0, abs=1e-8)  # neither dropout nor the batch's own statistics
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_after_an_error() -> None:
    model = nn.Linear(1, 1).train()

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert model.training


@pytest.mark.parametrize("part", ["loss", "metrics"])
def test_says_what_the_tasks_code_raised(part: str) -> None:
    def broken(prediction: Tensor, target: Tensor) -> Tensor:
        raise ArithmeticError("no logarithm of 0")

    task = _task(loss=broken) if part == "loss" else _task(metrics={"broken": broken})
    with pytest.raises(TaskError, match=r"^task line: evaluation raised ArithmeticError: no logarithm of 0$"):
        evaluate(task, _double(), TensorDataset(torch.ones(1, 1), torch.ones(1, 1)))


def test_says_that_model_and_examples_do_not_fit() -> None:
    with pytest.raises(TaskError, match="task line: evaluation raised RuntimeError: mat1 and mat2"):
        evaluate(_task(), _double(), TensorDataset(torch.ones(4, 3), torch.ones(4, 1)))


def _both(count: int) -> list[Dataset[tuple[Tensor, Tensor]]]:
    x = torch.arange(count, dtype=torch.float32)[:, None]
    return [TensorDataset(x, -x), Pairs(x, -x)]


@pytest.mark.parametrize("kind", [0, 1])
def test_batches_in_order(kind: int) -> None:
    cut = [x.flatten().tolist() for x, _ in batches(_both(5)[kind], 2)]
    assert cut == [[0.0, 1.0], [2.0, 3.0], [4.0]]


@pytest.mark.parametrize("kind", [0, 1])
def test_shuffled_batches_hold_each_example_once_and_repeat_with_the_seed(kind: int) -> None:
    def once(seed: int) -> list[float]:
        drawn = list(batches(_both(50)[kind], 8, torch.Generator().manual_seed(seed)))
        assert [len(x) for x, _ in drawn] == [8] * 6 + [2]
        assert all(torch.equal(x, -y) for x, y in drawn)
        return torch.cat([x for x, _ in drawn]).flatten().tolist()

    assert sorted(once(1)) == [float(number) for number in range(50)]
    assert once(1) == once(1)
    assert once(1) != once(2)


def test_each_epoch_is_shuffled_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = ([x.flatten().tolist() for x, _ in batches(_both(50)[0], 8, generator)] for _ in range(2))
    assert first != second
