"""A tensor's elements as they lie in a safetensors file, as float32 and back: the same bits as torch's casts, without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Size of one element by dtype, as safetensors writes dtypes."""

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def decode(content: Buffer, dtype: str) -> NDArray[np.float32]:
    """Elements of a floating-point dtype as float32 `(n,)`; for F32 a view of `content`."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(content, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    with np.errstate(over="ignore"):  # F64 out of float32's range is infinite, as in torch
        return np.frombuffer(content, _FLOATS[dtype]).astype(np.float32, copy=False)


def encode(values: NDArray[np.floating], dtype: str) -> memoryview:
    """The inverse: each element cast to `dtype`, to the nearest and to even between two; other than F64 by way of float32."""
    if dtype == "F64":
        return _bytes(values.astype("<f8", copy=False))
    with np.errstate(over="ignore"):  # what is too large is infinite, as in torch
        single = values.astype("<f4", copy=False)
        return _bytes(_rounded(single) if dtype == "BF16" else single.astype(_FLOATS[dtype], copy=False))


def _rounded(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves, rounded to nearest even; what is not a number stays so, where the carry could make it infinite."""
    bits = np.ascontiguousarray(single).view("<u4")
    upper = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    return np.where(np.isnan(single), np.uint16(0x7FC0), upper)


def _bytes(array: NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
