"""Federated averaging with server momentum (Hsu et al. 2019, arXiv 1909.06335, section 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def step(
    weights: NDArray[np.float32],
    mean_delta: NDArray[np.float64],
    velocity: NDArray[np.float32] | None,
    momentum: float,
    learning_rate: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """V ← β v + Δ; w ← w + η v. The new weights and velocity, `(n,)`; no velocity means zero."""
    new = (mean_delta if velocity is None else momentum * velocity.astype(np.float64) + mean_delta).astype(np.float32)
    return (weights + learning_rate * new.astype(np.float64)).astype(np.float32), new
