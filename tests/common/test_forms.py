from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
import torch
from choral import Standardize
from choral.codecs import BLOCK
from choral.errors import InvalidMessage
from choral.flat import describe
from choral.forms import difference, halved, patched, restored, rounded_names
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

NAMES = frozenset({"weights", "bias"})


def state(seed: int = 0, step: float = 0.0, size: int = 1001) -> dict[str, Tensor]:
    """One of each kind; `step` is how far it has been trained."""
    random = torch.Generator().manual_seed(seed)
    return {
        "weights": torch.randn(size, generator=random) + step * torch.randn(size, generator=random),
        "bias": torch.full((3,), 1 / 3),
        "mean": torch.full((3,), 1e6 + 1 / 3),
        "half": torch.ones(5, dtype=torch.float16),
        "count": torch.arange(3, dtype=torch.int64),
        "flags": torch.ones(7, dtype=torch.uint8),
        "none": torch.zeros(0),
    }


def version(number: int, **changes: float) -> bytes:
    return save(state(**changes), {"choral": json.dumps({"version": number})})  # type: ignore[arg-type]


def to_bf16(content: bytes) -> bytes:
    return b"".join(halved(io.BytesIO(content), NAMES))


def from_bf16(form: bytes) -> bytes:
    return b"".join(restored(io.BytesIO(form), NAMES))


def to_delta(content: bytes, base: bytes) -> bytes:
    return b"".join(difference(io.BytesIO(content), io.BytesIO(base)))


def from_delta(form: bytes, base: bytes) -> bytes:
    return b"".join(patched(io.BytesIO(form), io.BytesIO(base)))


@pytest.mark.parametrize("size", [1, 1001, BLOCK + 1])
def test_bf16_rounds_what_is_averaged_and_nothing_else(size: int) -> None:
    whole = version(3, size=size)
    form = to_bf16(whole)
    assert len(form) == len(whole) - 2 * (size + 3)
    made = from_bf16(form)
    assert len(made) == len(whole)
    assert from_bf16(to_bf16(made)) == made
    for name, tensor in load(made).items():
        before = state(size=size)[name]
        assert torch.equal(tensor, before.to(torch.bfloat16).to(before.dtype) if name in NAMES else before)


@pytest.mark.parametrize("size", [1, 1001, BLOCK + 1])
@pytest.mark.parametrize("step", [0.0, 1e-4, 1.0])
def test_a_delta_loses_no_bit(size: int, step: float) -> None:
    base, whole = version(9, size=size), version(10, size=size, step=step)
    assert from_delta(to_delta(whole, base), base) == whole


def test_a_delta_is_the_shorter_the_closer_versions_are() -> None:
    base = version(9, size=100_000)
    lengths = [len(to_delta(version(10, size=100_000, step=step), base)) / len(base) for step in (1e-1, 1e-3, 1e-5, 0.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[1] < 0.75
    assert lengths[-1] < 0.02


@given(before=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_delta_of_any_words(before: list[int], seed: int) -> None:
    after = np.random.default_rng(seed).integers(0, 2**32, len(before), dtype=np.uint32)
    files = [save({"w": torch.from_numpy(np.array(words, np.uint32).view(np.int32).copy())}) for words in (before, after)]
    assert from_delta(to_delta(files[1], files[0]), files[0]) == files[1]


def test_which_tensors_are_rounded() -> None:
    """Not the means and deviations, of which all may be in the digits that rounding takes; nor what has two bytes already."""
    model = nn.Sequential(Standardize(3), nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1).half())
    names = {"1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean", "2.running_var"}
    assert rounded_names(describe(model)) == names


# Hostile bytes


def file_of(header: object, data: bytes = b"") -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**63) + b"{}",
        file_of(b"[" * 50_000),
        file_of(b"\xff\xfe"),
        file_of([1, 2]),
        file_of({"a": 5}),
        file_of({"a": {"dtype": "F32", "data_offsets": [0]}}),
        file_of({"a": {"dtype": "F32", "data_offsets": [0, 2**60]}}),
        file_of({"a": {"dtype": "F32", "data_offsets": [4, 8]}}, bytes(8)),
        file_of({"a": {"dtype": "F32", "data_offsets": [0, -4]}}),
        file_of({"a": {"dtype": "F32", "data_offsets": [0, 4.0]}}, bytes(4)),
        file_of({"weights": {"dtype": "F32", "data_offsets": [0, 3]}}, bytes(3)),
        file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}, "b": {"dtype": "F32", "data_offsets": [2, 6]}}, bytes(8)),
        to_bf16(version(1)) + b"x",
        to_bf16(version(1))[:-1],
        to_delta(version(1), version(0)) + b"x",
        to_delta(version(1), version(0))[:-1],
    ],
)
def test_what_is_no_form_is_refused(form: bytes) -> None:
    with pytest.raises(InvalidMessage):
        from_bf16(form)
    with pytest.raises(InvalidMessage):
        from_delta(form, version(0))


def test_a_delta_to_another_model_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="bytes of tensors, and "):
        from_delta(to_delta(version(1), version(0)), version(0, size=7))
    with pytest.raises(InvalidMessage, match="fetch the whole"):
        to_delta(version(1), version(0, size=7))
