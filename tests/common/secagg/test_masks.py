"""Masks: what they are, that they cancel, and that they look like nothing."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from choral.secagg.masks import KEY_BYTES, Mask
from hypothesis import given
from hypothesis import strategies as st

# AES-128 in counter mode from 0 under a key of zeros: the encryptions of 0 and 1 (FIPS 197; as any AES gives them)
ZERO_KEY_STREAM = bytes.fromhex("66e94bd4ef8a2c3b884cfa59ca342b2e58e2fccefa7e3061367f1d57a4e7455a")


def masked(values: np.ndarray[Any, Any], plus: list[bytes], minus: list[bytes]) -> np.ndarray[Any, Any]:
    masked = values.copy()
    Mask(plus, minus).add_to(masked)
    return masked


def test_a_mask_is_the_key_stream_of_aes_in_counter_mode() -> None:
    values = np.zeros(8, dtype="<u4")
    assert masked(values, [bytes(16)], []).tobytes() == ZERO_KEY_STREAM


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("size", [0, 1, 3, 65_535, 65_536, 200_001])
def test_masks_of_both_signs_cancel(dtype: str, size: int) -> None:
    values = np.frombuffer(os.urandom(size * np.dtype(dtype).itemsize), dtype=dtype)
    keys = [os.urandom(KEY_BYTES) for _ in range(3)]
    once = masked(values, keys[:2], keys[2:])
    assert size == 0 or not np.array_equal(once, values)
    assert np.array_equal(masked(once, keys[2:], keys[:2]), values)


@given(st.lists(st.integers(0, 100_000), max_size=6), st.sampled_from(["<u4", "<u8"]))
def test_the_mask_is_the_same_however_the_vector_is_cut(cuts: list[int], dtype: str) -> None:
    keys = [bytes([n]) * KEY_BYTES for n in range(2)]
    size = 100_000
    whole, pieces = np.zeros(size, dtype=dtype), np.zeros(size, dtype=dtype)
    Mask(keys, []).add_to(whole)
    mask = Mask(keys, [])
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), size], strict=True):
        mask.add_to(pieces[start:stop])
    assert np.array_equal(whole, pieces)


def test_what_is_masked_is_spread_evenly_over_the_ring() -> None:
    """χ² of the 256 values of each of the four bytes, which is 255 ± 22.6; beyond 400 once in ten million times."""
    values = masked(np.zeros(1 << 20, dtype="<u4"), [os.urandom(KEY_BYTES)], [])
    for place in range(4):
        counts = np.bincount((values >> np.uint32(8 * place)).astype(np.uint8), minlength=256)
        expected = values.size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400


def test_another_key_is_another_mask() -> None:
    zeros = np.zeros(4, dtype="<u4")
    assert not np.array_equal(masked(zeros, [bytes(16)], []), masked(zeros, [bytes(15) + b"\x01"], []))


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask's key of 4 bytes: it has 16"):  # 32 bits can be tried
        Mask([bytes(4)], [])
