"""One decoder to be fuzzed, and how it is run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from choral.errors import ChoralError
from fuzz.watch import Watch

Decode = Callable[[bytes], None]
Make = Callable[[Path], AbstractContextManager[Decode]]


@dataclass(frozen=True)
class Target:
    """`make(folder)`, entered once a process, gives what decodes hostile bytes just as the product does.

    It may write below `folder`, and raises nothing but `allowed`. `seeds()` are valid examples, made by the product's own encoders.
    `told`: how many characters about an input may be told on, where it comes from strangers. `examples`: how many inputs the
    ordinary tests try.
    """

    name: str
    make: Make
    seeds: Callable[[], Sequence[bytes]]
    allowed: tuple[type[BaseException], ...] = (ChoralError,)
    dictionary: tuple[bytes, ...] = ()
    memory_bytes: int = 128 << 20
    seconds: float = 20.0
    told: int | None = None
    examples: int = 40
    hostile: Callable[[], Sequence[bytes]] = list
    """inputs that chance would hardly make; each is tried, and changed further, like the seeds"""

    @contextmanager
    def running(self) -> Iterator[Decode]:
        """What decodes one input under all detectors, and raises Finding."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as outside:
            folder = Path(outside) / "inside"
            folder.mkdir()
            watch = Watch(folder, self.allowed, self.memory_bytes, self.seconds, self.told)
            with self.make(folder) as decode:
                yield partial(watch, decode)


def in_memory(decode: Callable[[bytes], object]) -> Make:
    """The `make` of a decoder that needs no folder."""

    @contextmanager
    def make(folder: Path) -> Iterator[Decode]:
        def decoded(data: bytes) -> None:
            decode(data)

        yield decoded

    return make


def in_file(name: str, decode: Callable[[Path], object]) -> Make:
    """The `make` of a decoder that reads a file of this name, from a folder of its own."""

    @contextmanager
    def make(folder: Path) -> Iterator[Decode]:
        path = folder / name

        def decoded(data: bytes) -> None:
            path.write_bytes(data)
            decode(path)

        yield decoded

    return make


def framed(pieces: Sequence[bytes]) -> bytes:
    """Several pieces as one: each behind its length, four bytes, little-endian."""
    return b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces)


def pieces_of(data: bytes) -> list[bytes]:
    """The inverse; what a length promises and is not there is not missed."""
    pieces = []
    while len(data) >= 4:
        size = int.from_bytes(data[:4], "little")
        pieces.append(data[4 : 4 + size])
        data = data[4 + size :]
    return pieces
