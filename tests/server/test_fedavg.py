from __future__ import annotations

import numpy as np
from choral_server.strategies.fedavg import step


def test_the_mean_of_the_changes_is_added() -> None:
    weights = np.array([1.0, -1.0, 0.0], np.float32)
    after = step(weights, np.array([0.5, 0.25, -2.0]))
    assert after.dtype == np.float32
    assert after.tolist() == [1.5, -0.75, -2.0]
    assert weights.tolist() == [1.0, -1.0, 0.0]


def test_the_sum_is_rounded_once() -> None:
    """Rounded to float32 first, this change would be exactly half a step above 1, and be lost."""
    change = 2.0**-24 * (1 + 2.0**-26)
    assert np.float32(1) + np.float32(change) == 1
    assert step(np.ones(1, np.float32), np.array([change])).tolist() == [1 + 2.0**-23]
