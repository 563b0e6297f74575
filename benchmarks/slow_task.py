"""A task whose training takes CHORAL_TRAIN_S seconds and next to no CPU time, as if it trained on another machine."""

from __future__ import annotations

import os
import time

from choral import Table, Task, Training
from torch import Tensor, nn
from torch.nn.functional import mse_loss

BATCHES = 10  # the rows of the shard; work that is not wanted any more ends after a batch, as any training does


def loss(prediction: Tensor, y: Tensor) -> Tensor:
    """Mean squared error, after a while."""
    time.sleep(float(os.environ["CHORAL_TRAIN_S"]) / BATCHES)
    return mse_loss(prediction, y)


task = Task(
    name="slow",
    model=lambda: nn.Linear(1, 1),
    loss=loss,
    load=Table(["x"], target="y"),
    training=Training(epochs=1, batch_size=1, learning_rate=0.001),
)
