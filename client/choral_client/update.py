"""The update: how far the work has moved the model from the checkpoint that it started from, a block at a time.

Nothing here is as large as the model. The checkpoint is read again from its file, which the system still has in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BufferedIOBase

import numpy as np
import torch
from choral.manifest import Manifest
from numpy.typing import NDArray
from torch import Tensor

from choral_client.checkpoint import Place

BLOCK = 1 << 18  # elements


def moved(
    state: Mapping[str, Tensor], manifest: Manifest, places: Mapping[str, Place], checkpoint: BufferedIOBase
) -> Iterator[NDArray[np.float32]]:
    """The change of the flat vector `(manifest.size,)`, float32, in blocks of `BLOCK` elements, of which the last may be shorter.

    A block is valid until the next one is asked for.
    """
    block, filled = np.empty(min(BLOCK, manifest.size), dtype=np.float32), 0
    into = torch.from_numpy(block)
    for entry in manifest.averaged:
        now, before, start = state[entry.name].detach().reshape(-1), places[entry.name], 0
        while start < entry.size:
            stop = min(entry.size, start + len(block) - filled)
            part = into[filled : filled + stop - start]
            part.copy_(now[start:stop])
            part.sub_(before.block(checkpoint, start, stop).to(torch.float32))
            filled, start = filled + stop - start, stop
            if filled == len(block):
                yield block
                filled = 0
    if filled:
        yield block[:filled]
