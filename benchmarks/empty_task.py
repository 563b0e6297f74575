"""A task of CHORAL_EMPTY_PARAMS parameters that trains nothing: what is left is the round itself.

Each client changes every parameter, each round by other amounts, as training would: what is sent is never what was sent before, nor
what another sends. That costs one addition over the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from choral import Table, Task, Training
from torch import Tensor, nn
from usage import usage

NOISE = 1 << 20  # numbers, 4 MB: more than what zstd looks back over at its usual levels, so that no codec finds the repetition


class Empty(nn.Module):
    """Parameters in one tensor, never used."""

    def __init__(self) -> None:
        super().__init__()
        note_memory()
        self.weights = nn.Parameter(torch.zeros(int(os.environ.get("CHORAL_EMPTY_PARAMS", "1700"))))

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


class Change:
    """All of an optimizer that is called: a step adds noise."""

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        self._parameters, self._scale = list(parameters), learning_rate

    def zero_grad(self) -> None:
        """There are no gradients."""

    @torch.no_grad()
    def step(self) -> None:
        """Change every number."""
        scale = self._scale * (0.5 + torch.rand(()).item())  # the round's own: its seed is the plan's
        for parameter in self._parameters:
            for piece in parameter.view(-1).split(NOISE):  # type: ignore[no-untyped-call]
                piece.add_(noise()[: len(piece)], alpha=scale)


@cache
def noise() -> Tensor:
    """This process's own numbers."""
    size = min(NOISE, int(os.environ.get("CHORAL_EMPTY_PARAMS", "1700")))
    return torch.randn(size, generator=torch.Generator().manual_seed(os.getpid()))


def loss(prediction: Tensor, y: Tensor) -> Tensor:
    """Mean squared error; it is its own and only gradient."""
    return (prediction - y).square().mean().requires_grad_()


def note_memory() -> None:
    """Leave what this process has before there is a model, if the benchmark wants to know, in a file named after the process."""
    if folder := os.environ.get("CHORAL_EMPTY_NOTES"):
        note = Path(folder) / str(os.getpid())
        if not note.exists():
            note.write_text(str(usage().resident_bytes))


task = Task(
    name="empty",
    model=Empty,
    loss=loss,
    load=Table(["x"], target="y"),
    training=Training(epochs=1, learning_rate=0.001),
    optimizer=Change,  # type: ignore[arg-type]
)
