"""Against torch's own casts, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from choral.elements import ITEM_BYTES, decode, encode
from choral.flat import DTYPES
from hypothesis import given
from hypothesis import strategies as st

FLOATS = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_every_type_that_can_be_sent_has_its_size() -> None:
    assert {name: dtype.itemsize for dtype, name in DTYPES.items()} == ITEM_BYTES


@pytest.mark.parametrize("name", FLOATS)
@given(patterns=st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_float32_becomes_any_type_as_in_torch(name: str, patterns: list[int]) -> None:
    """All bit patterns: the subnormal, those half-way between two, and the infinite; of NaN only that it stays one."""
    values = np.array(patterns, np.uint32).view(np.float32)
    ours = torch.frombuffer(bytearray(encode(values, name)) or bytearray(8), dtype=FLOATS[name])[: len(patterns)]
    theirs = torch.from_numpy(values).to(FLOATS[name])
    number = ~theirs.isnan()
    assert torch.equal(ours.isnan(), ~number)
    assert _bytes(ours[number]) == _bytes(theirs[number])


@pytest.mark.parametrize("name", FLOATS)
@given(patterns=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=4, max_size=40))
def test_any_type_becomes_float32_as_in_torch(name: str, patterns: list[int]) -> None:
    whole = len(patterns) // 4 * 4
    tensor = torch.tensor(patterns[:whole], dtype=torch.int16).view(FLOATS[name])
    ours, theirs = torch.from_numpy(decode(_bytes(tensor), name).copy()), tensor.float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert _bytes(ours[~ours.isnan()]) == _bytes(theirs[~theirs.isnan()])


@pytest.mark.parametrize("name", FLOATS)
@given(values=st.lists(st.floats(allow_nan=False), max_size=20))
def test_float64_becomes_any_type_as_in_torch(name: str, values: list[float]) -> None:
    """As the statistics of features do, which are measured as float64."""
    double = np.array(values, np.float64)
    assert bytes(encode(double, name)) == _bytes(torch.from_numpy(double).to(FLOATS[name]))


def test_halfway_goes_to_even() -> None:
    # bfloat16 has 7 bits behind the point: 1 + 2^-8 is half-way between 1 and 1 + 2^-7, 1 + 3·2^-8 between that and 1 + 2^-6
    halfway = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float32)
    assert decode(encode(halfway, "BF16"), "BF16").tolist() == [1.0, 1 + 2.0**-6]
