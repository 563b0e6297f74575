"""A state dict as one flat vector, and back, by torch: what the coordinator and the client do block by block in files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from choral.manifest import Manifest
from numpy.typing import NDArray
from torch import Tensor


def flatten(state: Mapping[str, Tensor], manifest: Manifest) -> NDArray[np.float32]:
    """The averaged entries of a state dict as a new vector `(manifest.size,)`."""
    flat = np.empty(manifest.size, dtype=np.float32)
    view = torch.from_numpy(flat)
    for entry in manifest.averaged:
        view[entry.offset : entry.offset + entry.size].copy_(state[entry.name].detach().reshape(-1))
    return flat


def unflatten(flat: NDArray[np.float32], state: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """A new state dict: averaged entries from `flat`, cast to their own types; all others as they are in `state`."""
    view = torch.from_numpy(flat)
    new = dict(state)
    for entry in manifest.averaged:
        like = state[entry.name]
        new[entry.name] = view[entry.offset : entry.offset + entry.size].reshape(entry.shape).to(like.dtype, copy=True)
    return new
