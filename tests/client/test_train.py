from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from choral import Task, Training
from choral.errors import Declined, TaskError
from choral_client.train import Stopped, fit, make_ready
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset, TensorDataset


def line() -> nn.Linear:
    """w = 0, b = 0."""
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def task(loss: Any = mse_loss, model: Any = line) -> Task:
    return Task("line", model, loss, load=lambda path: TensorDataset())


def examples(*pairs: tuple[float, float]) -> TensorDataset:
    x, y = zip(*pairs, strict=True)
    return TensorDataset(torch.tensor(x, dtype=torch.float32)[:, None], torch.tensor(y, dtype=torch.float32)[:, None])


POINTS = examples(*((float(n), 3.0 * n + 1) for n in range(7)))


class Generic(Dataset[Any]):
    """The points as a map-style dataset that is no TensorDataset."""

    def __len__(self) -> int:
        return len(POINTS)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return POINTS[index]


def bits(model: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


def test_one_step_by_hand() -> None:
    """One batch of (1, 2) and (3, 4): loss (2² + 4²)/2 = 10; ∂w = −2·(1·2 + 3·4)/2 = −14, ∂b = −2·(2 + 4)/2 = −6."""
    model = line()
    assert fit(task(), model, examples((1, 2), (3, 4)), Training(epochs=1, batch_size=2, learning_rate=0.5), seed=0) == 10.0
    assert model.weight.item() == 7.0
    assert model.bias.item() == 3.0


def test_the_mean_loss_is_weighted_by_the_size_of_each_batch() -> None:
    """A learning rate too small to move float32 zeros by more than 1e-11: batches of 2 and 1 count as 3 examples, not 2 batches."""
    loss = fit(task(), line(), examples((1, 1), (1, 1), (1, 4)), Training(epochs=1, batch_size=2, learning_rate=1e-12), seed=0)
    assert loss == pytest.approx((1 + 1 + 16) / 3)


def test_the_loss_is_that_of_the_last_epoch() -> None:
    """Epoch 1: loss 4, w = b = 0 − 0.25·(−4) = 1. Epoch 2: exactly right, loss 0."""
    assert fit(task(), line(), examples((1, 2)), Training(epochs=2, batch_size=1, learning_rate=0.25), seed=0) == 0.0


def test_no_epochs_leave_the_model_as_it_is() -> None:
    model = line()
    before = bits(model)
    assert fit(task(), model, POINTS, Training(epochs=0), seed=0) is None
    assert bits(model) == before


def noisy() -> nn.Module:
    """A model that is random in training."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))


@pytest.mark.parametrize("data", [POINTS, Generic()])
def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(data: Dataset[Any]) -> None:
    trained = {}
    for key, seed, drawn_before in (("once", 1, 11), ("again", 1, 12), ("other", 2, 11)):
        torch.manual_seed(0)
        model = noisy()
        torch.manual_seed(drawn_before)
        fit(task(), model, data, Training(epochs=3, batch_size=2, learning_rate=0.001), seed)
        trained[key] = bits(model)
    assert trained["once"] == trained["again"]
    assert trained["once"] != trained["other"]


def test_the_global_generator_is_left_as_it_was() -> None:
    model = noisy()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit(task(), model, POINTS, Training(epochs=1), seed=9)
    assert torch.equal(torch.rand(4), expected)


def test_every_example_is_seen_once_an_epoch_in_an_order_that_changes() -> None:
    seen: list[float] = []

    def noting(prediction: Tensor, y: Tensor) -> Tensor:
        seen.extend(y.flatten().tolist())
        return mse_loss(prediction, y)

    fit(task(noting), line(), POINTS, Training(epochs=3, batch_size=2, learning_rate=0.001), seed=0)
    epochs = [seen[start : start + 7] for start in (0, 7, 14)]
    assert len(seen) == 21
    assert all(sorted(epoch) == [1, 4, 7, 10, 13, 16, 19] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_layers_are_in_training_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).eval()
    fit(task(), model, POINTS, Training(epochs=1, batch_size=7), seed=0)
    assert model[0].num_batches_tracked == 1


@pytest.mark.parametrize("y", [float("inf"), 1e30])
def test_a_loss_that_is_no_number_is_declined_with_what_to_do(y: float) -> None:
    with pytest.raises(Declined) as declined:
        fit(task(), line(), examples((1, y), (2, -y)), Training(epochs=5, batch_size=1, learning_rate=0.1), seed=0)
    assert "in epoch 1 of 5: lower the learning rate (0.1), or look at this client's data" in str(declined.value)


def test_work_that_is_stopped_ends_before_the_next_batch() -> None:
    stop = threading.Event()
    batches = 0

    def stopping(prediction: Tensor, y: Tensor) -> Tensor:
        nonlocal batches
        batches += 1
        if batches == 3:
            stop.set()
        return mse_loss(prediction, y)

    with pytest.raises(Stopped):
        fit(task(stopping), line(), POINTS, Training(epochs=100, batch_size=1), seed=0, stop=stop)
    assert batches == 3


def test_code_that_raises_is_named() -> None:
    def wrong(prediction: Tensor, y: Tensor) -> Tensor:
        raise IndexError("no such column")

    with pytest.raises(TaskError, match="task line: training raised IndexError: no such column"):
        fit(task(wrong), line(), POINTS, Training(epochs=1), seed=0)


def test_an_optimizer_is_made_before_it_is_needed_and_what_is_wrong_with_it_is_told_by_the_round() -> None:
    made = list[float]()

    def optimizer(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
        made.append(learning_rate)
        if len(made) > 1:
            raise ZeroDivisionError
        return torch.optim.SGD(parameters, lr=learning_rate)

    picky = Task("line", line, mse_loss, lambda path: TensorDataset(), training=Training(learning_rate=0.25), optimizer=optimizer)
    make_ready(picky)
    assert made == [0.25]
    make_ready(picky)
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        fit(picky, line(), POINTS, Training(), seed=0)
