from __future__ import annotations

import io
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from choral import Standardize, Task, Training
from choral.errors import Declined, TaskError
from choral.metrics import Metric
from choral.plan import ExamplePlan, Kind, Plan, PrivatePlan
from choral_client.data import Shard
from choral_client.train import Stopped
from choral_client.work import Work
from safetensors.torch import save
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from torch.utils.data import TensorDataset


def model() -> nn.Module:
    return nn.Sequential(Standardize(2), nn.Linear(2, 1))


def task(loss: Any = mse_loss) -> Task:
    return Task("small", model, loss, load=lambda path: TensorDataset(), metrics={"mae": l1_loss})


def data(*rows: tuple[float, float, float]) -> TensorDataset:
    numbers = torch.tensor(rows)
    return TensorDataset(numbers[:, :2], numbers[:, 2:])


TRAINING = data((1, 2, 3), (3, 6, 9))
HELD_OUT = data((1, 1, 5), (2, 0, 1))
SHARD = Shard(TRAINING, HELD_OUT, 2)


def checkpoint(w: tuple[float, float] = (0, 0), b: float = 0.0, mean: tuple[float, float] = (0, 0)) -> io.BytesIO:
    state = {"0.mean": torch.tensor(mean), "0.scale": torch.ones(2), "1.weight": torch.tensor([w]), "1.bias": torch.tensor([b])}
    return io.BytesIO(save({name: tensor.float() for name, tensor in state.items()}))


def plan(kind: Kind, evaluate: bool = False, name: str = "small", version: str = "1") -> Plan:
    return Plan(kind, name, version, Training(epochs=1, batch_size=2, learning_rate=0.5), seed=4, evaluate=evaluate)


def test_statistics_are_count_means_and_squared_deviations_of_the_training_rows() -> None:
    result = Work(task(), SHARD).do(plan(Kind.STATISTICS), checkpoint(), threading.Event())
    assert np.frombuffer(b"".join(result.payload), "<f8").tolist() == [2.0, 2.0, 4.0, 2.0, 8.0]
    assert (result.held_out, result.work) == ((), ())


def test_training_sends_the_change_of_the_averaged_entries() -> None:
    """From w = (1, 0), b = 1, mean (1, 2): x − mean is (0, 0) and (2, 4), predictions 1 and 3, errors −2 and −6, loss 20.

    ∂w = 2·(−6·(2, 4))/2 = (−12, −24), ∂b = 2·(−2 − 6)/2 = −8; with a rate of 0.5 the change is (6, 12) and 4.
    """
    result = Work(task(), SHARD).do(plan(Kind.TRAINING), checkpoint((1, 0), 1, mean=(1, 2)), threading.Event())
    assert np.frombuffer(b"".join(result.payload), "<f4").tolist() == [6.0, 12.0, 4.0]
    work = {metric.name: metric for metric in result.work}
    assert work["train_loss"] == Metric("train_loss", 20.0, 2)
    assert work["train_s"].value >= 0
    assert result.held_out == ()


def test_the_version_is_measured_before_the_work() -> None:
    """Predictions of w = (1, 1), b = 0 on the held-out rows are 2 and 2; errors 3 and 1: squared mean 5, absolute mean 2."""
    work = Work(task(), SHARD)
    for kind in (Kind.TRAINING, Kind.EVALUATION):
        result = work.do(plan(kind, evaluate=True), checkpoint((1, 1)), threading.Event())
        assert result.held_out == (Metric("loss", 5.0, 2), Metric("mae", 2.0, 2))
    assert b"".join(result.payload) == b""  # of the evaluation


def test_each_assignment_starts_from_its_checkpoint() -> None:
    work = Work(task(), SHARD)
    once = b"".join(work.do(plan(Kind.TRAINING), checkpoint((1, 0)), threading.Event()).payload)
    work.do(plan(Kind.TRAINING), checkpoint((5, 5)), threading.Event())
    assert b"".join(work.do(plan(Kind.TRAINING), checkpoint((1, 0)), threading.Event()).payload) == once


def test_nothing_held_out_measures_nothing() -> None:
    work = Work(task(), Shard(TRAINING, None, 2))
    assert work.do(plan(Kind.TRAINING, evaluate=True), checkpoint(), threading.Event()).held_out == ()
    with pytest.raises(Declined, match=r"no examples are held out here \(holdout in the client's configuration\)"):
        work.do(plan(Kind.EVALUATION, evaluate=True), checkpoint(), threading.Event())


@pytest.mark.parametrize(("name", "version"), [("other", "1"), ("small", "2")])
def test_another_task_is_declined(name: str, version: str) -> None:
    with pytest.raises(Declined, match=f"asked for task {name} {version}; small 1 is installed here"):
        Work(task(), SHARD).do(plan(Kind.TRAINING, name=name, version=version), checkpoint(), threading.Event())


def test_work_that_was_stopped_before_it_began() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Work(task(), SHARD).do(plan(Kind.TRAINING), checkpoint(), stop)


def test_a_metric_that_raises_is_named() -> None:
    def wrong(prediction: object, target: object) -> float:
        raise ValueError("no such class")

    broken = Task("small", model, mse_loss, load=lambda path: TensorDataset(), metrics={"auc": wrong})
    with pytest.raises(TaskError, match="task small: evaluation raised ValueError: no such class"):
        Work(broken, SHARD).do(plan(Kind.TRAINING, evaluate=True), checkpoint(), threading.Event())


@pytest.mark.parametrize("rate", [1e30, 3e38])
def test_work_that_comes_to_no_number_is_no_change_where_noise_is_added(rate: float) -> None:
    """Whether a result comes, and how it is refused, would tell of the data, and no noise is on that."""
    asked = Plan(Kind.TRAINING, "small", "1", Training(epochs=3, batch_size=1, learning_rate=rate), 4, evaluate=False)
    start = checkpoint((1, 0), 1, mean=(1, 2))
    with pytest.raises(Declined, match="the loss is"):
        Work(task(), SHARD).do(asked, start, threading.Event())
    result = Work(task(), SHARD).do(replace(asked, noised=True), start, threading.Event())
    assert np.frombuffer(b"".join(result.payload), "<f4").tolist() == [0.0, 0.0, 0.0]
    assert result.work == ()


def test_a_model_that_has_come_to_no_number_with_a_good_loss_is_no_change_either() -> None:
    asked = Plan(Kind.TRAINING, "small", "1", Training(epochs=1, batch_size=2, learning_rate=3e38), 4, evaluate=False, noised=True)
    result = Work(task(), SHARD).do(asked, checkpoint((1, 0), 1, mean=(1, 2)), threading.Event())
    assert np.frombuffer(b"".join(result.payload), "<f4").tolist() == [0.0, 0.0, 0.0]


def test_good_work_is_the_same_where_noise_is_added() -> None:
    plain, noised = (
        Work(task(), SHARD).do(replace(plan(Kind.TRAINING), noised=noised), checkpoint((1, 0)), threading.Event())
        for noised in (False, True)
    )
    assert b"".join(plain.payload) == b"".join(noised.payload) != bytes(12)
    assert noised.work == ()  # a loss of this client alone


def test_nobody_says_that_it_has_nothing_to_measure_with_where_noise_is_added() -> None:
    work = Work(task(), Shard(TRAINING, None, 2))
    asked = replace(plan(Kind.EVALUATION, evaluate=True), noised=True)
    assert work.do(asked, checkpoint(), threading.Event()).held_out == ()


LOCAL = PrivatePlan(2.0, 1, 1.0, metrics_share=0.2, ranges=((0.0, 10.0), (0.0, 10.0)))


def test_with_noise_of_its_own_nothing_tells_that_the_work_failed() -> None:
    """A metric or a loss that raises because of the data: the middle of each range, and no change, both under the noise."""

    def broken(prediction: Any, target: Any) -> Any:
        raise IndexError("target 7 is out of bounds")

    asked = replace(plan(Kind.TRAINING, evaluate=True), noised=True, private=LOCAL)
    results = [Work(task(broken), SHARD).do(asked, checkpoint(), threading.Event()) for _ in range(2)]
    updates = [np.frombuffer(b"".join(result.payload), "<f4") for result in results]
    assert all(np.isfinite(update).all() and np.abs(update).max() > 0 for update in updates)
    assert not np.array_equal(*updates)
    for result in results:
        assert [(metric.name, metric.examples) for metric in result.held_out] == [("loss", 1), ("mae", 1)]
        assert result.work == ()


def test_what_single_examples_are_hidden_in_is_asked_for_alone() -> None:
    hiding = ExamplePlan(1.0, 1.0, 8.0, 1e-5)
    for asked in (plan(Kind.TRAINING, evaluate=True), plan(Kind.EVALUATION), replace(plan(Kind.TRAINING), private=LOCAL)):
        with pytest.raises(Declined, match="asked to hide single examples, and beside it for what is computed from them"):
            Work(task(), SHARD).check(replace(asked, examples=hiding))
