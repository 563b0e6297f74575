"""Gets results across: each is offered until the coordinator has said what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import structlog
from choral.errors import ChoralError, TrustError
from choral.messages import Phase, Receipt, Status, Verdict
from choral.wire import CHUNK_BYTES

from choral_client.backoff import Patience
from choral_client.outbox import KEPT, Outbox, Parcel
from choral_client.transport import Payload, Transport

log = structlog.get_logger()


class Deliveries:
    """The results on their way, one task each, and at most as many as the outbox keeps.

    `report` tells the coordinator how an assignment goes, if it can hear. `permit` asks the device's guard before each attempt to
    send whether a result may leave, masked or not, with what noise hides in it, and raises Declined: the result is then forgotten,
    and not kept for a moment that the guard allows. `on_receipt` is called, in a thread, with what the coordinator says became of
    an assignment's result, before that is forgotten.
    """

    def __init__(
        self,
        transport: Transport,
        outbox: Outbox,
        patience: Patience,
        report: Callable[[Status], Awaitable[None]],
        permit: Callable[[bool, tuple[str, ...]], None],
        on_receipt: Callable[[str, Verdict], None] = lambda assignment, verdict: None,
    ) -> None:
        self._transport = transport
        self._outbox = outbox
        self._patience = patience
        self._report = report
        self._permit = permit
        self._on_receipt = on_receipt
        self._under_way: dict[str, asyncio.Task[bool]] = {}

    async def send(self, parcel: Parcel, payload: Payload) -> None:
        """Send a result that has just been saved; returns when it is settled. Goes on if the caller is cancelled."""
        await self._joined(parcel.header.assignment, self._settle(parcel, payload, fresh=True))

    async def send_saved(self, assignment: str) -> bool:
        """The same with one that was saved earlier; False: there is none. Goes on if the caller is cancelled."""
        if assignment not in self._under_way and assignment not in self._outbox:
            return False
        return await self._joined(assignment, self._settle_saved(assignment))

    async def offer_saved(self) -> None:
        """Begin to send whatever an earlier stream, or an earlier start of this client, has left."""
        for assignment in await asyncio.to_thread(self._outbox.assignments):
            self._begin(assignment, self._settle_saved(assignment))

    async def settled(self) -> None:
        """Wait until whatever is here to be sent has its receipt, or is forgotten, however long the link is broken."""
        await self.offer_saved()
        if self._under_way:
            await asyncio.wait(list(self._under_way.values()))

    def withdraw(self, assignment: str) -> bool:
        """Forget a result. Returns whether there was one."""
        task = self._under_way.pop(assignment, None)
        known = task is not None or assignment in self._outbox
        if task is not None:
            task.cancel()
        self._outbox.remove(assignment)
        return known

    async def linger(self, patience_s: float) -> None:
        """Wait a moment for receipts that are about to come."""
        tasks = list(self._under_way.values())
        if tasks:
            await asyncio.wait(tasks, timeout=patience_s)

    async def stop(self) -> None:
        """Stop; what has no receipt stays in the outbox."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _joined(self, assignment: str, settling: Coroutine[Any, Any, bool]) -> bool:
        return await asyncio.shield(self._begin(assignment, settling))

    def _begin(self, assignment: str, settling: Coroutine[Any, Any, bool]) -> asyncio.Task[bool]:
        """The task that sends this result: the one that is under way, or a new one."""
        if assignment in self._under_way:
            settling.close()
            return self._under_way[assignment]
        for oldest in list(self._under_way)[: 1 - KEPT]:  # or a coordinator that takes nothing could fill the memory
            log.warning("too many results are being sent; the oldest is given up", kept=KEPT)
            self.withdraw(oldest)
        task = self._under_way[assignment] = asyncio.create_task(settling)
        task.add_done_callback(lambda done: self._forget(assignment, done))
        return task

    def _forget(self, assignment: str, task: asyncio.Task[bool]) -> None:
        if self._under_way.get(assignment) is task:
            del self._under_way[assignment]

    async def _settle_saved(self, assignment: str) -> bool:
        saved = await asyncio.to_thread(self._outbox.load, assignment)
        return saved is not None and await self._settle(*saved, fresh=False)

    async def _settle(self, parcel: Parcel, payload: Payload, *, fresh: bool) -> bool:
        """Send, say in the log what became of it, and forget it. Returns True."""
        header = parcel.header
        try:
            receipt = await self._carry(parcel, payload, fresh)
        except TrustError as error:  # not the coordinator's word: the result is kept for it
            log.warning("not sent", round=parcel.round, reason=str(error))
            return True
        except ChoralError as error:
            log.warning("declined", round=parcel.round, reason=str(error))
            await self._report(Status(header.assignment, Phase.DECLINED, str(error)))
        except Exception as error:
            log.exception("sending failed", round=parcel.round)
            await self._report(Status(header.assignment, Phase.DECLINED, f"{type(error).__name__}: {error}"))
        else:
            await asyncio.to_thread(self._on_receipt, header.assignment, receipt.verdict)
            self._outbox.remove(header.assignment)
            told = log.info if receipt.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE) else log.warning
            measured = {metric.name: round(metric.value, 4) for metric in (*header.work, *header.held_out)}
            told("sent", round=parcel.round, verdict=receipt.verdict.value, reason=receipt.reason, **measured)
            return True
        self._outbox.remove(header.assignment)
        return True

    async def _carry(self, parcel: Parcel, payload: Payload, fresh: bool) -> Receipt:
        """The receipt, however often the link breaks: each attempt but a fresh result's first begins where the last one ended."""
        header, failures = parcel.header, 0
        await asyncio.to_thread(self._permit, parcel.masked, parcel.hidden)
        if len(payload) > CHUNK_BYTES:  # a small one arrives as soon as the word of it
            await self._report(Status(header.assignment, Phase.UPLOADING))
        while True:
            try:
                if not fresh:
                    answer = await self._transport.resume(header)
                    if isinstance(answer, Receipt):
                        return answer
                    if answer > header.offset:
                        failures = 0
                    header = replace(header, offset=answer)
                fresh = False
                return await self._transport.upload(header, payload)
            except ChoralError as error:
                if not error.retryable:
                    raise
                failures += 1
                log.warning("upload failed", round=parcel.round, reason=str(error), attempt=failures)
            await self._patience.pause(failures)
            await asyncio.to_thread(self._permit, parcel.masked, parcel.hidden)
