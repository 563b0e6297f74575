"""What was made small: updates, as a coordinator decodes them, and forms of a version, as a client does."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
import zstandard
from choral import codecs
from choral.errors import InvalidMessage
from choral.forms import difference, halved, patched, restored
from fuzz.target import Target, in_memory
from safetensors.torch import save

SIZE = codecs.BLOCK + 300  # a whole block and a piece of one
FEW = 700
NAMES = ("float32", "bf16", "int8", "topk:0.01", "float32+zstd", "bf16+zstd", "int8+zstd", "topk:0.01+zstd")


def decode_as(name: str) -> Callable[[bytes], None]:
    """As a payload of a vector of either length."""
    codec = codecs.parse(name)

    def decode(data: bytes) -> None:
        size = SIZE if len(data) > codecs.payload_bytes(codec, FEW).most else FEW
        decoded = 0
        for block in codecs.decoded(io.BytesIO(data).read, codec, size):
            assert block.dtype == np.float32
            decoded += block.size
        assert decoded == size

    return decode


def seeds_of(name: str) -> Callable[[], Sequence[bytes]]:
    """Payloads of both lengths."""
    codec = codecs.parse(name)

    def seeds() -> list[bytes]:
        vectors = (np.random.default_rng(0).normal(size=size).astype(np.float32) for size in (FEW, FEW, SIZE))
        return [b"".join(codecs.encoded(codecs.blocks(vector), codec, codecs.rng_of(0))) for vector in vectors]

    return seeds


def hostile_of(name: str) -> Callable[[], Sequence[bytes]]:
    """Lengths and contents that are not true."""
    wrapped = name.endswith("+zstd")
    frames = [
        zstandard.compress(bytes(1 << 28)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24)),
        zstandard.compress(zstandard.compress(bytes(1 << 24))),
        b"\x28\xb5\x2f\xfd" + b"\xff" * 60,
    ]
    lengths = (0, 1, 2**31, 2**32 - 1)
    framed = [len(frame).to_bytes(4, "little") + frame for frame in frames] if wrapped else []
    return lambda: [
        b"",
        b"\xff" * 4 * FEW,
        bytes(4 * FEW),
        b"\xff" * 3000,
        *framed,
        *(length.to_bytes(4, "little") + bytes(50) for length in lengths),
    ]


def name_decoded(data: bytes) -> None:
    """A codec's name, as the other side tells it."""
    name = data.decode("utf-8", "replace")
    assert codecs.parse(name).name == name or not name or name.startswith("topk:")


BASE, NEXT = (save({"w": torch.linspace(-1, 1, 500) + step, "n": torch.arange(3)}) for step in (0.0, 1e-3))


def from_bf16(data: bytes) -> None:
    """A version's file from the form bf16."""
    assert sum(map(len, restored(io.BytesIO(data), {"w"}))) <= 2 * len(data)


def from_delta(data: bytes) -> None:
    """A version's file from the form delta, for a client that has a base."""
    assert sum(map(len, patched(io.BytesIO(data), io.BytesIO(BASE)))) <= len(data) + len(BASE)


def headers_hostile() -> list[bytes]:
    """Headers of tensors that cannot be."""
    entries: list[object] = [5, [], {}, {"dtype": "F32"}, {"dtype": [], "data_offsets": [0, 4]}]
    offsets: list[object] = [[0], [0, 2**70], [0, "4"], [4, 0], [0, True], {"a": 1}, [[0], [4]], None]
    entries += [{"dtype": "F32", "data_offsets": told} for told in offsets]
    headers = [json.dumps({"w": entry}).encode() for entry in entries]
    headers += [b"[" * 60_000, b"[]", b"null", b"5", b'{"w": ' * 20_000, b"\xff"]
    return [len(header).to_bytes(8, "little") + header + bytes(16) for header in headers] + [b"\xff" * 8, b"\xff" * 7 + b"\x7f{}"]


TARGETS = [
    Target(
        "version as bf16",
        in_memory(from_bf16),
        lambda: [b"".join(halved(io.BytesIO(NEXT), {"w"}))],
        (InvalidMessage,),
        (b'"data_offsets":[', b'"dtype":"F32"'),
        memory_bytes=16 << 20,
        told=400,
        hostile=headers_hostile,
    ),
    Target(
        "version as delta",
        in_memory(from_delta),
        lambda: [b"".join(difference(io.BytesIO(NEXT), io.BytesIO(BASE)))],
        (InvalidMessage,),
        (b'"data_offsets":[', b"\x28\xb5\x2f\xfd"),
        memory_bytes=16 << 20,
        told=400,
        hostile=headers_hostile,
    ),
    *(
        Target(
            f"payload as {name}",
            in_memory(decode_as(name)),
            seeds_of(name),
            (InvalidMessage,),
            (b"\x28\xb5\x2f\xfd",) if name.endswith("+zstd") else (),
            memory_bytes=16 << 20,
            told=300,
            hostile=hostile_of(name),
        )
        for name in NAMES
    ),
    Target(
        "name of a codec",
        in_memory(name_decoded),
        lambda: [name.encode() for name in NAMES],
        (InvalidMessage,),
        (b"+zstd", b"topk:0."),
        told=300,
        hostile=lambda: [b"topk:0." + b"0" * 10_000, b"topk:0.00000000000000001", b"+" * 1000],
    ),
]
