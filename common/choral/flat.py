"""A model's tensors, described: which of them make up the flat vector, and in which order."""

from __future__ import annotations

import torch
from torch import nn

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
