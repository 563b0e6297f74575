"""Uploads: checked against what was asked for, spooled to disk, then admitted or refused with the reason."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
from choral.errors import CorruptTransfer, InvalidMessage, UpdateRefused
from choral.messages import UploadHeader
from choral.plan import Kind
from choral.statistics import Moments

from choral_server.aggregate import entry_bound

MAX_EXAMPLES = 2**40
_LARGEST_FEATURE = 1e30  # the model keeps means and deviations as float32, which ends at 3e38
_BLOCK = 1 << 20


def payload_bytes(kind: Kind, model_size: int, features: int | None) -> int:
    """How long the payload of a result must be, for a model of `model_size` averaged elements and statistics of `features`."""
    return {Kind.TRAINING: 4 * model_size, Kind.STATISTICS: 8 * (1 + 2 * (features or 0)), Kind.EVALUATION: 0}[kind]


def check_header(header: UploadHeader, kind: Kind, expected_bytes: int) -> None:
    """Refuse before any byte is stored. Raises UpdateRefused: wrong kind, length or weight."""
    if header.kind is not kind:
        raise UpdateRefused(f"{header.client} sends a {header.kind.value} result; a {kind.value} result was asked for")
    if header.payload_bytes != expected_bytes:
        raise UpdateRefused(f"{header.client} announces {header.payload_bytes} bytes; the model's result has {expected_bytes}")
    if not 1 <= header.examples <= MAX_EXAMPLES:
        raise UpdateRefused(f"{header.client} claims {header.examples} examples; 1 to {MAX_EXAMPLES} are allowed")
    for metric in header.held_out:
        if not 1 <= metric.examples <= MAX_EXAMPLES:
            raise UpdateRefused(f"{header.client} measured {metric.name} on {metric.examples} examples; at least 1 is needed")


def check_payload(header: UploadHeader, path: Path, cohort_size: int, features: int | None) -> None:
    """Refuse what must not be aggregated. Raises UpdateRefused: not finite, out of bounds, or no valid statistics."""
    if header.kind is Kind.TRAINING:
        _check_delta(header.client, path, entry_bound(cohort_size))
    elif header.kind is Kind.STATISTICS:
        _check_statistics(header.client, path, features)


def _check_statistics(client: str, path: Path, features: int | None) -> None:
    try:
        moments = Moments.from_vector(np.fromfile(path, dtype="<f8"))
    except InvalidMessage as error:
        raise UpdateRefused(f"{client} sends {error}") from error
    if moments.count > MAX_EXAMPLES or moments.mean.size != features:
        raise UpdateRefused(f"{client} sends statistics of {moments.count:g} examples and {moments.mean.size} features")
    largest = max(np.abs(moments.mean).max(), moments.deviation.max())
    if largest > _LARGEST_FEATURE:
        raise UpdateRefused(f"{client} sends a mean or deviation of {largest:g}; at most {_LARGEST_FEATURE:g} is allowed")


def _check_delta(client: str, path: Path, bound: float) -> None:
    delta = np.memmap(path, dtype="<f4", mode="r")
    for start in range(0, delta.size, _BLOCK):
        largest = np.abs(delta[start : start + _BLOCK]).max()
        if not largest <= bound:  # also true for NaN
            what = "an infinite or undefined number" if not np.isfinite(largest) else f"{largest:g}, over the bound of {bound:g}"
            raise UpdateRefused(f"the update of {client} holds {what}: lower the learning rate, or look at its data")


class Spool:
    """A folder for uploads under way: each is written to a file of its own, and removed when it has been used or refused."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for orphan in folder.glob("*.upload"):
            orphan.unlink()
        self._folder = folder
        self._numbers = itertools.count()

    async def store(self, announced_bytes: int, pieces: AsyncIterator[bytes]) -> Path:
        """Write the pieces to a new file. Raises CorruptTransfer: fewer bytes came than announced; the file is gone then."""
        path = self._folder / f"{next(self._numbers)}.upload"
        try:
            with path.open("wb", buffering=0) as file:
                received = 0
                async for piece in pieces:
                    received += file.write(piece) or 0
            if received != announced_bytes:
                raise CorruptTransfer(f"{received} bytes arrived where {announced_bytes} were announced: send it again")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path
