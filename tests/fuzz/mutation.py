"""Hostile relatives of valid bytes, by chance alone: what the tests use, and `make fuzz` where atheris is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

_LONGEST = 1 << 18
_NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [  # what has hurt decoders before
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"../../../../tmp/escaped",
    b"nan",
    b"-inf",
    b"1e400",
    b"1" * 5000,
    b"0x" + b"f" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b'"\\ud800"',
    b"null",
    b"-1",
    b"true",
    b"99999999999999999999",
    b"A" * 10_000,
]


def mutated(random: Random, seeds: Sequence[bytes], dictionary: Sequence[bytes] = ()) -> bytes:
    """A seed, changed in one to four places."""
    data = random.choice(seeds)
    for _ in range(random.randint(1, 4)):
        data = random.choice(_MUTATIONS)(random, data, seeds, [*WORDS, *dictionary])
    return data[:_LONGEST]


Mutation = Callable[[Random, bytes, Sequence[bytes], Sequence[bytes]], bytes]


def _place(random: Random, data: bytes) -> int:
    return random.randint(0, len(data))


def _flip(random: Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    if not data:
        return data
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def _overwrite(random: Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    at = _place(random, data)
    return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]


def _truncate(random: Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    return data[: _place(random, data)]


def _remove(random: Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    begin, end = sorted((_place(random, data), _place(random, data)))
    return data[:begin] + data[end:]


def _repeat(random: Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    begin, end = sorted((_place(random, data), _place(random, data)))
    times = min(random.choice([1, 2, 3, 100]), 1 + _LONGEST // (1 + end - begin))
    return data[:end] + data[begin:end] * times + data[end:]


def _splice(random: Random, data: bytes, seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    other = random.choice(seeds)
    return data[: _place(random, data)] + other[_place(random, other) :]


def _word(random: Random, data: bytes, _seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    at, word = _place(random, data), random.choice(words)
    return data[:at] + word + data[at + random.choice([0, len(word)]) :]


def _number(random: Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    """Where a length may be, in four, eight or as many bytes as a varint has; or in decimal digits, where there are some."""
    at, number = _place(random, data), random.choice(_NUMBERS)
    form = random.randrange(4)
    if form == 3:
        begin = next((i for i in range(at, len(data)) if data[i : i + 1].isdigit()), at)
        end = next((i for i in range(begin, len(data)) if not data[i : i + 1].isdigit()), len(data))
        return data[:begin] + str(number - random.choice([0, 2 * number])).encode() + data[end:]
    if form == 2:
        written = _varint(number)
        return data[:at] + written + data[at + random.choice([1, len(written)]) :]
    size = (4, 8)[form]
    written = (number % 2 ** (8 * size)).to_bytes(size, random.choice(["little", "big"]))  # type: ignore[arg-type]
    return data[:at] + written + data[at + size :]


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])


_MUTATIONS: list[Mutation] = [_flip, _overwrite, _truncate, _remove, _repeat, _splice, _word, _word, _number, _number]
