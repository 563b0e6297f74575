"""A round's secure sums side by side: who is in which, when the round has enough of them, and what those who are left out hear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from choral.codecs import MASKED
from choral.errors import ConfigError, UpdateRefused
from choral.messages import Cancel, Phase, Receipt, Status, Verdict
from choral.plan import Kind, digest_of
from choral.secagg.masks import Mask
from choral.secagg.roster import Terms
from choral.sum_messages import FromSummand, SumAdvert, SumRoster, SumShares, ToSummand
from choral_server.cohort import dealt
from choral_server.collection import Collection
from choral_server.config import ServerConfig
from choral_server.grouped_sum import GroupedSum
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.secure_groups import SecureGroups
from choral_server.secure_sum import SecureSum, TooLate
from choral_server.unmasking import Unmasking
from e2e.secure_sum import TERMS, People
from server.home import Home, config, home
from server.test_collection import Floor, floor, header_of

__all__ = ["home"]

NAMES = [f"client-{number}" for number in range(9)]
LONG_S = 600.0


# What the configuration takes


def secure(run: dict[str, Any], **settings: Any) -> ServerConfig:
    return config(run | {"secure_aggregation": settings})


@pytest.mark.parametrize(
    ("run", "settings", "told"),
    [
        ({"cohort_size": 9}, {"groups": 2}, r"groups: 2: the median of two is their mean; give 3 or more"),
        ({"cohort_size": 8}, {"groups": 3}, r"groups 3: of 8 clients .* a group has 2, and minimum_cohort is 3: fewer groups"),
        ({"cohort_size": 20, "quorum": 8}, {"groups": 3}, r"of 8 clients \(quorum, or cohort_size\) a group has 2"),
        ({"cohort_size": 9}, {"groups": 0}, r"groups"),
        ({"cohort_size": 1000}, {"groups": 101}, r"groups"),
    ],
)
def test_groups_that_hide_too_little_or_help_nobody_are_refused(run: dict[str, Any], settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        secure(run, **settings)


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        ({"cohort_size": 9}, {"groups": 3}),
        ({"cohort_size": 9, "quorum": 6}, {"groups": 3, "minimum_cohort": 2}),
        ({"cohort_size": 15, "quorum": 9}, {"groups": 3}),
    ],
)
def test_groups_that_are_large_enough_at_the_quorum_are_taken(run: dict[str, Any], settings: dict[str, Any]) -> None:
    chosen = secure(run, **settings).run.secure_aggregation
    assert chosen is not None
    assert [chosen.groups_of(kind) for kind in (Kind.TRAINING, Kind.STATISTICS, Kind.EVALUATION)] == [3, 1, 1]


# Groups of sums that do as they are told


class Scripted:
    """Stands in for the sum of a group: notes what it is asked, and ends when a test says so."""

    def __init__(self, done: Callable[[], None], failed: Callable[[str], None]) -> None:
        self.done = done
        self.failed = failed
        self.asked: list[tuple[str, ...]] = []
        self.members: list[str] = []
        self.fails_at_once = ""

    def enter(self, said: SumAdvert) -> None:
        self.asked.append(("enter", said.advert.client))

    def begin(self, parts: Iterable[Part]) -> None:
        self.members = [part.client for part in parts]
        if self.fails_at_once:
            self.failed(self.fails_at_once)

    def take(self, client: str, said: FromSummand) -> None:
        self.asked.append(("take", client))

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("expects", "taking", "not_taken", "sent", "lost", "remind", "end"):
            raise AttributeError(name)
        return lambda *client: self.asked.append((name, *client))

    @property
    def results(self) -> int:
        return len(self.members)


class Led:
    """Groups of scripted sums, and what became of them."""

    def __init__(self, count: int, quorum: int = 1) -> None:
        self.sums: list[Scripted] = []
        self.heard: list[tuple[Any, ...]] = []
        self.groups = SecureGroups(
            count,
            self._make,
            "1/0/group",
            quorum,
            lambda good: self.heard.append(("done", list(good))),
            lambda reason: self.heard.append(("failed", reason)),
            lambda clients, reason: self.heard.append(("lost", list(clients), reason)),
        )

    def _make(self, group: int, done: Callable[[], None], failed: Callable[[str], None]) -> SecureSum:
        assert group == len(self.sums)
        self.sums.append(Scripted(done, failed))
        return cast(SecureSum, self.sums[-1])

    def begun(self, names: Sequence[str] = NAMES) -> Led:
        parts = [Part(f"run/0/{name}", name, PartState.READY) for name in names]
        self.groups.divide(parts)
        self.groups.begin(parts)
        return self


def adverts(names: Sequence[str]) -> list[SumAdvert]:
    people = People.named(names)
    return [SumAdvert(f"run/0/{name}", people.masking(name).advertise()) for name in names]


def test_each_who_is_ready_is_in_one_group_as_they_are_dealt() -> None:
    led = Led(3).begun()
    assert led.groups.groups == dealt("1/0/group", NAMES, 3)
    for group, each in enumerate(led.sums):
        assert each.members == [name for name in NAMES if led.groups.groups[name] == group]
        assert len(each.members) == 3


def test_before_groups_are_known_a_client_enters_all_and_afterwards_its_own() -> None:
    led, (said,) = Led(3), adverts(NAMES[:1])
    led.groups.enter(said)
    assert [each.asked for each in led.sums] == [[("enter", NAMES[0])]] * 3
    led.begun()
    led.groups.enter(said)
    mine = led.groups.groups[NAMES[0]]
    assert [len(each.asked) for each in led.sums] == [2 if group == mine else 1 for group in range(3)]


@pytest.mark.parametrize("verb", ["expects", "taking", "not_taken", "sent", "lost", "remind"])
def test_what_a_client_does_is_told_to_its_group_alone(verb: str) -> None:
    led = Led(3).begun()
    for name in NAMES:
        getattr(led.groups, verb)(name)
    for group, each in enumerate(led.sums):
        assert each.asked == [(verb, name) for name in NAMES if led.groups.groups[name] == group]


def test_what_a_client_says_is_told_to_its_group_alone() -> None:
    led = Led(3).begun()
    led.groups.take(NAMES[4], SumShares("run/0/client-4", {}))
    assert [each.asked for each in led.sums if each.asked] == [[("take", NAMES[4])]]


def test_who_is_in_no_group_is_refused_what_it_sends_and_its_leaving_is_nothing() -> None:
    led = Led(3)
    told = "client-0 takes no part in a secure sum now: it begins when enough clients are ready"
    for refused in (led.groups.expects, led.groups.taking, lambda name: led.groups.take(name, SumShares("", {}))):
        with pytest.raises(UpdateRefused, match=told):
            refused(NAMES[0])
    led.begun(NAMES[1:])
    with pytest.raises(UpdateRefused, match=told):
        led.groups.expects(NAMES[0])
    for ignored in (led.groups.lost, led.groups.not_taken, led.groups.remind):
        ignored(NAMES[0])
    assert not any(each.asked for each in led.sums)


def test_at_the_end_no_group_waits_any_more() -> None:
    led = Led(3).begun()
    led.groups.end()
    assert [each.asked for each in led.sums] == [[("end",)]] * 3


# When the round has enough


def test_once_all_groups_came_to_something_it_is_done_and_not_before() -> None:
    led = Led(3, quorum=9).begun()
    led.sums[2].done()
    led.sums[0].done()
    assert led.heard == []
    led.sums[1].done()
    assert led.heard == [("done", [0, 1, 2])]


def test_a_group_that_came_to_nothing_is_left_out_and_its_clients_are_named_at_once() -> None:
    led = Led(3, quorum=6).begun()
    led.sums[1].failed("some client has sent something else")
    clients = led.sums[1].members
    lost = ("lost", clients, f"the group of {', '.join(clients)}: some client has sent something else")
    assert led.heard == [lost]
    led.sums[0].done()
    assert led.heard == [lost]
    led.sums[2].done()
    assert led.heard == [lost, ("done", [0, 2])]


@pytest.mark.parametrize(("count", "good"), [(1, 0), (3, 1), (4, 2), (4, 0), (5, 2)])
def test_of_half_of_the_groups_or_fewer_there_is_no_median(count: int, good: int) -> None:
    led = Led(count).begun()
    for each in led.sums[:good]:
        each.done()
    for number, each in enumerate(led.sums[good:]):
        each.failed(f"fault {number}")
    *lost, (ended, reason) = led.heard
    assert [what for what, *_ in lost] == ["lost"] * (count - good)
    assert ended == "failed"
    assert all(f"fault {number}" in reason for number in range(count - good))


@pytest.mark.parametrize(("count", "good"), [(1, 1), (3, 2), (4, 3), (5, 3)])
def test_of_more_than_half_there_is(count: int, good: int) -> None:
    led = Led(count).begun()
    for each in led.sums[good:]:
        each.failed("gone")
    for each in led.sums[:good]:
        each.done()
    assert led.heard[-1] == ("done", list(range(good)))


def test_the_quorum_is_of_the_results_in_the_good_groups() -> None:
    led = Led(3, quorum=7).begun()
    led.sums[0].failed("gone")
    led.sums[1].done()
    led.sums[2].done()
    what, reason = led.heard[-1]
    assert what == "failed"
    assert reason.startswith("the groups that came to something have 6 results; the quorum is 7; the group of ")
    assert reason.endswith(": gone")


def test_one_sum_has_no_group_to_be_named() -> None:
    led = Led(1).begun()
    led.sums[0].failed("too few")
    assert led.heard == [("lost", NAMES, "too few"), ("failed", "too few")]


def test_groups_that_fail_as_they_begin_end_the_round_once() -> None:
    led = Led(3)
    for each in led.sums:
        each.fails_at_once = "too few"
    led.begun()
    assert [what for what, *_ in led.heard] == ["lost", "lost", "lost", "failed"]


def test_of_a_large_group_the_first_are_named() -> None:
    led = Led(3).begun([f"client-{number:02}" for number in range(36)])
    led.sums[0].failed("gone")
    ((_, clients, reason),) = led.heard
    assert len(clients) == 12
    assert reason == f"the group of {', '.join(clients[:10])} and 2 more: gone"


# One sum whose time has passed


class Sum:
    """A secure sum of real clients, and what it tells them."""

    def __init__(self, *names: str) -> None:
        people = People.named(names)
        self.maskings = {name: people.masking(name) for name in names}
        self.said: list[tuple[str, ToSummand]] = []
        self.failures: list[str] = []
        say = lambda client, message: self.said.append((client, message))  # noqa: E731
        unmasking = Unmasking(TERMS, people.vouch, 2)
        self.sum = SecureSum(unmasking, 2, LONG_S, LONG_S, say, frozenset, self._unmask, lambda: None, self.failures.append)
        self.adverts = {name: SumAdvert(f"run/0/{name}", masking.advertise()) for name, masking in self.maskings.items()}
        for said in self.adverts.values():
            self.sum.enter(said)

    async def _unmask(self, mask: Mask) -> None:
        raise AssertionError("no test gets as far")

    def begin(self) -> None:
        self.sum.begin(Part(f"run/0/{name}", name, PartState.READY) for name in self.maskings)

    def share(self) -> None:
        rosters = {client: message for client, message in self.said if isinstance(message, SumRoster)}
        for name, masking in self.maskings.items():
            roster = self.sum._unmasking.roster  # the same that it was told
            assert roster.adverts == rosters[name].adverts
            self.sum.take(name, SumShares(f"run/0/{name}", masking.take_roster(roster)))


async def test_a_result_is_too_early_then_in_time_then_too_late() -> None:
    here = Sum("alice", "bob", "carol", "dave")
    with pytest.raises(UpdateRefused, match="no masked result of alice is waited for yet, but keys"):
        here.sum.expects("alice")
    here.begin()
    with pytest.raises(UpdateRefused, match="no masked result of alice is waited for yet, but shares of their secrets") as early:
        here.sum.expects("alice")
    assert not isinstance(early.value, TooLate)
    here.share()
    here.sum.expects("alice")
    here.sum.lost("dave")
    with pytest.raises(TooLate, match="the secure sum has gone on without dave: its masked result came too late, or it had left"):
        here.sum.expects("dave")
    here.sum.end()
    with pytest.raises(TooLate, match="the secure sum that alice was in is over"):
        here.sum.taking("alice")


async def test_who_leaves_while_its_result_is_stored_is_not_awaited_if_that_does_not_count() -> None:
    here = Sum("alice", "bob", "carol", "dave")
    here.begin()
    here.share()
    for name in ("alice", "bob", "carol"):
        here.sum.taking(name)
        here.sum.sent(name)
    here.sum.taking("dave")
    here.sum.lost("dave")
    assert {type(message) for _, message in here.said} == {SumRoster, SumShares}
    here.sum.not_taken("dave")
    assert [client for client, _ in here.said[-3:]] == ["alice", "bob", "carol"]  # the survivors
    here.sum.end()


async def test_of_a_sum_that_is_over_nobody_is_reminded_and_keys_that_are_shown_again_are_no_fault() -> None:
    here = Sum("alice", "bob", "carol")
    here.begin()
    here.sum.lost("bob")
    here.sum.lost("carol")
    here.sum.take("alice", SumShares("run/0/alice", here.maskings["alice"].take_roster(here.sum._unmasking.roster)))
    (failure,) = here.failures
    assert failure.startswith("the secure sum came to nothing: 1 of the ")
    told = len(here.said)
    here.sum.remind("alice")
    here.sum.lost("alice")
    here.sum.enter(here.adverts["bob"])
    assert (len(here.said), len(here.failures)) == (told, 1)


# In a round


async def begun(home: Home, groups: int) -> tuple[Floor, Collection, asyncio.Task[Round], dict[str, SumRoster]]:
    """A round of nine whose sums have begun, and the roster that each client was told."""
    here = await floor(
        home, cohort_size=9, secure_aggregation={"groups": groups, "minimum_cohort": 2}, quorum=6, quarantine_after=1
    )
    here.join(*NAMES)
    asked = (await here.asked(*NAMES, quorum=6)).round
    masked = [replace(part, codec=MASKED) for part in asked.parts.values()]
    collection = here.taken_up(replace(asked, parts=asked.parts.having(masked)))
    round, people = collection.round, People.named(NAMES)
    plan = here.run.plan(round.kind, round.goal, 0)
    assert plan.secure is not None
    terms = Terms(plan.secure.run, round.number, round.parent, digest_of(plan), plan.secure.threshold)
    collecting = here.begin(collection)
    for name in NAMES:
        collection.said(name, SumAdvert(here.id_of(name), people.masking(name, terms=terms).advertise()))
    return here, collection, collecting, {name: await here.hears(name, SumRoster) for name in NAMES}


def leave(here: Floor, collection: Collection, *names: str) -> None:
    for name in names:
        collection.reported(name, Status(here.id_of(name), Phase.DECLINED, "on battery"))


async def test_a_group_that_came_to_nothing_hears_of_it_at_once_and_so_does_the_operator(home: Home) -> None:
    here, collection, collecting, rosters = await begun(home, 3)
    assert isinstance(collection.tally.aggregate, GroupedSum)
    group = sorted(said.client for said in rosters[NAMES[0]].adverts)
    assert len(group) == 3
    *others, last = group
    leave(here, collection, *others)
    collection._sum.lost(last)  # type: ignore[union-attr]  # its time is up
    cancelled = await here.hears(last, Cancel)
    assert cancelled.assignment == here.id_of(last)
    assert cancelled.reason == f"the group of {', '.join(group)}: the secure sum came to nothing: nobody has sent shares"
    assert collection.round.state is RoundState.OPEN
    assert (await here.hears(others[0], Cancel)).reason == cancelled.reason
    collection.stop("seen enough")  # which ends the other groups, too, and they are not left out of anything
    closed = await collecting
    assert closed.reason == "seen enough"
    left_out = [event for event in await home.store.events(20) if event.what == "group left out"]
    assert [(event.round, event.client, event.told) for event in left_out] == [(0, "", cancelled.reason)]


async def test_a_result_for_a_group_that_is_left_out_is_late_and_nobody_is_quarantined_for_it(home: Home) -> None:
    here, collection, collecting, rosters = await begun(home, 3)
    *others, last = sorted(said.client for said in rosters[NAMES[0]].adverts)
    leave(here, collection, *others)
    collection._sum.lost(last)  # type: ignore[union-attr]  # its time is up
    told = (await here.hears(others[0], Cancel)).reason
    length = here.run.payload_bytes(Kind.TRAINING, MASKED).most
    receipt = collection.expects(replace(header_of(collection, last, length, examples=0), codec=MASKED))
    assert receipt == Receipt(Verdict.LATE, told)
    here.leave(last)
    here.join(last)  # who has not read what was said
    assert (await here.hears(last, Cancel)).reason == told
    collection.stop("seen enough")
    await collecting
    assert not home.store.clients[last].quarantine
    assert home.store.clients[last].refused == 0


async def test_when_the_only_sum_came_to_nothing_all_hear_of_it_and_no_group_is_named(home: Home) -> None:
    here, collection, collecting, _ = await begun(home, 1)
    leave(here, collection, *NAMES[1:])
    collection._sum.lost(NAMES[0])  # type: ignore[union-attr]
    closed = await collecting
    assert closed.state is RoundState.ABANDONED
    assert closed.reason.startswith("the secure sum came to nothing: ")
    for name in NAMES:
        assert (await here.hears(name, Cancel)).reason == closed.reason
    assert not [event for event in await home.store.events(20) if event.what == "group left out"]
