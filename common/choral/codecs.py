"""Updates in fewer bytes: pairs of encode and decode, block by block, so that nobody ever needs the whole vector.

An update is the flat float32 vector, cut into blocks of `BLOCK` elements, the last one shorter. A payload is its encoded blocks one
after the other; where their length depends on the values, each stands behind it: four bytes, little-endian, like all numbers here.

    float32      as it is, 4 bytes an element
    bf16         rounded to the nearest bfloat16, ties to even: 2 bytes an element
    int8         an integer from -127 to 127 an element, and a float32 scale for each `GROUP` of them
    topk:SHARE   of each block the share with the largest magnitudes, as bfloat16, and the gaps between them; the rest is zero
    …+zstd       any of them, its bytes by significance, through Zstandard (RFC 8878)
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from choral.errors import ConfigError, InvalidMessage

BLOCK = 1 << 18  # elements
GROUP = 256  # elements
MASKED = "masked"  # no codec of a vector: the name of results that are summed securely (`secagg.summand`)
LEAST_SHARE, LARGEST_SHARE = 0.0001, 0.5
Vector = NDArray[np.float32]
Rng = np.random.Generator

_LARGEST = 127  # of an int8, on both sides of zero
_TINY = float(np.finfo(np.float32).tiny)
_MORE = 255  # in the gaps: so far, and on
_LENGTH = struct.Struct("<I")
_LEVEL = 3
_WINDOW_BYTES = 1 << 23
_ROUNDING = 0x696E7438  # keeps the rounding's random numbers apart from others of the same seed


class Codec(Protocol):
    """Encodes one block `(n,)` of at most `BLOCK` elements, and decodes it."""

    @property
    def name(self) -> str:
        """With all that decoding needs; `parse` makes the codec of it."""

    @property
    def abilities(self) -> frozenset[str]:
        """What both sides must be able to do, of `abilities()`."""

    @property
    def item_bytes(self) -> int:
        """How many bytes of an encoded block belong together."""

    @property
    def fixed(self) -> bool:
        """Whether a block's length depends on nothing but the number of its elements."""

    @property
    def sparse(self) -> bool:
        """Whether it leaves out so much that what is left out must be sent later: see `encoded`."""

    def block_bytes(self, count: int) -> int:
        """The length of an encoded block of `count` elements; the largest, if it is not fixed."""

    def encode(self, values: Vector, rng: Rng) -> bytes:
        """The block's bytes; everything random comes from `rng`."""

    def decode(self, data: bytes | memoryview, count: int) -> Vector:
        """The block `(count,)`. Raises InvalidMessage: these bytes are none."""


@dataclass(frozen=True, slots=True)
class Float32:
    """The values as they are: the payload is the vector."""

    name: str = "float32"
    abilities: frozenset[str] = frozenset()
    item_bytes: int = 4
    fixed: bool = True
    sparse: bool = False

    def block_bytes(self, count: int) -> int:
        """Four bytes an element."""
        return 4 * count

    def encode(self, values: Vector, rng: Rng) -> bytes:
        """Little-endian."""
        return values.astype("<f4", copy=False).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Vector:
        """A view of `data` where numbers are little-endian."""
        _must_have(data, self.block_bytes(count), count)
        return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Bf16:
    """The upper half of each float32, rounded to nearest, ties to even: 8 bits of precision, the same range."""

    name: str = "bf16"
    abilities: frozenset[str] = frozenset({"bf16"})
    item_bytes: int = 2
    fixed: bool = True
    sparse: bool = False

    def block_bytes(self, count: int) -> int:
        """Two bytes an element."""
        return 2 * count

    def encode(self, values: Vector, rng: Rng) -> bytes:
        """The rounded halves."""
        return to_bf16(values).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Vector:
        """The halves with zeros behind them."""
        _must_have(data, self.block_bytes(count), count)
        return from_bf16(np.frombuffer(data, "<u2"))


@dataclass(frozen=True, slots=True)
class Int8:
    """⌊x/s + u⌋ with u uniform in [0, 1) and s = max|x|/127 of a group, the scales before the integers.

    Rounded up as often as x/s lies above the integer below it, so that the mean over the rounding is x (QSGD with the largest
    magnitude for the norm: Alistarh et al. 2017, NeurIPS, §3.1).
    """

    name: str = "int8"
    abilities: frozenset[str] = frozenset({"int8"})
    item_bytes: int = 1
    fixed: bool = True
    sparse: bool = False

    def block_bytes(self, count: int) -> int:
        """A byte an element and four a group."""
        return 4 * _groups(count) + count

    def encode(self, values: Vector, rng: Rng) -> bytes:
        """A group with an infinite or undefined value has such a scale, which `decode` refuses."""
        grouped = np.zeros((_groups(values.size), GROUP), dtype=np.float32)
        grouped.reshape(-1)[: values.size] = values
        scales = np.abs(grouped).max(axis=1) / np.float32(_LARGEST)
        usable = np.isfinite(scales) & (scales >= _TINY)
        scales[np.isfinite(scales) & ~usable] = 0.0
        with np.errstate(invalid="ignore", over="ignore"):
            np.divide(grouped, scales[:, None], out=grouped, where=usable[:, None])
        grouped[~usable] = 0.0
        grouped += rng.random(grouped.shape, dtype=np.float32)
        np.floor(grouped, out=grouped)
        np.clip(grouped, -_LARGEST, _LARGEST, out=grouped)
        integers = grouped.astype(np.int8).reshape(-1)[: values.size]
        return bytes(scales.astype("<f4", copy=False).tobytes() + integers.tobytes())

    def decode(self, data: bytes | memoryview, count: int) -> Vector:
        """Each integer times its group's scale. Raises InvalidMessage: a wrong length, or a scale that is no size."""
        _must_have(data, self.block_bytes(count), count)
        scales = np.frombuffer(data, "<f4", _groups(count)).astype(np.float32, copy=False)
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise InvalidMessage("a scale that is infinite, undefined or negative: lower the learning rate, or look at the data")
        values = np.zeros((scales.size, GROUP), dtype=np.float32)
        values.reshape(-1)[:count] = np.frombuffer(data, np.int8, offset=4 * scales.size)
        with np.errstate(over="ignore"):  # who checks the values finds the infinite ones
            values *= scales[:, None]
        return values.reshape(-1)[:count]


@dataclass(frozen=True, slots=True)
class TopK:
    """Of each block the `share` with the largest magnitudes (Aji & Heafield 2017, EMNLP), rounded to bfloat16.

    The values come first, in the order of their places, then the places: for each, how many elements are skipped since the last
    one, as bytes that are added up until one is not 255. So places can be nothing but strictly increasing.
    """

    share: float
    abilities: frozenset[str] = frozenset({"topk"})
    item_bytes: int = 1
    fixed: bool = False
    sparse: bool = True

    @property
    def name(self) -> str:
        """With the share."""
        return f"topk:{self.share!r}"

    def kept(self, count: int) -> int:
        """How many of `count` elements are sent."""
        return math.ceil(self.share * count)

    def block_bytes(self, count: int) -> int:
        """Two bytes a value, one a gap, and one for each 255 elements skipped at once."""
        kept = self.kept(count)
        return 3 * kept + (count - kept) // _MORE

    def encode(self, values: Vector, rng: Rng) -> bytes:
        """An undefined value counts as the largest: it is sent, and refused where it arrives."""
        kept = self.kept(values.size)
        places = np.argpartition(np.abs(values), values.size - kept)[values.size - kept :]
        places.sort()
        gaps = np.diff(places, prepend=-1) - 1
        more, rest = np.divmod(gaps, _MORE)
        ends = np.cumsum(more + 1) - 1
        told = np.full(ends[-1] + 1, _MORE, dtype=np.uint8)
        told[ends] = rest
        return to_bf16(values[places]).tobytes() + told.tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Vector:
        """Zeros but at the places told. Raises InvalidMessage: a wrong length or number of places, or one that is not there."""
        kept = self.kept(count)
        if not 3 * kept <= len(data) <= self.block_bytes(count):
            raise InvalidMessage(
                f"{len(data)} bytes for {kept} of {count} elements; there are {3 * kept} to {self.block_bytes(count)}"
            )
        told = np.frombuffer(data, np.uint8, offset=2 * kept)
        ends = np.flatnonzero(told != _MORE)
        if ends.size != kept or told[-1] == _MORE:
            raise InvalidMessage(f"the places of {ends.size} elements, where {kept} are sent")
        places = np.cumsum(told, dtype=np.int64)[ends] + np.arange(kept)
        if places[-1] >= count:
            raise InvalidMessage(f"a value at place {places[-1]} of a block that has {count}")
        values = np.zeros(count, dtype=np.float32)
        values[places] = from_bf16(np.frombuffer(data, "<u2", kept))
        return values


@dataclass(frozen=True, slots=True)
class Zstd:
    """What `inner` makes, compressed: first the first byte of each item, then the second, …, so that alike stand together."""

    inner: Codec
    item_bytes: int = 1
    fixed: bool = False

    @property
    def name(self) -> str:
        """Behind that of the inner one."""
        return f"{self.inner.name}+zstd"

    @property
    def abilities(self) -> frozenset[str]:
        """And those of the inner one."""
        return self.inner.abilities | {"zstd"}

    @property
    def sparse(self) -> bool:
        """As the inner one."""
        return self.inner.sparse

    def block_bytes(self, count: int) -> int:
        """A little more than the inner one: what cannot be compressed is stored."""
        inner = self.inner.block_bytes(count)
        return inner + (inner >> 8) + (max(0, (128 << 10) - inner) >> 11) + 16

    def encode(self, values: Vector, rng: Rng) -> bytes:
        """One frame that tells its content's size."""
        return compressed(np.frombuffer(self.inner.encode(values, rng), np.uint8), self.inner.item_bytes)

    def decode(self, data: bytes | memoryview, count: int) -> Vector:
        """Raises InvalidMessage: it is no frame, or says that it holds, or holds, more than the inner one can have made."""
        most, item_bytes = self.inner.block_bytes(count), self.inner.item_bytes
        return self.inner.decode(decompressed(data, most, item_bytes, exactly=self.inner.fixed), count)


FLOAT32 = Float32()
_PLAIN: dict[str, Codec] = {"": FLOAT32, "float32": FLOAT32, "bf16": Bf16(), "int8": Int8()}


def parse(name: str) -> Codec:
    """The codec of that name; "" is float32. Raises InvalidMessage: this release does not know it."""
    base, plus, wrapped = name.partition("+")
    codec = _PLAIN.get(base)
    if codec is None and re.fullmatch(r"topk:0\.[0-9]{1,17}", base):
        share = float(base.removeprefix("topk:"))
        codec = TopK(share) if LEAST_SHARE <= share <= LARGEST_SHARE else None
    if codec is None or (plus and (wrapped != "zstd" or not base)):
        raise InvalidMessage(f"codec {name[:80]!r} is unknown to this release: update Choral on this side")
    return Zstd(codec) if plus else codec


def abilities() -> tuple[str, ...]:
    """What this side can encode and decode beyond float32."""
    return ("bf16", "int8", "topk", *(["zstd"] if importlib.util.find_spec("zstandard") is not None else []))


def negotiated(wanted: Codec, offered: Collection[str]) -> Codec:
    """What a side with these abilities is asked for: the codec wanted, that without zstd, or float32."""
    candidates = (wanted, wanted.inner if isinstance(wanted, Zstd) else FLOAT32, FLOAT32)
    return next(codec for codec in candidates if codec.abilities.issubset(offered))


# Vectors, block by block


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many bytes a payload may have."""

    least: int
    most: int

    def __contains__(self, length: int) -> bool:
        return self.least <= length <= self.most

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least} to {self.most}"


def counts(size: int) -> Iterator[int]:
    """The lengths of the blocks of a vector of `size` elements."""
    return (min(BLOCK, size - start) for start in range(0, size, BLOCK))


def blocks(vector: Vector) -> Iterator[Vector]:
    """The blocks of a vector, as views of it."""
    return (vector[start : start + BLOCK] for start in range(0, vector.size, BLOCK))


def payload_bytes(codec: Codec, size: int) -> Lengths:
    """The length of a payload for a vector of `size` elements."""
    full, rest = divmod(size, BLOCK)
    most = full * codec.block_bytes(BLOCK) + (codec.block_bytes(rest) if rest else 0)
    if codec.fixed:
        return Lengths(most, most)
    number = full + (rest > 0)
    return Lengths(number * (_LENGTH.size + 1), most + number * _LENGTH.size)


def rng_of(seed: int) -> Rng:
    """The random numbers of an encoder; `seed` is the plan's, of at most 64 bits."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _ROUNDING])))


def encoded(values: Iterable[Vector], codec: Codec, rng: Rng) -> Iterator[bytes]:
    """The payload of a vector that comes in blocks, an encoded block at a time."""
    return (_framed(codec, codec.encode(block, rng)) for block in values)


def encoded_with_feedback(
    values: Iterable[Vector], codec: Codec, rng: Rng, residual: Iterable[Vector], keep: Callable[[Vector], object]
) -> Iterator[bytes]:
    """The same, of values + residual; `keep` gets, block by block, what of that is not sent, the next round's residual.

    Error feedback (Seide et al. 2014, Interspeech, §3; Karimireddy et al. 2019, ICML, algorithm 2): what a codec leaves out of one
    update is added to the next, so that nothing is lost. What was decoded and what is kept make up values + residual to the bit.
    """
    for block, before in zip(values, residual, strict=True):
        corrected = block + before
        data = codec.encode(corrected, rng)
        keep(corrected - codec.decode(data, corrected.size))
        yield _framed(codec, data)


def decoded(read: Callable[[int], bytes], codec: Codec, size: int) -> Iterator[Vector]:
    """The blocks of a vector of `size` elements from its payload; `read(n)` gives the next `n` bytes, fewer only at the end.

    Raises InvalidMessage: the payload is shorter or longer, or is none.
    """
    for count in counts(size):
        length = codec.block_bytes(count)
        if not codec.fixed:
            prefix = read(_LENGTH.size)
            told = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
            if not 0 < told <= length:
                raise InvalidMessage(f"a block of {told} bytes, where at most {length} can stand for {count} elements")
            length = told
        data = read(length)
        if len(data) != length:
            raise InvalidMessage(f"the payload ends {length - len(data)} bytes early")
        yield codec.decode(data, count)
    if read(1):
        raise InvalidMessage("the payload goes on behind its last block")


def _framed(codec: Codec, data: bytes) -> bytes:
    return data if codec.fixed else _LENGTH.pack(len(data)) + data


# Numbers


def to_bf16(values: Vector) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; an undefined value stays one."""
    bits = values.astype("<f4", copy=False).view("<u4")
    rounded: NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
    undefined = np.isnan(values)
    if undefined.any():
        rounded[undefined] = 0x7FC0
    return rounded


def from_bf16(halves: NDArray[np.uint16]) -> Vector:
    """Exactly."""
    return (halves.astype("<u4") << 16).view("<f4").astype(np.float32, copy=False)


def _groups(count: int) -> int:
    return -(-count // GROUP)


def _must_have(data: bytes | memoryview, length: int, count: int) -> None:
    if len(data) != length:
        raise InvalidMessage(f"{len(data)} bytes for {count} elements; there must be {length}")


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError("zstd needs the package zstandard: pip install 'choral[compression]'") from error
    return zstandard


def compressed(content: NDArray[np.uint8], item_bytes: int) -> bytes:
    """One Zstandard frame that tells its content's size: the first byte of each item, then the second, …"""
    planes = content.reshape(-1, item_bytes).T.tobytes()
    return bytes(_zstandard().ZstdCompressor(level=_LEVEL).compress(planes))


def decompressed(data: bytes | memoryview, most: int, item_bytes: int, *, exactly: bool) -> bytes:
    """The inverse, if it gives at most `most` bytes, or just as many, as the frame must say itself. Raises InvalidMessage."""
    zstandard = _zstandard()
    try:
        told = zstandard.frame_content_size(data)  # the library would make room for whatever the frame says
        if told != most if exactly else not 0 < told <= most:
            raise InvalidMessage(f"a Zstandard frame of {told if told >= 0 else 'unknown'} bytes, where {most} are expected")
        content: bytes = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InvalidMessage(f"no Zstandard frame ({str(error)[:100]})") from error
    if len(content) != told:
        raise InvalidMessage(f"a Zstandard frame of {len(content)} bytes that says that it holds {told}")
    return np.frombuffer(content, np.uint8).reshape(item_bytes, -1).T.tobytes()
