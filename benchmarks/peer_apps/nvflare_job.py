"""Starts an NVFlare deployment on this machine (PocEnv: mTLS, a process each) and runs the empty work on it.

    python nvflare_job.py PARAMS CLIENTS ROUNDS FOLDER

The workspace is NVFLARE_POC_WORKSPACE. When the services are started, that is written to FOLDER/launched.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import poc_env


def noting(start: Callable[..., Any], note: Path) -> Callable[..., Any]:
    """What starts the services, and tells when: keys and certificates, made once in a federation's life, are no launch."""

    def started(*args: Any, **kwargs: Any) -> Any:
        note.write_text(str(time.time()))
        return start(*args, **kwargs)

    return started


def main() -> None:
    """Run it to its end."""
    params, clients, rounds = map(int, sys.argv[1:4])
    folder = Path(sys.argv[4]).resolve()
    poc_env._start_poc = noting(poc_env._start_poc, folder / "launched")
    np.save(folder / "initial.npy", np.zeros(params, dtype=np.float32))
    recipe = NumpyFedAvgRecipe(
        name="empty",
        initial_ckpt=str(folder / "initial.npy"),
        min_clients=clients,
        num_rounds=rounds,
        train_script=str(Path(__file__).resolve().parent / "nvflare_client.py"),
    )
    run = recipe.execute(poc_env.PocEnv(num_clients=clients))
    print(run.get_status())
    print(run.get_result())


if __name__ == "__main__":
    main()
