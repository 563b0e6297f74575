"""Each decoder with its valid examples and a few hostile ones; and each detector with a decoder that it must catch."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import structlog
import torch
from choral.errors import ConfigError
from fuzz.mutation import mutated
from fuzz.target import Target, framed, in_memory, pieces_of
from fuzz.targets import TARGETS
from fuzz.watch import Finding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MEMORY_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is logged of hostile bytes is no news; nor are the modules compiled here that a decoder imports when it first runs."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with structlog.testing.capture_logs():
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_hostile_is_found_to_work(name: str) -> None:
    target = TARGETS[name]
    seeds = [*target.seeds(), *target.hostile()]
    with target.running() as run:
        for seed in seeds:
            run(seed)

        @settings(max_examples=target.examples, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def hostile(random: Random) -> None:
            run(mutated(random, seeds, target.dictionary))

        hostile()


@pytest.mark.parametrize("name", TARGETS)
def test_valid_examples_are_accepted(name: str) -> None:
    """Or all others would be refused at the door, and nothing behind it would be tested."""
    target = TARGETS[name]
    if name in {"refusal of a call"}:  # each is an error
        return
    never = Target(target.name, target.make, target.seeds, allowed=(), memory_bytes=target.memory_bytes)
    with never.running() as run:
        run(target.seeds()[0])


def _caught(decode: Callable[[bytes], object], kind: str, seconds: float = 20.0) -> str:
    target = Target("broken", in_memory(decode), list, (ConfigError,), memory_bytes=MEMORY_BYTES, seconds=seconds, told=100)
    with target.running() as run, pytest.raises(Finding) as found:
        run(b"input")
    assert found.value.kind == kind, found.value
    return str(found.value)


def _nested(depth: int) -> int:
    return _nested(depth + 1)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), AssertionError("x"), UnicodeDecodeError("x", b"", 0, 0, "x")])
def test_a_crash_is_caught(error: Exception) -> None:
    def decode(data: bytes) -> None:
        raise error

    assert type(error).__name__ in _caught(decode, "crash")


def test_endless_recursion_is_caught() -> None:
    assert "RecursionError" in _caught(lambda data: _nested(0), "crash")


@pytest.mark.parametrize("allocate", [bytearray, np.zeros, torch.empty])
def test_a_large_allocation_is_caught(allocate: Callable[[int], object]) -> None:
    _caught(lambda data: allocate(10 << 30), "memory")
    _caught(lambda data: allocate(2 * MEMORY_BYTES), "memory")


def test_many_small_allocations_are_caught() -> None:
    _caught(lambda data: [bytes(1000) for _ in range(2 * MEMORY_BYTES // 1000)], "memory")


def test_a_large_allocation_that_became_an_orderly_refusal_is_caught() -> None:
    def decode(data: bytes) -> None:
        try:
            torch.empty(10 << 30)
        except RuntimeError as error:
            raise ConfigError("no") from error

    _caught(decode, "memory")


def test_a_small_allocation_is_none() -> None:
    with Target("good", in_memory(lambda data: bytes(MEMORY_BYTES // 4)), list, memory_bytes=MEMORY_BYTES).running() as run:
        run(b"input")


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize("content", [None, _Evil()])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_pickle_is_caught(content: object, swallowed: bool) -> None:
    data = pickle.dumps(content)

    def decode(_: bytes) -> None:
        try:
            pickle.loads(data)
        except BaseException:
            if not swallowed:
                raise

    _caught(decode, "reach")


def test_a_pickle_behind_a_reader_that_was_imported_before_is_caught() -> None:
    loads, data = pickle.loads, pickle.dumps(_Evil())
    assert "pickle.find_class" in _caught(lambda _: loads(data), "reach")


@pytest.mark.parametrize(
    "reach",
    [
        lambda outside: (outside / "new").write_bytes(b""),
        lambda outside: (outside / "new").mkdir(),
        lambda outside: (outside / "there").unlink(),
        lambda outside: (outside / "there").rename(outside / "elsewhere"),
        lambda outside: (outside / "link").symlink_to("there"),
        lambda outside: (outside / "there").read_bytes(),
        lambda outside: os.close(os.open(outside / "new", os.O_CREAT | os.O_WRONLY)),
        lambda outside: sqlite3.connect(outside / "new").close(),
        lambda outside: subprocess.run(["true"], check=False),
        lambda outside: os.system("true"),
        lambda outside: socket.create_connection(("127.0.0.1", 9)),
        lambda outside: _in_a_thread(lambda: (outside / "new").write_bytes(b"")),
    ],
)
def test_what_reaches_out_is_caught(tmp_path: Path, reach: Callable[[Path], object]) -> None:
    (tmp_path / "there").write_bytes(b"")
    _caught(lambda data: reach(tmp_path), "reach")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def _in_a_thread(doing: Callable[[], object]) -> None:
    thread = threading.Thread(target=_quietly, args=[doing])
    thread.start()
    thread.join()


def _quietly(doing: Callable[[], object]) -> None:
    with contextlib.suppress(Finding):
        doing()


def test_an_input_that_takes_for_ever_is_caught() -> None:
    def decode(data: bytes) -> None:
        while True:
            time.sleep(0.01)

    _caught(decode, "time", seconds=0.2)


def test_an_error_that_repeats_what_it_was_told_is_caught() -> None:
    def decode(data: bytes) -> None:
        raise ConfigError("x" * 101)

    _caught(decode, "words")


def test_an_error_that_is_expected_is_no_finding() -> None:
    def decode(data: bytes) -> None:
        raise ConfigError("no")

    with Target("good", in_memory(decode), list, (ConfigError,)).running() as run:
        run(b"input")


def test_frames() -> None:
    assert pieces_of(framed([b"a", b"", b"bcd"])) == [b"a", b"", b"bcd"]
    assert pieces_of(framed([b"abc"])[:-1]) == [b"ab"]
    assert pieces_of(b"\xff\xff\xff\xffab") == [b"ab"]
    assert pieces_of(b"abc") == []
