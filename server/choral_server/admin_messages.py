"""Records as operators get them: to protobuf."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

from choral import wire
from choral.v1 import admin_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from choral_server.diagnosis import Finding
from choral_server.ledger import Left
from choral_server.records import (
    ClientRecord,
    EventRecord,
    MemberRecord,
    RunRecord,
    RunState,
    SpendingRecord,
    Told,
    VersionRecord,
)
from choral_server.rounds import Part, Round, RoundState

_RUN_STATES = {
    RunState.WAITING: pb.RUN_STATE_WAITING,
    RunState.IN_ROUND: pb.RUN_STATE_IN_ROUND,
    RunState.PAUSED: pb.RUN_STATE_PAUSED,
    RunState.FINISHED: pb.RUN_STATE_FINISHED,
    RunState.STOPPED: pb.RUN_STATE_STOPPED,
    RunState.FAILED: pb.RUN_STATE_FAILED,
}
_ROUND_STATES = {
    RoundState.OPEN: pb.ROUND_STATE_OPEN,
    RoundState.CLOSED: pb.ROUND_STATE_CLOSED,
    RoundState.DONE: pb.ROUND_STATE_DONE,
    RoundState.ABANDONED: pb.ROUND_STATE_ABANDONED,
}


def change(record: Told) -> pb.WatchResponse:
    """A record as a change of it."""
    match record:
        case RunRecord():
            return pb.WatchResponse(run=run(record))
        case Round():
            return pb.WatchResponse(round=round_(record))
        case ClientRecord():
            return pb.WatchResponse(client=client(record))
        case VersionRecord():
            return pb.WatchResponse(version=version(record))
        case EventRecord():
            return pb.WatchResponse(event=event(record))
        case MemberRecord():
            return pb.WatchResponse(member=member(record))
        case SpendingRecord():
            return pb.WatchResponse(spending=spending(record))


def run(record: RunRecord) -> pb.Run:
    """To protobuf."""
    return pb.Run(
        name=record.name,
        task=record.task,
        state=_RUN_STATES[record.state],
        reason=record.reason,
        rounds_planned=record.rounds_planned,
        rounds_done=record.rounds_done,
        latest_version=record.latest,
        best_version=record.progress.best,
        next_round_at=timestamp(record.next_round_at),
    )


def round_(record: Round) -> pb.Round:
    """To protobuf."""
    return pb.Round(
        run=record.run,
        number=record.number,
        kind=wire.KINDS[record.kind],
        state=_ROUND_STATES[record.state],
        reason=record.reason,
        version=record.version,
        parts=map(_part, record.parts.values()),
        opened_at=timestamp(record.opened_at),
        duration_s=record.duration_s,
        goal=record.goal,
        quorum=record.quorum,
    )


def _part(part: Part) -> pb.Part:
    return pb.Part(
        assignment=part.assignment,
        client=part.client,
        state=part.state.value,
        reason=part.reason,
        examples=part.examples,
        held_out=wire.metrics_to_pb(part.held_out),
        work=wire.metrics_to_pb(part.work),
        codec=part.codec,
        payload_bytes=part.payload_bytes,
    )


def client(record: ClientRecord) -> pb.Client:
    """To protobuf."""
    return pb.Client(
        name=record.name,
        attending=record.attending,
        examples=record.examples,
        software=record.software,
        address=record.address,
        heard_at=timestamp(record.heard_at),
        accepted=record.accepted,
        reason=record.reason,
        refused=record.refused,
        quarantine=record.quarantine,
        away_until=timestamp(record.away_until) if record.away_until is not None else None,
    )


def version(record: VersionRecord) -> pb.Version:
    """To protobuf."""
    return pb.Version(
        run=record.run,
        version=wire.version_to_pb(record.version),
        test=wire.metrics_to_pb(record.test),
        clients=wire.metrics_to_pb(record.clients),
        checkpoint=record.checkpoint,
        published_at=timestamp(record.published_at),
    )


def event(record: EventRecord) -> pb.Event:
    """To protobuf."""
    return pb.Event(
        at=timestamp(record.at),
        what=record.what,
        run=record.run,
        round=record.round,
        client=record.client,
        told=record.told,
        by=record.by,
    )


def member(record: MemberRecord) -> pb.Member:
    """To protobuf."""
    return pb.Member(
        name=record.name,
        role=record.role.value,
        key=record.key,
        signing_key=record.signing_key,
        enrolled_at=timestamp(record.enrolled_at),
        expires_at=timestamp(record.expires_at),
        revoked_at=timestamp(record.revoked_at),
        reason=record.reason,
    )


def spending(record: SpendingRecord) -> pb.Spending:
    """To protobuf."""
    release = record.release
    return pb.Spending(
        run=record.run,
        round=record.round,
        kind=wire.KINDS[record.kind],
        at=timestamp(record.at),
        noise=release.noise,
        clip=record.clip,
        sampling=release.sampling.value,
        expected=release.expected,
        population=release.population,
        delta=record.delta,
        epsilon_models=record.epsilon_models,
        epsilon_coordinator=record.epsilon_coordinator,
        state=record.state.value,
        next_clip=record.next_clip,
        rounds=record.rounds,
        mode=record.mode,
    )


def budget(left: Left) -> pb.Budget:
    """To protobuf."""
    return pb.Budget(**asdict(left))


def finding(found: Finding) -> pb.Finding:
    """To protobuf."""
    return pb.Finding(subject=found.subject, good=found.good, found=found.found, cure=found.cure)


def timestamp(moment: datetime | None) -> Timestamp | None:
    """To protobuf."""
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
