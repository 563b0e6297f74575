"""Masks: pseudo-random integers as many as the vector has, added block by block so that no mask is ever there as a whole.

A mask is the key stream of AES-128 in counter mode (NIST SP 800-38A, §6.5) from counter 0, read as little-endian integers. Each key
is for one mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from choral.secagg import wide
from choral.secagg.fixed_point import Ring
from choral.secagg.wide import Wide

KEY_BYTES = 16
_BLOCK_BYTES = 1 << 18  # stays in the cache while all masks are added to it
_AES_BYTES = 16
_ZEROS = bytes(_BLOCK_BYTES)


class Mask:
    """Σ stream(key) over the keys in `plus` minus that over those in `minus`, modulo 2^bits; taken from the beginning on."""

    def __init__(self, plus: Iterable[bytes], minus: Iterable[bytes]) -> None:
        self._plus = [_stream(key) for key in plus]
        self._minus = [_stream(key) for key in minus]
        self._buffer = bytearray(_BLOCK_BYTES + _AES_BYTES)

    def add_to(self, values: Ring) -> None:
        """Add the mask's next elements to `values`, in place. Whatever the lengths of the calls, the elements are the same."""
        per_block = _BLOCK_BYTES // values.itemsize
        for start in range(0, len(values), per_block):
            self._add(values[start : start + per_block])

    def add_to_wide(self, values: Wide) -> None:
        """The same to wide numbers."""
        per_block = _BLOCK_BYTES // wide.BYTES
        for start in range(0, len(values), per_block):
            block = values[start : start + per_block]
            for stream in self._plus:
                wide.add(block, self._next(stream, block.nbytes))
            for stream in self._minus:
                wide.subtract(block, self._next(stream, block.nbytes))

    def _next(self, stream: Any, size: int) -> Wide:
        stream.update_into(memoryview(_ZEROS)[:size], self._buffer)
        return np.frombuffer(self._buffer, dtype="<u8", count=size // 8).reshape(-1, wide.BITS // 64)

    def _add(self, block: Ring) -> None:
        size, mask = block.nbytes, np.frombuffer(self._buffer, dtype=block.dtype, count=len(block))
        zeros = _ZEROS if size == _BLOCK_BYTES else memoryview(_ZEROS)[:size]
        for stream in self._plus:
            stream.update_into(zeros, self._buffer)
            np.add(block, mask, out=block)
        for stream in self._minus:
            stream.update_into(zeros, self._buffer)
            np.subtract(block, mask, out=block)


def _stream(key: bytes) -> Any:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mask's key of {len(key)} bytes: it has {KEY_BYTES}")
    return Cipher(AES(key), CTR(bytes(_AES_BYTES))).encryptor()
