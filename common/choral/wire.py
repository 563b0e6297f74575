"""Domain values <-> protobuf, and bytes <-> checksummed chunks.

Together with `status` and the two sides' `service`/`transport`, the only place that sees generated code.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from choral.errors import CorruptTransfer, InvalidMessage
from choral.manifest import Entry, EntryKind, Manifest
from choral.metrics import Metric
from choral.plan import Kind, Plan, Training
from choral.v1 import federation_pb2 as pb
from choral.v1 import model_pb2 as mb

K = TypeVar("K", bound=int)
V = TypeVar("V")

PROTOCOL_VERSION = 1
CHUNK_BYTES = 1 << 20
MESSAGE_BYTES = CHUNK_BYTES + 4096  # a chunk and its envelope

KINDS = {
    Kind.STATISTICS: mb.ROUND_KIND_STATISTICS,
    Kind.TRAINING: mb.ROUND_KIND_TRAINING,
    Kind.EVALUATION: mb.ROUND_KIND_EVALUATION,
}
_KINDS_BACK = {number: kind for kind, number in KINDS.items()}
_ENTRY_KINDS = {
    EntryKind.AVERAGED: mb.ENTRY_KIND_AVERAGED,
    EntryKind.COUNTER: mb.ENTRY_KIND_COUNTER,
    EntryKind.STATISTIC: mb.ENTRY_KIND_STATISTIC,
}
_ENTRY_KINDS_BACK = {number: kind for kind, number in _ENTRY_KINDS.items()}
PAYLOADS = {
    Kind.STATISTICS: pb.PAYLOAD_KIND_STATISTICS,
    Kind.TRAINING: pb.PAYLOAD_KIND_DELTA,
    Kind.EVALUATION: pb.PAYLOAD_KIND_NONE,
}


@dataclass(frozen=True, slots=True)
class VersionRef:
    """A version as it is announced: its number, and the SHA-256 and length (bytes) of its checkpoint file."""

    number: int
    digest: bytes
    size_bytes: int


def chunks(data: bytes | memoryview, start: int = 0) -> Iterator[mb.Chunk]:
    """Cut `data`, whose first byte is byte `start` of the whole, into checksummed chunks."""
    view = memoryview(data).cast("B")
    for offset in range(0, len(view), CHUNK_BYTES):
        piece = bytes(view[offset : offset + CHUNK_BYTES])
        yield mb.Chunk(offset=start + offset, data=piece, crc32=zlib.crc32(piece))


def verified(chunk: mb.Chunk, offset: int, total: int) -> bytes:
    """The chunk's bytes, if it continues at `offset` and the whole stays within `total` bytes.

    Raises CorruptTransfer: gap, overlap, too much, or a checksum that does not match.
    """
    if chunk.offset != offset:
        raise CorruptTransfer(f"a chunk begins at byte {chunk.offset} where byte {offset} is next: send it again")
    if offset + len(chunk.data) > total:
        raise CorruptTransfer(f"{offset + len(chunk.data)} bytes arrived where {total} were announced: send it again")
    if zlib.crc32(chunk.data) != chunk.crc32:
        raise CorruptTransfer(f"the chunk at byte {offset} does not match its CRC-32: send it again")
    return chunk.data


def manifest_to_pb(manifest: Manifest) -> mb.Manifest:
    """To protobuf."""
    return mb.Manifest(
        entries=[
            mb.ManifestEntry(name=e.name, dtype=e.dtype, shape=e.shape, offset=e.offset, kind=_ENTRY_KINDS[e.kind])
            for e in manifest.entries
        ]
    )


def manifest_from_pb(message: mb.Manifest) -> Manifest:
    """From protobuf. Raises InvalidMessage: an entry kind that this release does not know."""
    return Manifest(
        tuple(
            Entry(e.name, e.dtype, tuple(e.shape), e.offset, _known(_ENTRY_KINDS_BACK, e.kind, "entry kind"))
            for e in message.entries
        )
    )


def plan_to_pb(plan: Plan) -> pb.Plan:
    """To protobuf."""
    return pb.Plan(
        kind=KINDS[plan.kind],
        task=plan.task,
        task_version=plan.task_version,
        epochs=plan.training.epochs,
        batch_size=plan.training.batch_size,
        learning_rate=plan.training.learning_rate,
        seed=plan.seed,
        evaluate=plan.evaluate,
    )


def plan_from_pb(message: pb.Plan) -> Plan:
    """From protobuf. Raises InvalidMessage: a round kind or a hyper-parameter that is not allowed."""
    try:
        training = Training(epochs=message.epochs, batch_size=message.batch_size, learning_rate=message.learning_rate)
    except ValueError as error:
        raise InvalidMessage(f"a plan that is not allowed: {error}") from error
    kind = _known(_KINDS_BACK, message.kind, "round kind")
    return Plan(kind, message.task, message.task_version, training, message.seed, message.evaluate)


def version_to_pb(version: VersionRef) -> mb.ModelVersion:
    """To protobuf."""
    return mb.ModelVersion(number=version.number, digest=version.digest, size_bytes=version.size_bytes)


def version_from_pb(message: mb.ModelVersion) -> VersionRef:
    """From protobuf."""
    return VersionRef(message.number, message.digest, message.size_bytes)


def metrics_to_pb(metrics: Iterable[Metric]) -> list[mb.Metric]:
    """To protobuf."""
    return [mb.Metric(name=m.name, value=m.value, examples=m.examples) for m in metrics]


def metrics_from_pb(messages: Iterable[mb.Metric]) -> tuple[Metric, ...]:
    """From protobuf."""
    return tuple(Metric(m.name, m.value, m.examples) for m in messages)


def _known(table: dict[K, V], number: K, what: str) -> V:
    if number not in table:
        raise InvalidMessage(f"{what} {number} is unknown to this release: update Choral on this side")
    return table[number]
