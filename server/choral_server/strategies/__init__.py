"""How the mean of the updates becomes the next model: one paper a file, and the choice among them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from choral.config import Settings
from numpy.typing import NDArray
from pydantic import Field, model_validator

from choral_server.strategies import fedavg, fedavgm

State = dict[str, NDArray[np.float32]]
"""What a server optimizer carries from one round to the next, by name; it is kept with each version."""


class ServerOptimizer(Settings):
    """Which server optimizer, and its hyper-parameters."""

    name: Literal["fedavg", "fedavgm"] = "fedavg"
    """fedavg: the mean of the clients' models; fedavgm: momentum over the means of rounds"""
    learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    """step size along the mean of the updates"""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """share of the velocity that a round keeps, for fedavgm; 0.9 if not given"""

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if self.momentum is not None and self.name != "fedavgm":
            raise ValueError(f"momentum {self.momentum:g} has no meaning for {self.name}: say name: fedavgm, or remove momentum")
        return self


def step(
    optimizer: ServerOptimizer, weights: NDArray[np.float32], mean_delta: NDArray[np.float64], state: State
) -> tuple[NDArray[np.float32], State]:
    """The next weights and state from the mean of the updates; all vectors `(n,)`.

    Each element of what it gives depends on the same element of what it takes alone: it is called for one stretch after the other.
    """
    if optimizer.name == "fedavg":
        return fedavg.step(weights, mean_delta, optimizer.learning_rate), {}
    momentum = 0.9 if optimizer.momentum is None else optimizer.momentum
    weights, velocity = fedavgm.step(weights, mean_delta, state.get("velocity"), momentum, optimizer.learning_rate)
    return weights, {"velocity": velocity}
