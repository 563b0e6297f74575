"""Admission: what is checked of an upload before it may count."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from choral import codecs
from choral.codecs import MASKED, Lengths, Vector
from choral.errors import InvalidMessage, UpdateRefused
from choral.messages import UploadHeader
from choral.metrics import Metric
from choral.plan import Kind
from choral.statistics import Moments

from choral_server.aggregate import entry_bound
from choral_server.payload import decoded

MAX_EXAMPLES = 2**40
_LARGEST_FEATURE = 1e30  # the model keeps means and deviations as float32, which ends at 3e38
_LARGEST_METRIC = 1e30
_PLAIN = codecs.FLOAT32.name
_WORK_METRICS, _NAME = 32, 64  # how many a client may tell of its work, and how long the name of one may be, in characters


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a payload is held against: the number of results that may be added, the features of statistics, the largest norm.

    `size` is the number of averaged elements. Updates that are `shortened` before they count may hold any finite number. What is
    `noised` already may be what nothing without noise could be.
    """

    cohort_size: int
    size: int = 0
    features: int | None = None
    max_norm: float | None = None
    shortened: bool = False
    noised: bool = False


def payload_bytes(kind: Kind, model_size: int, features: int | None, codec: str = "") -> Lengths:
    """How long the payload of a result may be, for a model of `model_size` averaged elements and statistics of `features`."""
    if kind is Kind.TRAINING:
        return codecs.payload_bytes(codecs.parse(codec), model_size)
    length = 8 * (1 + 2 * (features or 0)) if kind is Kind.STATISTICS else 0
    return Lengths(length, length)


def check_header(header: UploadHeader, kind: Kind, codec: str, expected: Lengths, metrics: Collection[str]) -> None:
    """Refuse before any byte is stored. Raises UpdateRefused: wrong kind, codec, length, weight or metrics (of `metrics`)."""
    if header.kind is not kind:
        raise UpdateRefused(f"{header.client} sends a {header.kind.value} result; a {kind.value} result was asked for")
    if (header.codec or _PLAIN) != (codec or _PLAIN):
        raise UpdateRefused(f"{header.client} sends its result as {header.codec or _PLAIN}; {codec or _PLAIN} was asked for")
    if header.payload_bytes not in expected:
        raise UpdateRefused(f"{header.client} announces {header.payload_bytes} bytes; the model's result has {expected}")
    if codec == MASKED:
        if header.examples or header.held_out or header.work:
            raise UpdateRefused(
                f"{header.client} tells numbers of its own beside a masked result, where only their sums may appear"
            )
        return
    if not 1 <= header.examples <= MAX_EXAMPLES:
        raise UpdateRefused(f"{header.client} claims {header.examples} examples; 1 to {MAX_EXAMPLES} are allowed")
    _check_metrics(header.client, header.held_out, metrics)
    _check_metrics(header.client, header.work, [metric.name for metric in header.work[:_WORK_METRICS]])


def _check_metrics(client: str, measured: Sequence[Metric], known: Collection[str]) -> None:
    """Each of the known ones at most once, and a number: of what it is the mean, and what it says of the best version."""
    left = list(known)
    for metric in measured:
        name = metric.name[:_NAME]
        if metric.name not in left or name != metric.name:
            told = ", ".join(one[:_NAME] for one in known)  # of its work a client names all itself
            raise UpdateRefused(f"{client} measured {name!r}, which was not asked for, or twice; the task has {told}")
        left.remove(metric.name)
        if not 1 <= metric.examples <= MAX_EXAMPLES:
            raise UpdateRefused(f"{client} measured {name} on {metric.examples} examples; 1 to {MAX_EXAMPLES} are allowed")
        if not abs(metric.value) <= _LARGEST_METRIC:
            raise UpdateRefused(f"{client} measured {name} = {metric.value:g}; at most {_LARGEST_METRIC:g} is allowed")


def digest_of(path: Path) -> bytes:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check_payload(header: UploadHeader, path: Path, bounds: Bounds) -> None:
    """Refuse what must not be aggregated. Raises UpdateRefused: not finite, out of bounds, or no valid statistics."""
    if header.codec == MASKED:
        return  # nothing can be told from it alone
    if header.kind is Kind.TRAINING:
        try:
            _check_delta(header.client, decoded(path, header.codec, bounds.size), bounds)
        except InvalidMessage as error:
            raise UpdateRefused(f"{header.client} sends no {header.codec or _PLAIN} update: {error}") from error
    elif header.kind is Kind.STATISTICS:
        check = _check_noised_statistics if bounds.noised else _check_statistics
        check(header.client, path, bounds.features)


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


def _check_noised_statistics(client: str, path: Path, features: int | None) -> None:
    vector = np.fromfile(path, dtype="<f8")
    if vector.size != 1 + 2 * (features or 0) or not (np.abs(vector) <= _LARGEST_FEATURE).all():
        raise UpdateRefused(f"{client} sends statistics that are undefined, or beyond {_LARGEST_FEATURE:g}")


def _check_delta(client: str, blocks: Iterator[tuple[int, Vector]], bounds: Bounds) -> None:
    bound = float(np.finfo(np.float32).max) if bounds.shortened else entry_bound(bounds.cohort_size)
    square = 0.0
    for _, block in blocks:
        largest = np.abs(block).max()
        if not largest <= bound:  # also true for NaN
            what = "an infinite or undefined number" if not np.isfinite(largest) else f"{largest:g}, over the bound of {bound:g}"
            raise UpdateRefused(f"the update of {client} holds {what}: lower the learning rate, or look at its data")
        if bounds.max_norm is not None:
            square += float(np.square(block, dtype=np.float64).sum())
    if bounds.max_norm is not None and square > bounds.max_norm**2:
        raise UpdateRefused(
            f"the update of {client} has a norm of {square**0.5:g}, over run.max_update_norm {bounds.max_norm:g}: "
            "lower the learning rate, or look at its data"
        )
