"""A client that lies: the ordinary one, which attends, trains, masks and uploads, but for what it contributes to the sum.

    python -m liars ATTACK client …    as choral client …

What binds an honest client does not bind it: it does not shorten its update to run.max_update_norm. A multiple is still cut off at
the clip: beyond it an entry could not be told from one of the other sign.
"""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from choral.metrics import Metric
from choral.plan import SecurePlan
from choral.secagg.summand import Layout, Summand
from choral_client import contribution
from choral_client.contribution import Blocks

_honest = contribution.of_update


def times(
    factor: float, blocks: Blocks, layout: Layout, secure: SecurePlan, examples: int, held_out: tuple[Metric, ...]
) -> Summand:
    """The update multiplied by `factor`."""
    return _honest(lambda: (block * np.float32(factor) for block in blocks()), layout, _unbound(secure), examples, held_out)


def garbage(blocks: Blocks, layout: Layout, secure: SecurePlan, examples: int, held_out: tuple[Metric, ...]) -> Summand:
    """Random integers of the ring where the update would be; the numbers behind it are honest, and so give nothing away."""
    said = _honest(blocks, layout, _unbound(secure), examples, held_out)
    return replace(said, vector=np.frombuffer(bytearray(os.urandom(said.vector.nbytes)), said.vector.dtype))


def _unbound(secure: SecurePlan) -> SecurePlan:
    return replace(secure, max_norm=0.0)


ATTACKS: dict[str, Any] = {"times -10": partial(times, -10.0), "times -100": partial(times, -100.0), "garbage": garbage}
"""by name, what stands in for `contribution.of_update`"""


def main() -> None:
    """Alter the software, then become it."""
    contribution.of_update = ATTACKS[sys.argv.pop(1)]
    runpy.run_module("choral_deploy.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
