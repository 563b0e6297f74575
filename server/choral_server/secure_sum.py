"""A round's secure sum under way: who is waited for at each step, what each client is told, and when it goes on or fails.

    adverts ─▶ shares ─▶ results ─▶ signatures ─▶ reveals ─▶ over

A step ends when all who are waited for have answered or are lost, or when its time is up; then `unmasking` says whether those who
are left are enough. Whatever of the mathematics is needed is there; the clients' results come in as uploads, like any.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Collection, Iterable

import structlog
from choral.errors import ChoralError, UpdateRefused
from choral.secagg.masks import Mask
from choral.sum_messages import (
    FromSummand,
    SumAdvert,
    SumRevealed,
    SumRoster,
    SumShares,
    SumSignature,
    SumSignatures,
    SumSurvivors,
    ToSummand,
)

from choral_server.rounds import Part
from choral_server.unmasking import TooFew, Unmasking

log = structlog.get_logger()


class TooLate(UpdateRefused):
    """A masked result comes when the sum has gone on without it: it cannot count, and its client has done nothing wrong."""


class Stage(enum.Enum):
    """What is waited for."""

    ADVERTS = "keys"
    SHARES = "shares of their secrets"
    RESULTS = "masked results"
    SIGNATURES = "signatures of who has survived"
    REVEALS = "shares of others' secrets"
    OVER = "nothing"


class SecureSum:
    """Leads the clients of one round through it; in the event loop's thread.

    `say(client, message)` tells a client. `step_s` is the time for a step, and `advancing()` are the clients whose transfers move,
    whose results are waited for longer, but no longer than `longest_s`. At least `quorum` results must be in the sum. In the end
    `unmask(mask)` takes the masks off, then `done()` is called; or `failed(reason)`.
    """

    def __init__(
        self,
        unmasking: Unmasking,
        quorum: int,
        step_s: float,
        longest_s: float,
        say: Callable[[str, ToSummand], None],
        advancing: Callable[[], Collection[str]],
        unmask: Callable[[Mask], Awaitable[None]],
        done: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        self._unmasking = unmasking
        self._quorum = quorum
        self._step_s = step_s
        self._longest_s = longest_s
        self._say = say
        self._advancing = advancing
        self._unmask = unmask
        self._done = done
        self._failed = failed
        self._stage = Stage.ADVERTS
        self._parts: dict[str, Part] = {}
        self._told: dict[str, ToSummand] = {}  # what each was told last
        self._answered: set[str] = set()
        self._awaited: set[str] = set()
        self._taking: set[str] = set()
        self._sent: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._trying: asyncio.Task[None] | None = None
        self._late: list[tuple[str, SumRevealed]] = []  # revealed while what was there is being tried

    # Before it begins

    def enter(self, said: SumAdvert) -> None:
        """A client is ready. What it showed before is forgotten. Raises UpdateRefused."""
        if self._stage is Stage.OVER:
            return
        if self._stage is not Stage.ADVERTS:
            if said.advert not in self._unmasking.roster.adverts:  # which may be said again when a link was broken
                raise UpdateRefused("the secure sum has begun with the keys that were shown by then: this client has lost those")
            return
        self._unmasking.renew_advert(said.advert)

    def begin(self, parts: Iterable[Part]) -> None:
        """With these, and no others."""
        self._parts = {part.client: part for part in parts if part.client in self._unmasking.advertised}
        for other in self._unmasking.advertised - self._parts.keys():
            self._unmasking.retract(other)
        self._go_on(Stage.SHARES, self._parts, lambda: self._unmasking.close_adverts())
        if self._stage is Stage.SHARES:
            for client, part in self._parts.items():
                self._tell(client, SumRoster(part.assignment, self._unmasking.roster.adverts))

    # What clients do

    def take(self, client: str, said: FromSummand) -> None:
        """What a client says in the sum; the same again does no harm. Raises UpdateRefused: it cannot be right."""
        if client in self._answered or self._stage is Stage.OVER:
            return
        match self._stage, said:
            case Stage.SHARES, SumShares():
                self._unmasking.take_shares(client, said.sealed)
            case Stage.SIGNATURES, SumSignature():
                self._unmasking.take_signature(client, said.signature)
            case Stage.REVEALS, SumRevealed():
                if self._trying is not None:
                    self._late.append((client, said))
                else:
                    self._unmasking.take_revealed(client, said.mask_seeds, said.key_seeds)
            case _:
                return  # of a step that is over
        self._answer(client)

    def expects(self, client: str) -> None:
        """Whether a client's masked result can be taken now. Raises TooLate, or UpdateRefused: too early."""
        if self._stage in (Stage.ADVERTS, Stage.SHARES):
            raise UpdateRefused(f"no masked result of {client} is waited for yet, but {self._stage.value}")
        if self._stage is Stage.OVER:
            raise TooLate(f"the secure sum that {client} was in is over")
        if self._stage is not Stage.RESULTS or client not in self._awaited:
            raise TooLate(f"the secure sum has gone on without {client}: its masked result came too late, or it had left")

    def taking(self, client: str) -> None:
        """A client's masked result has arrived, and is being stored: from now on it is in the sum. Raises UpdateRefused."""
        self.expects(client)
        if client not in self._sent:
            self._taking.add(client)

    def not_taken(self, client: str) -> None:
        """It was not, after all, and will not be: its part has ended meanwhile. The time for it may be up already."""
        if client in self._taking:
            self._taking.discard(client)
            self.lost(client)

    def sent(self, client: str) -> None:
        """A client's masked result is in the sum."""
        self._taking.discard(client)
        self._sent.add(client)
        self._answer(client)

    @property
    def results(self) -> int:
        """How many are in the sum."""
        return len(self._sent)

    def lost(self, client: str) -> None:
        """A client does not go on: nothing more is awaited from it."""
        if client in self._awaited - self._taking:
            self._awaited.discard(client)
            self._look()

    def remind(self, client: str) -> None:
        """Say again what a client was told last, if it has not answered: it was away."""
        if self._stage is not Stage.OVER and client in self._awaited - self._answered and client in self._told:
            self._say(client, self._told[client])

    def end(self) -> None:
        """Wait for nothing more."""
        self._stage = Stage.OVER
        if self._timer is not None:
            self._timer.cancel()
        if self._trying is not None:
            self._trying.cancel()

    # Step by step

    def _answer(self, client: str) -> None:
        self._answered.add(client)
        self._look()

    def _look(self) -> None:
        """Go on if nobody is waited for any more, or enough is known."""
        if self._stage is Stage.OVER or self._trying is not None:
            return
        if self._stage is Stage.REVEALS:
            if self._unmasking.complete or self._awaited <= self._answered:
                self._trying = asyncio.create_task(self._try())
        elif self._awaited <= self._answered:
            self._next()

    def _time_is_up(self) -> None:
        loop, silent = asyncio.get_running_loop(), self._awaited - self._answered - self._taking
        in_time = loop.time() - self._began < self._longest_s
        if self._stage is Stage.RESULTS and in_time and not silent.isdisjoint(self._advancing()):
            self._timer = loop.call_later(self._step_s, self._time_is_up)
            return
        log.warning("secure sum goes on without some", awaited=self._stage.value, clients=sorted(silent)[:10], number=len(silent))
        self._awaited -= silent
        self._look()

    def _next(self) -> None:
        """The step that follows, with those who have answered."""
        unmasking, there = self._unmasking, self._awaited & self._answered
        match self._stage:
            case Stage.SHARES:
                self._go_on(Stage.RESULTS, there, unmasking.close_shares)
                self._tell_all(lambda client, part: SumShares(part.assignment, unmasking.shares_for(client)))
            case Stage.RESULTS:
                self._go_on(Stage.SIGNATURES, there, self._close_results)
                self._tell_all(lambda _, part: SumSurvivors(part.assignment, unmasking.survivors))
            case Stage.SIGNATURES:
                self._go_on(Stage.REVEALS, there, unmasking.close_signatures)
                self._tell_all(lambda client, part: SumSignatures(part.assignment, unmasking.signatures_for(client)))

    def _close_results(self) -> None:
        if len(self._sent) < self._quorum:
            raise TooFew(f"{len(self._sent)} results are in the secure sum; the quorum is {self._quorum}")
        self._unmasking.close(self._sent)

    def _go_on(self, stage: Stage, clients: Iterable[str], close: Callable[[], object]) -> None:
        """To this stage, where an answer of each of these clients is awaited; unless the last cannot be closed: then it is over."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            close()
        except ChoralError as error:
            self._fail(str(error))
            return
        loop = asyncio.get_running_loop()
        self._stage, self._awaited, self._answered, self._began = stage, set(clients), set(), loop.time()
        self._timer = loop.call_later(self._step_s, self._time_is_up)

    def _tell_all(self, message: Callable[[str, Part], ToSummand]) -> None:
        if self._stage is not Stage.OVER:
            for client in sorted(self._awaited):
                self._tell(client, message(client, self._parts[client]))

    def _tell(self, client: str, message: ToSummand) -> None:
        self._told[client] = message
        self._say(client, message)

    async def _try(self) -> None:
        """Take the masks off with what has been revealed; if some of that is wrong, wait for more."""
        try:
            await self._unmask(await asyncio.to_thread(self._unmasking.mask))
        except TooFew as error:
            self._trying = None
            if self._take_late():
                self._look()
            elif self._awaited <= self._answered:
                self._fail(str(error))
        except ChoralError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("secure sum failed")
            self._fail(f"{type(error).__name__}: {error}")
        else:
            self._trying = None
            self.end()
            self._done()

    def _take_late(self) -> bool:
        """Take what was revealed meanwhile; whether anything was."""
        late, self._late = self._late, []
        for client, said in late:
            try:
                self._unmasking.take_revealed(client, said.mask_seeds, said.key_seeds)
            except UpdateRefused as error:
                log.warning("not revealed", client=client, reason=str(error))
        return bool(late)

    def _fail(self, reason: str) -> None:
        self._stage = Stage.OVER
        if self._timer is not None:
            self._timer.cancel()
        self._failed(f"the secure sum came to nothing: {reason}")
