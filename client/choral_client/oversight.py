"""The guard at work: asked before each step, and all through the local work."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import structlog
from choral.errors import Declined
from choral.plan import Plan

from choral_client.day_book import DayBook
from choral_client.guard import Guard, IPAddress
from choral_client.guard_file import GuardFile
from choral_client.privacy_book import EXAMPLE, PrivacyBook, losses_of
from choral_client.train import Stopped

log = structlog.get_logger()
TICK_S = 10.0  # how often work under way is held against the guard; a client that is killed may lose so much of its day


def local_time() -> datetime:
    """The time on this device's wall clock."""
    return datetime.now().astimezone()


class Oversight:
    """Holds what a coordinator asks for against the guard. `now` is local time, `address` the device's own; both may block.

    `examples` is how many this client trains on.
    """

    def __init__(
        self,
        file: GuardFile,
        folder: Path,
        address: Callable[[], IPAddress | None] = lambda: None,
        now: Callable[[], datetime] = local_time,
        tick_s: float = TICK_S,
        examples: int = 1,
    ) -> None:
        self._file = file
        self._book = DayBook(folder)
        self._privacy = PrivacyBook(folder)
        self._examples = examples
        self._address = address
        self._now = now
        self._tick_s = tick_s

    def admit(self, plan: Plan, *, paid: bool = False) -> Guard:
        """The guard in force, if it allows an assignment, and what that costs in privacy, if it is not `paid`. Raises Declined."""
        guard = self._allowing(plan)
        if not paid:
            self._check_losses(guard, plan)
        return guard

    def charge(self, plan: Plan, assignment: str) -> None:
        """Write down what a result costs in privacy, before it is saved to be sent. Raises Declined: it may not leave."""
        losses = losses_of(plan, self._examples)
        if losses:
            self._check_losses(self._file.current(), plan)
            self._privacy.charge(losses, assignment, self._now())

    def _check_losses(self, guard: Guard, plan: Plan) -> None:
        """Whether what is lost of this client's privacy stays within what it, and the coordinator, allow. Raises Declined."""
        losses = losses_of(plan, self._examples)
        for hidden in sorted({loss.hidden for loss in losses}):
            epsilon = partial(self._privacy.epsilon, hidden, more=losses)
            if guard.cap(hidden) is not None:
                guard.check_loss(hidden, epsilon(guard.delta), self._privacy.epsilon(hidden, guard.delta))
            if hidden == EXAMPLE and plan.examples is not None and (lost := epsilon(plan.examples.delta)) > plan.examples.epsilon:
                raise Declined(
                    f"the run allows this client's examples to lose ε {plan.examples.epsilon:g} (run.example_privacy), and this "
                    f"round would make it {lost:.4g}: more noise, fewer epochs, or no further rounds"
                )

    def permit_sending(self, masked: bool, hidden: Collection[str] = frozenset()) -> None:
        """Whether a result may leave, also one of an earlier start, whose plan is not known any more. Raises Declined."""
        guard = self._file.current()
        guard.check_sending(self._now(), self._place(guard), masked=masked, hidden=hidden)
        for name in hidden:  # its losses are written down, and the guard may have been tightened since
            if guard.cap(name) is not None:
                guard.check_loss(name, lost := self._privacy.epsilon(name, guard.delta), lost)

    def permit_fetching(self) -> None:
        """Whether a version may be fetched that nobody is asked to work on. Raises Declined."""
        guard = self._file.current()
        guard.check_conditions(self._now(), self._place(guard))

    @contextmanager
    def watching(self, plan: Plan, stop: threading.Event) -> Iterator[None]:
        """Around the work: sets `stop` once it may not go on. Raises Declined: so it was, even if the work was done by then."""
        watch = _Watch(lambda: self._allowing(plan), self._book, self._now, self._tick_s, stop)
        watch.begin()
        try:
            yield
        except Stopped:
            watch.end()
            raise
        except BaseException:
            watch.close()
            raise
        watch.end()

    def _allowing(self, plan: Plan) -> Guard:
        guard, now = self._file.current(), self._now()
        guard.check(plan, now, self._place(guard))
        if guard.max_work_s_per_day is not None and self._book.worked_s(now.date()) >= guard.max_work_s_per_day:
            raise Declined(
                f"this device's guard allows {guard.max_work_s_per_day:g} s of work a day (max_work_s_per_day), "
                "and they are used up for today"
            )
        return guard

    def _place(self, guard: Guard) -> IPAddress | None:
        return self._address() if guard.networks is not None else None


class _Watch:
    """Over one piece of work, from a thread of its own. Time is booked a tick in advance, and given back if not used."""

    def __init__(
        self, admit: Callable[[], Guard], book: DayBook, now: Callable[[], datetime], tick_s: float, stop: threading.Event
    ) -> None:
        self._admit = admit
        self._book = book
        self._now = now
        self._tick_s = tick_s
        self._stop = stop
        self._began = time.monotonic()
        self._booked_s = 0.0
        self._counting = threading.Lock()
        self._over = threading.Event()
        self._refused: Declined | None = None

    def begin(self) -> None:
        """Look for the first time, and then again and again. Raises Declined: it may not even begin."""
        first_s = self._look()
        threading.Thread(target=self._keep, args=(first_s,), daemon=True, name="choral-guard").start()

    def close(self) -> None:
        """The work has ended: count it."""
        self._over.set()
        with self._counting:
            if self._booked_s > 0:
                self._book.add(self._now().date(), self._worked_s - self._booked_s)

    def end(self) -> None:
        """The same. Raises Declined: it was ended, or ought to have been."""
        self.close()
        if self._refused is not None:
            raise self._refused

    @property
    def _worked_s(self) -> float:
        return time.monotonic() - self._began

    def _keep(self, next_s: float) -> None:
        try:
            while not self._over.wait(next_s):
                next_s = self._look()
        except Declined as error:
            self._refuse(error)
        except Exception as error:
            log.exception("the guard failed")
            self._refuse(Declined(f"this device's guard failed ({type(error).__name__}: {error}), so nothing is done"))

    def _refuse(self, error: Declined) -> None:
        self._refused = error
        self._stop.set()

    def _look(self) -> float:
        """Seconds until the next look. Raises Declined: the work may not go on."""
        guard = self._admit()
        left_s = math.inf if guard.max_work_s is None else guard.max_work_s - self._worked_s
        if left_s <= 0:
            raise Declined(f"the work took longer than the {guard.max_work_s:g} s that this device's guard allows (max_work_s)")
        next_s = min(self._tick_s, left_s)
        if guard.max_work_s_per_day is not None:
            next_s = self._booked(next_s, guard.max_work_s_per_day)
        return next_s

    def _booked(self, next_s: float, per_day_s: float) -> float:
        """Book the time until the next look, as far as the day has any left; returns how long that is."""
        with self._counting:
            day = self._now().date()
            late_s = self._worked_s - self._booked_s  # since the last look was due
            next_s = min(next_s, max(per_day_s - self._book.worked_s(day) - late_s, 0.0))
            if not self._over.is_set():
                self._book.add(day, late_s + next_s)
                self._booked_s += late_s + next_s
            return next_s
