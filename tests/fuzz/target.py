"""One decoder to be fuzzed, and how it is run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from choral.errors import ChoralError

from fuzz.watch import Watch

Decode = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """`make(folder)`, called once a process, gives what decodes hostile bytes just as the product does; it may write below `folder`.

    It raises nothing but `allowed`. `seeds()` are valid examples, made by the product's own encoders. `told`: how many characters
    of words about an input may be told on, where it comes from strangers. `examples`: how many inputs the ordinary tests try.
    """

    name: str
    make: Callable[[Path], Decode]
    seeds: Callable[[], Sequence[bytes]]
    allowed: tuple[type[BaseException], ...] = (ChoralError,)
    dictionary: tuple[bytes, ...] = ()
    memory_bytes: int = 128 << 20
    seconds: float = 20.0
    told: int | None = None
    examples: int = 40

    @contextmanager
    def running(self) -> Iterator[Decode]:
        """What decodes one input under all detectors, and raises Finding."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as outside:
            folder = Path(outside) / "inside"
            folder.mkdir()
            decode, watch = self.make(folder), Watch(folder, self.allowed, self.memory_bytes, self.seconds, self.told)
            yield lambda data: watch(decode, data)


def in_memory(decode: Decode) -> Callable[[Path], Decode]:
    """The `make` of a decoder that needs no folder."""
    return lambda folder: decode


def in_file(name: str, decode: Callable[[Path], object]) -> Callable[[Path], Decode]:
    """The `make` of a decoder that reads a file of this name."""

    def make(folder: Path) -> Decode:
        path = folder / name

        def written(data: bytes) -> None:
            path.write_bytes(data)
            decode(path)

        return written

    return make
