from __future__ import annotations

import importlib.util
import io
import struct
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import zstandard
from choral import codecs
from choral.codecs import BLOCK, FLOAT32, GROUP, Codec, Lengths, TopK, Vector, Zstd, parse, payload_bytes
from choral.errors import ConfigError, InvalidMessage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

PLAIN = ("float32", "bf16", "int8", "topk:0.1", "topk:0.5")
NAMES = (*PLAIN, *(f"{name}+zstd" for name in PLAIN))
VECTORS = npst.arrays(np.float32, st.integers(1, 700), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def encoded(values: Vector, codec: Codec, seed: int = 1) -> bytes:
    return b"".join(codecs.encoded(codecs.blocks(values), codec, codecs.rng_of(seed)))


def decoded(payload: bytes, codec: Codec, size: int) -> Vector:
    return np.concatenate(list(codecs.decoded(io.BytesIO(payload).read, codec, size)))


def there_and_back(values: Vector, name: str, seed: int = 1) -> Vector:
    codec = parse(name)
    return decoded(encoded(values, codec, seed), codec, values.size)


def normal(size: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


# There and back


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_made_of_its_name(name: str) -> None:
    assert parse(name).name == name


@pytest.mark.parametrize("name", NAMES)
@given(values=VECTORS)
@settings(max_examples=50, deadline=None)
def test_every_payload_is_as_long_as_it_may_be_and_comes_back_whole(name: str, values: Vector) -> None:
    codec = parse(name)
    payload = encoded(values, codec)
    assert len(payload) in payload_bytes(codec, values.size)
    back = decoded(payload, codec, values.size)
    assert (back.shape, back.dtype) == (values.shape, np.float32)
    assert encoded(values, codec) == payload  # from the same seed


@given(values=VECTORS)
def test_float32_is_the_vector(values: Vector) -> None:
    assert encoded(values, FLOAT32) == values.astype("<f4").tobytes()
    assert np.array_equal(there_and_back(values, "float32"), values)


@given(values=VECTORS)
def test_bf16_is_off_by_at_most_half_a_step(values: Vector) -> None:
    back = there_and_back(values, "bf16")
    assert (np.abs(back - values) <= np.maximum(np.abs(values) * 2.0**-8, 2.0**-133)).all()


def test_bf16_rounds_ties_to_even_and_keeps_what_is_not_finite() -> None:
    steps = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, -1 - 2**-8, np.inf, -np.inf, 3.4e38], np.float32)
    expected = np.array([1, 1 + 2**-6, 1 + 2**-7, -1, np.inf, -np.inf, np.inf], np.float32)
    assert np.array_equal(there_and_back(steps, "bf16"), expected)
    payloads = np.array([0x7FC00000, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(there_and_back(payloads, "bf16")).all()


@given(values=VECTORS)
def test_int8_is_off_by_less_than_a_step_of_its_group(values: Vector) -> None:
    back = there_and_back(values, "int8").astype(np.float64)
    for start in range(0, values.size, GROUP):
        group = values[start : start + GROUP]
        step = np.abs(group).max() / 127
        least = 127 * np.finfo(np.float32).tiny  # a group of smaller numbers is sent as zeros
        assert (np.abs(back[start : start + GROUP] - group) <= step * (1 + 1e-4) + least).all()


def test_int8_is_right_on_the_average() -> None:
    """Of many roundings of a value the mean is the value: five standard deviations of the mean are allowed, all seeds are fixed."""
    values, repeats = np.linspace(-1, 1, 509, dtype=np.float32), 4000
    found = np.zeros(values.size)
    for seed in range(repeats):
        found += there_and_back(values, "int8", seed)
    off = np.abs(found / repeats - values)
    deviation = 1 / 127 / 2 / np.sqrt(repeats)  # of the mean, for a value halfway between two steps
    assert off.max() < 5 * deviation
    assert off.mean() < deviation
    nearest = there_and_back(values, "int8", 0)  # one rounding alone is far coarser
    assert np.abs(nearest - values).max() > 20 * deviation


def test_int8_needs_little_more_than_a_quarter() -> None:
    for size in (GROUP, 1700, BLOCK, BLOCK + 1, 10 * BLOCK + 77):
        assert payload_bytes(parse("int8"), size).most <= 0.27 * 4 * size
    assert payload_bytes(parse("int8"), BLOCK + 1) == Lengths(BLOCK + 4 * BLOCK // GROUP + 5, BLOCK + 4 * BLOCK // GROUP + 5)
    assert payload_bytes(FLOAT32, BLOCK + 1) == Lengths(4 * BLOCK + 4, 4 * BLOCK + 4)
    assert payload_bytes(parse("bf16"), 3) == Lengths(6, 6)


def test_int8_of_nothing_and_of_next_to_nothing() -> None:
    assert not there_and_back(np.zeros(300, np.float32), "int8").any()
    assert not there_and_back(np.full(300, 1e-44, np.float32), "int8").any()  # its scale would be no number to divide by


@given(values=VECTORS, share=st.sampled_from([0.0001, 0.01, 0.1, 0.5]))
def test_topk_sends_the_largest(values: Vector, share: float) -> None:
    codec = TopK(share)
    back = there_and_back(values, codec.name)
    rounded = codecs.from_bf16(codecs.to_bf16(values))
    sent = back != 0
    assert sent.sum() <= codec.kept(values.size)
    assert np.array_equal(back[sent], rounded[sent])
    left = np.sort(np.abs(np.where(sent, 0, values)))
    largest_left = np.sort(np.abs(values))[values.size - codec.kept(values.size)]
    assert left[-1] <= max(largest_left, 2.0**-133)  # what bfloat16 has no number for, is sent as zero


def test_topk_over_wide_gaps() -> None:
    values = np.zeros(BLOCK + 3000, np.float32)
    places = [0, 1, 255, 256, 511, 767, BLOCK - 1, BLOCK, BLOCK + 2999]
    values[places] = np.arange(1, 10)
    codec = TopK(0.0001)
    assert codec.kept(BLOCK) == 27
    assert codec.kept(3000) == 1
    assert np.flatnonzero(there_and_back(values, codec.name)).tolist() == [*places[:7], places[8]]
    assert len(encoded(values, codec)) < 0.003 * values.nbytes


@pytest.mark.parametrize("plain", PLAIN)
@given(values=VECTORS)
@settings(max_examples=25, deadline=None)
def test_zstd_changes_nothing_but_the_length(plain: str, values: Vector) -> None:
    assert np.array_equal(there_and_back(values, f"{plain}+zstd"), there_and_back(values, plain))


def test_zstd_helps_where_numbers_are_alike() -> None:
    values = normal(BLOCK + 1000)
    for plain, most in (("float32", 0.9), ("bf16", 0.75), ("int8", 0.95), ("topk:0.1", 0.9)):
        assert len(encoded(values, Zstd(parse(plain)))) < most * len(encoded(values, parse(plain)))


@pytest.mark.parametrize("name", NAMES)
def test_a_long_vector_is_never_held_whole(name: str) -> None:
    codec, size = parse(name), 3 * BLOCK + 5
    read: list[int] = []

    def reading(count: int) -> bytes:
        read.append(count)
        return file.read(count)

    file = io.BytesIO(b"".join(codecs.encoded((normal(count) for count in codecs.counts(size)), codec, codecs.rng_of(0))))
    assert [block.size for block in codecs.decoded(reading, codec, size)] == [BLOCK, BLOCK, BLOCK, 5]
    assert max(read) <= codec.block_bytes(BLOCK)


def test_what_is_not_finite_does_not_pass_for_a_number() -> None:
    values = normal(600)
    values[3], values[400] = np.nan, np.inf
    for name in ("float32", "bf16", "topk:0.1", "topk:0.1+zstd"):
        assert not np.isfinite(there_and_back(values, name)).all()
    for name in ("int8", "int8+zstd"):
        with pytest.raises(InvalidMessage, match="a scale that is infinite, undefined or negative"):
            there_and_back(values, name)


# Error feedback


@pytest.mark.parametrize("name", ["topk:0.05", "topk:0.05+zstd", "bf16"])
@given(seed=st.integers(0, 2**64 - 1))
@settings(max_examples=25, deadline=None)
def test_what_is_sent_and_what_is_kept_are_all_there_was(name: str, seed: int) -> None:
    codec, size = parse(name), BLOCK + 100
    residual, deltas, arrived = np.zeros(size, np.float32), [], np.zeros(size)
    for number in range(3):
        delta, kept = normal(size, number), list[Vector]()
        payload = b"".join(
            codecs.encoded_with_feedback(codecs.blocks(delta), codec, codecs.rng_of(seed), codecs.blocks(residual), kept.append)
        )
        sent = decoded(payload, codec, size)
        left = np.concatenate(kept)
        assert np.array_equal(sent + left, delta + residual)  # to the bit
        residual = left
        deltas.append(delta.astype(np.float64))
        arrived += sent
    assert np.allclose(arrived + residual, sum(deltas), atol=1e-5)


def test_a_residual_of_another_length_is_no_residual() -> None:
    with pytest.raises(ValueError, match="zip"):
        list(
            codecs.encoded_with_feedback(
                codecs.blocks(normal(BLOCK + 1)), TopK(0.1), codecs.rng_of(0), [normal(BLOCK)], lambda block: None
            )
        )


# Hostile bytes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b"", lambda p: p[:2]])
def test_a_wrong_length_is_refused(name: str, change: Callable[[bytes], bytes]) -> None:
    codec = parse(name)
    with pytest.raises(InvalidMessage):
        decoded(change(encoded(normal(500), codec)), codec, 500)


@pytest.mark.parametrize("name", NAMES)
@given(payload=st.binary(max_size=3000), size=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_a_vector_or_refused(name: str, payload: bytes, size: int) -> None:
    codec = parse(name)
    with suppress(InvalidMessage):
        assert decoded(payload, codec, size).shape == (size,)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_size_is_refused(scale: float) -> None:
    with pytest.raises(InvalidMessage, match="a scale that is infinite, undefined or negative"):
        parse("int8").decode(struct.pack("<f", scale) + b"\1\2\3", 3)


@pytest.mark.parametrize(
    ("gaps", "why"),
    [
        (b"\x00\x05", "a value at place 6 of a block that has 4"),
        (b"\xff\x00\x00", "bytes for 2 of 4 elements; there are 6 to 6"),
        (b"\x00", "bytes for 2 of 4 elements"),
        (b"\x00\xff", "the places of 1 elements, where 2 are sent"),
    ],
)
def test_places_that_are_not_there_are_refused(gaps: bytes, why: str) -> None:
    with pytest.raises(InvalidMessage, match=why):
        TopK(0.5).decode(b"\x80\x3f" * 2 + gaps, 4)


def test_places_are_strictly_increasing_whatever_the_bytes_say() -> None:
    assert TopK(0.5).decode(b"\x80\x3f\x00\x40" + b"\x00\x00", 4).tolist() == [1, 2, 0, 0]
    assert TopK(0.5).decode(b"\x80\x3f\x00\x40" + b"\x01\x01", 4).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (zstandard.compress(bytes(1 << 30)), "a Zstandard frame of 1073741824 bytes, where 12 are expected"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(12)), "of unknown bytes|of 0 bytes"),
        (zstandard.compress(bytes(12)) + b"\0", "no Zstandard frame"),
        (zstandard.compress(bytes(12))[:-1], "no Zstandard frame"),
        (b"nonsense", "no Zstandard frame"),
    ],
)
def test_a_zstd_bomb_is_refused_before_there_is_room_made_for_it(frame: bytes, why: str) -> None:
    with pytest.raises(InvalidMessage, match=why):
        parse("float32+zstd").decode(frame, 3)


@pytest.mark.parametrize("length", [0, 92, 2**32 - 1])
def test_a_block_longer_than_any_is_refused_unread(length: int) -> None:
    with pytest.raises(InvalidMessage, match=f"a block of {length} bytes, where at most 91 can stand for 3 elements"):
        decoded(struct.pack("<I", length) + bytes(100), parse("float32+zstd"), 3)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    frame = bytearray(zstandard.compress(bytes(1 << 20)))
    parameters = zstandard.get_frame_parameters(bytes(frame))
    assert parameters.content_size == 1 << 20
    place = bytes(frame).index(struct.pack("<I", 1 << 20))
    frame[place : place + 4] = struct.pack("<I", 12)
    with pytest.raises(InvalidMessage, match="no Zstandard frame"):
        parse("float32+zstd").decode(bytes(frame), 3)


# Names


@pytest.mark.parametrize(
    "name",
    [
        *("gzip", "int8+", "int8+gzip", "+zstd", "int8+zstd+zstd", "int8 ", "float32:1", "x" * 10_000),
        *("topk", "topk:", "topk:0", "topk:0.00001", "topk:0.9", "topk:1e-3", "topk:nan", "topk:0." + "1" * 1000),
    ],
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidMessage, match="is unknown to this release: update Choral on this side") as refused:
        parse(name)
    assert len(str(refused.value)) < 300


def test_no_name_is_float32() -> None:
    assert parse("") is FLOAT32


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("int8", (), "float32"),
        ("int8", ("bf16", "int8"), "int8"),
        ("int8+zstd", ("int8", "zstd"), "int8+zstd"),
        ("int8+zstd", ("int8",), "int8"),
        ("int8+zstd", ("zstd",), "float32"),
        ("float32+zstd", (), "float32"),
        ("topk:0.1+zstd", ("topk", "something new"), "topk:0.1"),
    ],
)
def test_a_client_is_asked_for_what_it_can(wanted: str, offered: tuple[str, ...], chosen: str) -> None:
    assert codecs.negotiated(parse(wanted), offered).name == chosen


def test_who_has_no_zstandard_does_not_offer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codecs.abilities() == ("bf16", "int8", "topk", "zstd")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert codecs.abilities() == ("bf16", "int8", "topk")
    with pytest.raises(ConfigError, match=r"zstd needs the package zstandard: pip install 'choral\[compression\]'"):
        encoded(normal(10), parse("int8+zstd"))
