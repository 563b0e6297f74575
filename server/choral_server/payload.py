"""An update in the spool, as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from choral import codecs
from choral.codecs import Vector


def decoded(path: Path, codec: str, size: int) -> Iterator[tuple[int, Vector]]:
    """The update of `size` elements in the file at `path`, block by block, each behind the place where it begins.

    Raises InvalidMessage: it is no payload of this codec.
    """
    start = 0
    with path.open("rb") as file:
        for block in codecs.decoded(file.read, codecs.parse(codec), size):
            yield start, block
            start += block.size
