"""The Admin servicer: what operators ask, translated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

import grpc
from choral import wire
from choral.errors import ChoralError, ConfigError
from choral.status import abort
from choral.v1 import admin_pb2 as pb
from choral.v1 import admin_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from choral_server.coordinator import Coordinator
from choral_server.rounds import Part, Round, RoundState
from choral_server.store import ClientRecord, Record, RunRecord, RunState, Store, VersionRecord, newest

_DEFAULT_LIMIT = 100
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
    RoundState.DONE: pb.ROUND_STATE_DONE,
    RoundState.ABANDONED: pb.ROUND_STATE_ABANDONED,
}
Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(admin_pb2_grpc.AdminServicer):
    """What operators reach."""

    def __init__(self, coordinator: Coordinator, store: Store) -> None:
        self._coordinator = coordinator
        self._store = store

    async def StartRun(self, request: pb.StartRunRequest, context: Context) -> pb.StartRunResponse:
        """Begin a further run."""
        if request.rounds < 0:
            await abort(context, ConfigError(f"rounds {request.rounds}: give 1 or more, or 0 for as many as configured"))
        return pb.StartRunResponse(
            run=await self._do(context, lambda: self._coordinator.start(request.rounds, request.from_latest))
        )

    async def PauseRun(self, request: pb.PauseRunRequest, context: Context) -> pb.PauseRunResponse:
        """Open no further round."""
        return pb.PauseRunResponse(run=await self._do(context, self._coordinator.pause))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        """Go on."""
        return pb.ResumeRunResponse(run=await self._do(context, self._coordinator.resume))

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        """End the run."""
        return pb.StopRunResponse(run=await self._do(context, self._coordinator.stop))

    async def TriggerRound(self, request: pb.TriggerRoundRequest, context: Context) -> pb.TriggerRoundResponse:
        """Open a round now."""
        return pb.TriggerRoundResponse(run=await self._do(context, self._coordinator.trigger))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """The runs."""
        return pb.ListRunsResponse(runs=map(_run, newest(self._store.runs.values(), len(self._store.runs))))

    async def ListRounds(self, request: pb.ListRoundsRequest, context: Context) -> pb.ListRoundsResponse:
        """The rounds of a run."""
        run = await self._named(request.run, context)
        rounds = (record for record in self._store.rounds.values() if record.run == run)
        return pb.ListRoundsResponse(rounds=map(_round, newest(rounds, request.limit or _DEFAULT_LIMIT)))

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsResponse:
        """The clients."""
        by_name = sorted(self._store.clients.values(), key=lambda client: client.name)
        return pb.ListClientsResponse(clients=map(_client, by_name))

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        """The versions of a run."""
        run = await self._named(request.run, context)
        versions = (record for record in self._store.versions.values() if record.run == run)
        return pb.ListVersionsResponse(versions=map(_version, newest(versions, request.limit or _DEFAULT_LIMIT)))

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """Every change."""
        async for record in self._store.watch():
            yield _change(record)

    async def _do(self, context: Context, command: Callable[[], None]) -> pb.Run:
        try:
            command()
        except ChoralError as error:
            await abort(context, error)
        return _run(self._coordinator.run.record)

    async def _named(self, name: str, context: Context) -> str:
        if name and name not in self._store.runs:
            await abort(context, ConfigError(f"run {name!r} is unknown; there are {', '.join(self._store.runs)}"))
        return name or self._coordinator.run.record.name


def _change(record: Record) -> pb.WatchResponse:
    match record:
        case RunRecord():
            return pb.WatchResponse(run=_run(record))
        case Round():
            return pb.WatchResponse(round=_round(record))
        case ClientRecord():
            return pb.WatchResponse(client=_client(record))
        case VersionRecord():
            return pb.WatchResponse(version=_version(record))


def _run(record: RunRecord) -> pb.Run:
    return pb.Run(
        name=record.name,
        task=record.task,
        state=_RUN_STATES[record.state],
        reason=record.reason,
        rounds_planned=record.rounds_planned,
        rounds_done=record.rounds_done,
        latest_version=record.latest,
        best_version=record.progress.best,
        next_round_at=_timestamp(record.next_round_at),
    )


def _round(record: Round) -> pb.Round:
    return pb.Round(
        run=record.run,
        number=record.number,
        kind=wire.KINDS[record.kind],
        state=_ROUND_STATES[record.state],
        reason=record.reason,
        version=record.version,
        parts=map(_part, record.parts.values()),
        opened_at=_timestamp(record.opened_at),
        duration_s=record.duration_s,
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
    )


def _client(record: ClientRecord) -> pb.Client:
    return pb.Client(
        name=record.name,
        attending=record.attending,
        examples=record.examples,
        software=record.software,
        address=record.address,
        heard_at=_timestamp(record.heard_at),
        accepted=record.accepted,
        reason=record.reason,
    )


def _version(record: VersionRecord) -> pb.Version:
    return pb.Version(
        run=record.run,
        version=wire.version_to_pb(record.version),
        test=wire.metrics_to_pb(record.test),
        clients=wire.metrics_to_pb(record.clients),
        checkpoint=str(record.checkpoint),
        published_at=_timestamp(record.published_at),
    )


def _timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
