"""Who may call what: one table, and the gate in front of every service that goes by it."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc
import structlog
from choral.errors import ChoralError, InvalidMessage, LimitExceeded, NotAllowed, Unauthenticated
from choral.status import abort

from choral_server.caller import CALLER, NOBODY, Caller, Role

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]
Identify = Callable[[Context], Caller]

ANYONE: frozenset[Role] = frozenset()
"""also without a certificate"""
EVERY_MEMBER = frozenset(Role)
DEVICES = frozenset({Role.DEVICE})
OPERATORS = frozenset({Role.OPERATOR})
THOSE_WHO_LOOK = frozenset({Role.OPERATOR, Role.VIEWER})

NEEDS: Mapping[str, frozenset[Role]] = {
    "/choral.v1.Federation/Attend": DEVICES,
    "/choral.v1.Federation/Download": DEVICES,
    "/choral.v1.Federation/Upload": DEVICES,
    "/choral.v1.Federation/ResumeUpload": DEVICES,
    "/choral.v1.Enrolment/Enrol": ANYONE,
    "/choral.v1.Enrolment/Renew": EVERY_MEMBER,
    "/choral.v1.Admin/StartRun": OPERATORS,
    "/choral.v1.Admin/PauseRun": OPERATORS,
    "/choral.v1.Admin/ResumeRun": OPERATORS,
    "/choral.v1.Admin/StopRun": OPERATORS,
    "/choral.v1.Admin/TriggerRound": OPERATORS,
    "/choral.v1.Admin/RollBack": OPERATORS,
    "/choral.v1.Admin/QuarantineClient": OPERATORS,
    "/choral.v1.Admin/ReleaseClient": OPERATORS,
    "/choral.v1.Admin/IssueToken": OPERATORS,
    "/choral.v1.Admin/RevokeMember": OPERATORS,
    "/choral.v1.Admin/ChargePrivacy": OPERATORS,
    "/choral.v1.Admin/ListRuns": THOSE_WHO_LOOK,
    "/choral.v1.Admin/ListRounds": THOSE_WHO_LOOK,
    "/choral.v1.Admin/ListClients": THOSE_WHO_LOOK,
    "/choral.v1.Admin/ListVersions": THOSE_WHO_LOOK,
    "/choral.v1.Admin/ListEvents": THOSE_WHO_LOOK,
    "/choral.v1.Admin/ListSpendings": THOSE_WHO_LOOK,
    "/choral.v1.Admin/ListMembers": THOSE_WHO_LOOK,
    "/choral.v1.Admin/Diagnose": THOSE_WHO_LOOK,
    "/choral.v1.Admin/Watch": THOSE_WHO_LOOK,
    "/grpc.health.v1.Health/Check": EVERY_MEMBER,
    "/grpc.health.v1.Health/List": EVERY_MEMBER,
    "/grpc.health.v1.Health/Watch": EVERY_MEMBER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": EVERY_MEMBER,
}
"""What each method needs. One that is not here is nobody's."""


@dataclass(eq=False, slots=True)
class Call:
    """A call that is being answered; `error` is why it is to end before it is done."""

    task: asyncio.Task[Any]
    error: ChoralError | None = None

    def end(self, error: ChoralError) -> None:
        """End it with this error."""
        self.error = error
        self.task.cancel()


CALL: ContextVar[Call] = ContextVar("call")
"""the call that is being answered"""


@dataclass(slots=True)
class Account:
    """What one caller has open, and how much more it may begin: a bucket that fills up to ten seconds' worth."""

    left: float
    filled_at: float
    told_at: float = -math.inf
    open: set[Call] = field(default_factory=set)


class Gate(grpc.aio.ServerInterceptor):
    """Lets through who may. `identify` says who calls, `calls` how many one may have open and `calls_per_s` begin; a call's one
    request has to come within `first_message_s`.

    `refused(caller, error)` hears of those who are not let through, of each kind of caller at most once a second.
    """

    def __init__(
        self,
        identify: Identify,
        first_message_s: float,
        calls: float = math.inf,
        calls_per_s: float = math.inf,
        refused: Callable[[Caller, ChoralError], None] = lambda caller, error: None,
    ) -> None:
        self._identify = identify
        self._first_message_s = first_message_s
        self._calls = calls
        self._calls_per_s = calls_per_s
        self._refused = refused
        self._most_at_once = 10 * calls_per_s
        self._accounts: defaultdict[str, Account] = defaultdict(lambda: Account(self._most_at_once, time.monotonic()))
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def end_calls(self, name: str, error: ChoralError) -> None:
        """End all calls of one caller."""
        for call in tuple(self._accounts[name].open) if name in self._accounts else ():
            call.end(error)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's handler behind the gate."""
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = _with(handler, self._guarded(method, handler))
        return self._handlers[method]

    def _guarded(self, method: str, handler: Any) -> Callable[..., Any]:
        """The handler, as one that reads its requests itself: for a single one gRPC would wait for ever, and we not hear of it."""
        behaviour = _behaviour(handler)

        async def unary(requests: Any, context: Context) -> Any:
            async with self._answering(method, context):
                return await behaviour(await self._asked(handler, requests), context)

        async def stream(requests: Any, context: Context) -> None:
            async with self._answering(method, context):
                answers = behaviour(await self._asked(handler, requests), context)
                if inspect.isawaitable(answers):
                    await answers
                    return
                async with aclosing(answers):
                    async for answer in answers:
                        await context.write(answer)  # in our hands, and so to be ended while nobody reads it

        return stream if handler.response_streaming else unary

    async def _asked(self, handler: Any, requests: Any) -> Any:
        """What the handler is given. Raises LimitExceeded or InvalidMessage: the one request does not come."""
        if handler.request_streaming:
            return requests
        try:
            async with asyncio.timeout(self._first_message_s):
                request = await anext(requests, None)
        except TimeoutError:
            raise LimitExceeded(f"no request came within {self._first_message_s:g} s (limits.first_message_s)") from None
        if request is None:
            raise InvalidMessage("the call ended without a request")
        return request

    def _admitted(self, method: str, context: Context) -> Caller:
        """Who calls, if it may. Who may not is counted as well. Raises Unauthenticated, Revoked, NotAllowed or LimitExceeded."""
        needed = NEEDS.get(method)
        try:
            caller = NOBODY if needed is ANYONE else self._identify(context)
        except ChoralError:
            self._take(NOBODY)
            raise
        self._take(caller)
        if needed is None:
            raise NotAllowed(f"{method} is not offered to anybody")
        if needed is not ANYONE and caller.role not in needed:
            raise _not_for(caller, method, needed)
        return caller

    def _take(self, caller: Caller) -> None:
        account, now = self._accounts[caller.name], time.monotonic()
        if self._most_at_once < math.inf:
            account.left = min(self._most_at_once, account.left + (now - account.filled_at) * self._calls_per_s)
        account.filled_at = now
        if len(account.open) >= self._calls:
            raise LimitExceeded(
                f"{caller.name or 'this side'} has {len(account.open)} calls open: at most {self._calls} (limits.calls)"
            )
        if account.left < 1:
            raise LimitExceeded(f"{caller.name or 'this side'} calls more than {self._calls_per_s:g} times a second: wait a little")
        account.left -= 1

    async def _turn_away(self, error: ChoralError, method: str, context: Context) -> NoReturn:
        try:
            caller = NOBODY if NEEDS.get(method) is ANYONE else self._identify(context)
        except ChoralError:
            caller = NOBODY
        account, now = self._accounts[caller.name], time.monotonic()
        if now - account.told_at > 1:  # neither the log nor the disk is for strangers to fill
            account.told_at = now
            log.warning("call refused", client=caller.name, address=context.peer(), reason=str(error))
            self._refused(caller, error)
        await abort(context, error)

    @asynccontextmanager
    async def _answering(self, method: str, context: Context) -> AsyncIterator[Call]:
        """Around the answer of a call by who may call, until that is given or the call is to end."""
        try:
            caller = self._admitted(method, context)
        except ChoralError as error:
            await self._turn_away(error, method, context)
        call = Call(this_task())
        CALLER.set(caller)  # each call is answered in a task of its own
        CALL.set(call)
        account, expiry = self._accounts[caller.name], self._expiry(caller, call)
        account.open.add(call)
        try:
            yield call
        except asyncio.CancelledError:
            if call.error is None:
                raise
            call.task.uncancel()
            await abort(context, call.error)
        except (LimitExceeded, InvalidMessage) as error:  # before the handler, which ends its calls itself
            await abort(context, error)
        finally:
            if expiry is not None:
                expiry.cancel()
            account.open.discard(call)

    def _expiry(self, caller: Caller, call: Call) -> asyncio.TimerHandle | None:
        if caller.expires_at is None:
            return None
        left_s = (caller.expires_at - datetime.now(UTC)).total_seconds()
        error = Unauthenticated(f"the certificate of {caller.name} has expired: enrol again with a new token")
        return asyncio.get_running_loop().call_later(left_s, call.end, error)


def of_certificate(find: Callable[[bytes], Caller]) -> Identify:
    """Who calls is who shows the certificate that `find` knows."""

    def identify(context: Context) -> Caller:
        shown = list(context.auth_context().get("x509_pem_cert", ()))
        if not shown:
            raise Unauthenticated("no certificate was shown: enrol with a token, which `choral server token` prints")
        return find(bytes(shown[0]))

    return identify


def always(caller: Caller) -> Identify:
    """Whoever can reach the address is `caller`."""
    return lambda context: caller


def this_task() -> asyncio.Task[Any]:
    """The task in which a call is answered."""
    task = asyncio.current_task()
    if task is None:
        raise AssertionError("calls are answered in tasks")
    return task


def _not_for(caller: Caller, method: str, needed: frozenset[Role]) -> ChoralError:
    what = f"{method.rpartition('/')[2]} needs the role {' or '.join(sorted(role.value for role in needed))}"
    if caller.role is None:
        return Unauthenticated(f"{what}, and a certificate that shows it: none is asked for at this address")
    return NotAllowed(f"{what}; {caller.name or 'whoever calls here'} is {caller.role.value}")


def _behaviour(handler: Any) -> Callable[..., Any]:
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    behaviour: Callable[..., Any] = getattr(handler, kind)
    return behaviour


def _with(handler: Any, behaviour: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
