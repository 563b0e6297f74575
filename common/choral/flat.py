"""A model's state dict as one flat float32 vector, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from choral.errors import TaskError
from choral.manifest import Entry, EntryKind, Manifest
from choral.standardize import Standardize

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_COUNTERS = ("I", "U", "BOOL")


def describe(model: nn.Module) -> Manifest:
    """The manifest of a model. Raises TaskError: a tensor has a type that cannot be sent, or nothing can be averaged."""
    statistics = {
        f"{prefix}.{buffer}".removeprefix(".")
        for prefix, module in model.named_modules()
        if isinstance(module, Standardize)
        for buffer in ("mean", "scale")
    }
    entries: list[Entry] = []
    offset = 0
    for name, tensor in model.state_dict().items():
        if tensor.dtype not in DTYPES:
            raise TaskError(f"tensor {name!r} of the model is {tensor.dtype}; allowed are {', '.join(map(str, DTYPES))}")
        dtype = DTYPES[tensor.dtype]
        kind = EntryKind.COUNTER if dtype.startswith(_COUNTERS) else EntryKind.AVERAGED
        kind = EntryKind.STATISTIC if name in statistics else kind
        averaged = kind is EntryKind.AVERAGED
        entries.append(Entry(name, dtype, tuple(tensor.shape), offset if averaged else 0, kind))
        offset += tensor.numel() if averaged else 0
    if offset == 0:
        raise TaskError("the model has no floating-point parameters or buffers: there is nothing to average")
    return Manifest(tuple(entries))


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
