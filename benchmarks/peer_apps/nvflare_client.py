"""The empty work of an NVFlare client: every number is changed, and nothing is trained. It works with NumPy."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import nvflare.client as flare

if os.environ.get("CHORAL_PEER_TORCH"):
    import torch  # noqa: F401 - as users do who train with it

NOISE = 1 << 20


def main() -> None:
    """Take part until the job is over; the first site tells in a file when each model has come."""
    flare.init()
    first = flare.get_site_name() == "site-1"
    times = Path(os.environ["CHORAL_PEER_TIMES"])
    random = np.random.default_rng(os.getpid())
    noise = None
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        if first:
            with times.open("a") as file:
                file.write(f"{time.time()}\n")
        ((name, weights),) = model.params.items()
        if noise is None:
            noise = random.standard_normal(min(NOISE, weights.size), dtype=np.float32) * np.float32(0.001)
        scale = np.float32(0.5 + random.random())
        changed = np.array(weights, dtype=np.float32)
        for start in range(0, changed.size, NOISE):
            piece = changed[start : start + NOISE]
            piece += scale * noise[: piece.size]
        flare.send(flare.FLModel(params={name: changed}, metrics={"accuracy": 0.0}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main()
