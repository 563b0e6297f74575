"""A task of CHORAL_EMPTY_PARAMS parameters that trains nothing: what is left is the round itself."""

from __future__ import annotations

import os

import torch
from choral import Table, Task, Training
from torch import Tensor, nn
from torch.nn.functional import mse_loss


class Empty(nn.Module):
    """Parameters in one tensor, never used."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(int(os.environ.get("CHORAL_EMPTY_PARAMS", "1700"))))

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


task = Task(name="empty", model=Empty, loss=mse_loss, load=Table(["x"], target="y"), training=Training(epochs=0))
