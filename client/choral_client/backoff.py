"""How long to wait before trying again."""

from __future__ import annotations

import random

BASE_S = 0.5
CAP_S = 60.0


def full_jitter(attempt: int, rng: random.Random) -> float:
    """Seconds before attempt `attempt` (1 is the first retry): uniform in [0, min(cap, base · 2^attempt)].

    Full jitter spreads clients that lost the same coordinator at the same moment (Brooker, "Exponential backoff and jitter", 2015).
    """
    return rng.uniform(0.0, min(CAP_S, BASE_S * 2.0 ** min(attempt, 32)))
