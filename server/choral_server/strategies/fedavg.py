"""Federated averaging (McMahan et al. 2017, AISTATS, algorithm 1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def step(weights: NDArray[np.float32], mean_delta: NDArray[np.float64], learning_rate: float = 1.0) -> NDArray[np.float32]:
    """W ← w + η Σ nₖ Δₖ / Σ nₖ: with η = 1 the mean of the clients' models, written with their changes. Both `(n,)`."""
    return (weights + learning_rate * mean_delta).astype(np.float32)
