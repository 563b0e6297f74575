"""The Admin servicer: what operators ask, translated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc
import structlog
from choral.errors import ChoralError, ConfigError, Unreachable
from choral.status import abort
from choral.v1 import admin_pb2 as pb
from choral.v1 import admin_pb2_grpc
from choral.wire import brief

from choral_server import admin_messages as messages
from choral_server.caller import Role
from choral_server.coordinator import Coordinator
from choral_server.diagnosis import diagnose, moving
from choral_server.membership import Membership
from choral_server.store import Store

log = structlog.get_logger()
_DEFAULT_LIMIT = 100
_PATIENCE_S = 10.0
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class AdminService(admin_pb2_grpc.AdminServicer):
    """What operators reach."""

    def __init__(self, coordinator: Coordinator, store: Store, membership: Membership) -> None:
        self._coordinator = coordinator
        self._store = store
        self._membership = membership
        self._under_way: set[asyncio.Future[Any]] = set()

    async def StartRun(self, request: pb.StartRunRequest, context: Context) -> pb.StartRunResponse:
        """Begin a further run."""
        if request.rounds < 0:
            await abort(context, ConfigError(f"rounds {request.rounds}: give 1 or more, or 0 for as many as configured"))
        return pb.StartRunResponse(run=await self._run(context, self._coordinator.start(request.rounds, request.from_latest)))

    async def PauseRun(self, request: pb.PauseRunRequest, context: Context) -> pb.PauseRunResponse:
        """Open no further round."""
        return pb.PauseRunResponse(run=await self._run(context, self._coordinator.pause()))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        """Go on."""
        return pb.ResumeRunResponse(run=await self._run(context, self._coordinator.resume()))

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        """End the run."""
        return pb.StopRunResponse(run=await self._run(context, self._coordinator.stop()))

    async def TriggerRound(self, request: pb.TriggerRoundRequest, context: Context) -> pb.TriggerRoundResponse:
        """Open a round now."""
        return pb.TriggerRoundResponse(run=await self._run(context, self._coordinator.trigger()))

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        """Publish an earlier version as the newest."""
        return pb.RollBackResponse(run=await self._run(context, self._coordinator.roll_back(request.version)))

    async def QuarantineClient(self, request: pb.QuarantineClientRequest, context: Context) -> pb.QuarantineClientResponse:
        """Take no more results from a client."""
        reason = request.reason or "an operator said so"
        record = await self._done(context, self._coordinator.attendance.quarantine(request.client, reason))
        return pb.QuarantineClientResponse(client=messages.client(record))

    async def ReleaseClient(self, request: pb.ReleaseClientRequest, context: Context) -> pb.ReleaseClientResponse:
        """Let a client take part again."""
        record = await self._done(context, self._coordinator.attendance.release(request.client))
        return pb.ReleaseClientResponse(client=messages.client(record))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """The runs."""
        return pb.ListRunsResponse(runs=map(messages.run, reversed(self._store.runs.values())))

    async def ListRounds(self, request: pb.ListRoundsRequest, context: Context) -> pb.ListRoundsResponse:
        """The rounds of a run, or one of them."""
        run = await self._named(request.run, context)
        if request.HasField("number"):
            one = await self._done(context, self._store.round(run, request.number))
            return pb.ListRoundsResponse(rounds=[messages.round_(one)] if one is not None else [])
        rounds = await self._done(context, self._store.rounds(run, request.limit or _DEFAULT_LIMIT))
        return pb.ListRoundsResponse(rounds=map(messages.round_, rounds))

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsResponse:
        """The clients."""
        self._coordinator.attendance.note_heard()
        by_name = sorted(self._store.clients.values(), key=lambda client: client.name)
        return pb.ListClientsResponse(clients=map(messages.client, by_name))

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        """The versions of a run."""
        run = await self._named(request.run, context)
        versions = await self._done(context, self._store.versions(run, request.limit or _DEFAULT_LIMIT))
        return pb.ListVersionsResponse(versions=map(messages.version, versions))

    async def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsResponse:
        """What happened."""
        if request.run:
            await self._named(request.run, context)
        events = await self._done(context, self._store.events(request.limit or _DEFAULT_LIMIT, request.run, request.client))
        return pb.ListEventsResponse(events=map(messages.event, events))

    async def Diagnose(self, request: pb.DiagnoseRequest, context: Context) -> pb.DiagnoseResponse:
        """Why the run moves, or does not."""
        findings = diagnose(self._coordinator.condition())
        return pb.DiagnoseResponse(moving=moving(findings), findings=map(messages.finding, findings))

    async def ListSpendings(self, request: pb.ListSpendingsRequest, context: Context) -> pb.ListSpendingsResponse:
        """What was spent of the privacy budget, and what is left."""
        if request.run:
            await self._named(request.run, context)
        if request.client and request.client not in self._store.clients:
            await abort(
                context, ConfigError(f"client {request.client[:80]!r} is unknown: `choral clients list` shows those there are")
            )
        of_client = await self._done(context, self._store.spent_by(request.client)) if request.client else None
        all_of_it = of_client if of_client is not None else self._store.spendings.values()
        newest = [one for one in all_of_it if request.run in ("", one.run)][::-1][: request.limit or _DEFAULT_LIMIT]
        answer = pb.ListSpendingsResponse(spendings=map(messages.spending, newest))
        if (ledger := self._coordinator.run.ledger) is not None:
            answer.budget.CopyFrom(messages.budget(await self._done(context, asyncio.to_thread(ledger.left))))
            if of_client is not None:
                answer.epsilon_client = await self._done(context, asyncio.to_thread(ledger.cost, of_client))
        return answer

    async def ChargePrivacy(self, request: pb.ChargePrivacyRequest, context: Context) -> pb.ChargePrivacyResponse:
        """Count rounds that are not known here."""
        if request.rounds < 1:
            await abort(context, ConfigError(f"rounds {request.rounds}: give 1 or more"))
        spending = await self._done(context, self._coordinator.charge(request.rounds, brief(request.reason)))
        return pb.ChargePrivacyResponse(spending=messages.spending(spending))

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Context) -> pb.IssueTokenResponse:
        """A token with which somebody enrols."""
        roles = {role.value: role for role in Role}
        if (role := request.role or Role.DEVICE.value) not in roles:
            await abort(context, ConfigError(f"role {role[:80]!r} is unknown: give {', '.join(roles)}"))
        asked = request.name, roles[role], request.expires_s, request.replace
        token, expires_at = await self._done(context, self._membership.issue(*asked))
        return pb.IssueTokenResponse(token=str(token), expires_at=messages.timestamp(expires_at))

    async def ListMembers(self, request: pb.ListMembersRequest, context: Context) -> pb.ListMembersResponse:
        """Who belongs, or did."""
        by_name = sorted(self._store.members.values(), key=lambda member: member.name)
        return pb.ListMembersResponse(members=map(messages.member, by_name))

    async def RevokeMember(self, request: pb.RevokeMemberRequest, context: Context) -> pb.RevokeMemberResponse:
        """Let somebody in no more."""
        reason = brief(request.reason) or "an operator said so"
        return pb.RevokeMemberResponse(
            member=messages.member(await self._done(context, self._membership.revoke(request.name, reason)))
        )

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """Every change."""
        async for record in self._store.watch():
            yield messages.change(record)

    async def _run(self, context: Context, command: Awaitable[None]) -> pb.Run:
        await self._done(context, command)
        return messages.run(self._coordinator.run.record)

    async def _done(self, context: Context, command: Awaitable[T]) -> T:
        """The result of a command. What fails ends the call with the reason; what cannot be stored now goes on without it."""
        doing = asyncio.ensure_future(command)
        self._under_way.add(doing)
        doing.add_done_callback(self._over)
        await asyncio.wait({doing}, timeout=_PATIENCE_S)
        if not doing.done():
            troubles = "; ".join(f"{subject}: {reason}" for subject, reason in self._coordinator.troubles.items())
            why = troubles or "the coordinator is busy"
            await abort(context, Unreachable(f"this takes longer ({why}): it is done as soon as that is over, look then"))
        try:
            return doing.result()
        except ChoralError as error:
            await abort(context, error)

    def _over(self, doing: asyncio.Future[Any]) -> None:
        self._under_way.discard(doing)
        if not doing.cancelled() and (error := doing.exception()) is not None:
            log.info("command refused", reason=str(error))

    async def _named(self, name: str, context: Context) -> str:
        if name and name not in self._store.runs:
            await abort(context, ConfigError(f"run {name!r} is unknown; there are {', '.join(self._store.runs)}"))
        return name or self._coordinator.run.record.name
