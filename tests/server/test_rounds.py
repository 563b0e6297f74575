"""The round machine: each event in each state, whole rounds, and any order of any events, restarts among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest
from choral.messages import Phase, Receipt, Verdict
from choral.metrics import Metric
from choral.plan import Kind
from choral_server.rounds import (
    AT_WORK,
    OPEN_PARTS,
    Action,
    Announce,
    Answer,
    Arrived,
    BeginSum,
    DeadlinePassed,
    Event,
    Extend,
    Fold,
    Left,
    Overdue,
    Part,
    PartState,
    Ready,
    Recruited,
    Rejected,
    Remind,
    Reported,
    Returned,
    Round,
    RoundState,
    Stopped,
    Summed,
    Upload,
    Withdraw,
    as_kept,
    discarded,
    published,
    receipt_after,
    resumed,
    step,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
OPEN, CLOSED, DONE, ABANDONED = RoundState.OPEN, RoundState.CLOSED, RoundState.DONE, RoundState.ABANDONED
DIGEST = bytes(range(32))


def id_of(client: str) -> str:
    return f"run/3/{client}"


def round_of(clients: Sequence[str], goal: int, quorum: int) -> Round:
    parts = {id_of(client): Part(id_of(client), client) for client in clients}
    return Round("run", 3, Kind.TRAINING, 7, goal, quorum, parts, NOON)


def upload(client: str, sender: str | None = None, examples: int = 10, attempt: int = 1) -> Upload:
    metrics = (Metric("loss", 0.5, examples),)
    path = Path(f"/spool/{client}-{attempt}.upload")
    return Upload(id_of(client), sender or client, examples, metrics, (Metric("train_s", 1.0, examples),), DIGEST, path)


def arrived(client: str, sender: str | None = None, attempt: int = 1) -> Arrived:
    return Arrived(upload(client, sender, attempt=attempt))


def reported(client: str, phase: Phase, reason: str = "") -> Reported:
    return Reported(id_of(client), phase, reason)


def recruited(client: str) -> Recruited:
    return Recruited(Part(id_of(client), client))


def states(round: Round) -> dict[str, str]:
    return {part.client: part.state.value for part in round.parts.values()}


def play(round: Round, events: Sequence[Event]) -> tuple[Round, list[Action]]:
    done: list[Action] = []
    for event in events:
        round, actions = step(round, event)
        done += actions
    return round, done


# The table: what each event makes of a part in each state, in a round whose fate it does not decide

EVENTS: dict[str, Event] = {
    "downloading": reported("alice", Phase.DOWNLOADING),
    "working": reported("alice", Phase.WORKING),
    "uploading": reported("alice", Phase.UPLOADING),
    "declined": reported("alice", Phase.DECLINED, "on battery"),
    "arrived": arrived("alice"),
    "rejected": Rejected(id_of("alice"), "it holds NaN"),
    "left": Left("alice"),
    "overdue": Overdue("alice"),
    "returned": Returned("alice"),
    "recruited": Recruited(Part(id_of("alice"), "alice")),
    "extended": DeadlinePassed(60.0, frozenset({id_of("alice")})),
    "deadline": DeadlinePassed(60.0),
    "stopped": Stopped("an operator said so"),
    "ready": Ready(id_of("alice")),
    "summed": Summed(),
}

# A dot: the part does not change. Whoever is ready at the deadline is a quorum here, and its sum begins.
TABLE = """
            downloading working uploading declined arrived  rejected left   overdue returned  recruited extended deadline  stopped   ready summed
announced   downloading working uploading declined accepted refused  absent .       .         .         .        cancelled cancelled ready .
downloading .           working uploading declined accepted refused  absent .       announced .         .        cancelled cancelled ready .
working     downloading .       uploading declined accepted refused  absent .       announced .         .        cancelled cancelled ready .
ready       downloading working uploading declined accepted refused  absent .       announced .         .        .         cancelled .     .
uploading   downloading working .         declined accepted refused  absent .       announced .         .        cancelled cancelled ready .
absent      downloading working uploading declined accepted refused  .      gone    announced .         .        cancelled cancelled ready .
gone        downloading working uploading declined accepted refused  .      .       announced .         .        cancelled cancelled ready .
accepted    .           .       .         .        .        .        .      .       .         .         .        .         .         .     .
declined    .           .       .         .        .        .        .      .       .         .         .        .         .         .     .
refused     .           .       .         .        .        .        .      .       .         .         .        .         .         .     .
cancelled   .           .       .         .        .        .        .      .       .         .         .        .         .         .     .
"""  # noqa: E501

# The same while the sum is under way: nobody is at work then, and what clients do in the sum is not the machine's.
SUMMING = """
          downloading working uploading declined arrived  rejected left overdue returned recruited extended deadline stopped   ready summed
ready     .           .       .         declined accepted refused  .    gone    .        .         .        .        cancelled .     cancelled
gone      .           .       .         declined accepted refused  .    .       .        .         .        .        cancelled .     cancelled
accepted  .           .       .         .        .        .        .    .       .        .         .        .        .         .     .
declined  .           .       .         .        .        .        .    .       .        .         .        .        .         .     .
refused   .           .       .         .        .        .        .    .       .        .         .        .        .         .     .
cancelled .           .       .         .        .        .        .    .       .        .         .        .        .         .     .
"""  # noqa: E501


def _cells(table: str) -> dict[tuple[PartState, str], PartState]:
    header, *rows = (line.split() for line in table.strip().splitlines())
    return {
        (PartState(state), event): PartState(state if after == "." else after)
        for state, *row in rows
        for event, after in zip(header, row, strict=True)
    }


CELLS, OF_SUM = _cells(TABLE), _cells(SUMMING)
NO_REASON = AT_WORK | {PartState.READY}


def part_in(state: PartState) -> Part:
    part = replace(round_of(["alice"], 1, 1).parts[id_of("alice")], state=state)
    if state is PartState.ACCEPTED:
        return replace(part, examples=10)
    return replace(part, reason="as it was") if state not in NO_REASON else part


def test_the_table_covers_every_pair_of_state_and_event() -> None:
    assert set(CELLS) == {(state, event) for state in PartState for event in EVENTS}
    assert set(OF_SUM) == {(state, event) for state in set(PartState) - AT_WORK - {PartState.ABSENT} for event in EVENTS}
    assert {type(event) for event in EVENTS.values()} == set(get_args(Event))
    assert {event.phase for event in EVENTS.values() if isinstance(event, Reported)} == set(Phase)


@pytest.mark.parametrize(("before", "name"), CELLS, ids=lambda value: value.value if isinstance(value, PartState) else value)
def test_each_event_in_each_state(before: PartState, name: str) -> None:
    # Bob still works and three results are wanted, so that the round stays open whatever becomes of Alice.
    subject, bob = part_in(before), replace(round_of(["bob"], 1, 1).parts[id_of("bob")], state=PartState.WORKING)
    round = replace(round_of(["alice", "bob"], goal=3, quorum=1), parts={id_of("alice"): subject, id_of("bob"): bob})
    event = EVENTS[name]
    after, actions = step(round, event)
    part = after.parts[id_of("alice")]
    assert part.state is CELLS[before, name]
    assert actions == expected_actions(subject, part, event, after)
    begins = before is PartState.READY and isinstance(event, DeadlinePassed)
    assert after.summing is begins
    if isinstance(event, DeadlinePassed | Stopped):
        spared = isinstance(event, DeadlinePassed) and bool(event.advancing) and before in OPEN_PARTS
        assert (after.state is OPEN) is (spared or begins)
        assert after.parts[id_of("bob")].state is PartState.CANCELLED
    else:
        assert after.state is OPEN
        assert after.parts[id_of("bob")] is bob
    if CELLS[before, name] is before:
        assert part == subject
    if part.state is PartState.ACCEPTED:
        assert part.reason == ""


def expected_actions(before: Part, after: Part, event: Event, round: Round) -> tuple[Action, ...]:
    """What must be done, said apart from the code under test."""
    match event:
        case Arrived(arriving) if before.state in OPEN_PARTS:
            return Answer(arriving, Receipt(Verdict.ACCEPTED)), Fold(arriving)
        case Arrived(arriving):
            verdicts = {PartState.ACCEPTED: Verdict.DUPLICATE, PartState.CANCELLED: Verdict.LATE}
            answer = Answer(arriving, Receipt(verdicts.get(before.state, Verdict.REFUSED), receipt_after(before).reason))
            return (answer,)
        case Returned() if before.state in OPEN_PARTS:
            return (Announce(after),)
        case DeadlinePassed() if before.state is PartState.READY:
            return Withdraw(round.parts[id_of("bob")]), BeginSum((before,))
        case DeadlinePassed(_, advancing) if advancing and before.state in OPEN_PARTS:
            return Withdraw(round.parts[id_of("bob")]), Extend()
        case DeadlinePassed() | Stopped():
            alices = (Withdraw(after),) if before.state in OPEN_PARTS else ()
            return *alices, Withdraw(round.parts[id_of("bob")])
    return ()


@pytest.mark.parametrize(("before", "name"), OF_SUM, ids=lambda value: value.value if isinstance(value, PartState) else value)
def test_each_event_in_each_state_while_the_sum_is_under_way(before: PartState, name: str) -> None:
    subject, bob = part_in(before), replace(round_of(["bob"], 1, 1).parts[id_of("bob")], state=PartState.READY)
    round = replace(round_of(["alice", "bob"], goal=2, quorum=1), parts={id_of("alice"): subject, id_of("bob"): bob}, summing=True)
    event = EVENTS[name]
    after, actions = step(round, event)
    part = after.parts[id_of("alice")]
    assert part.state is OF_SUM[before, name]
    assert after.state is {"summed": CLOSED, "stopped": ABANDONED}.get(name, OPEN)
    assert after.parts[id_of("bob")].state is (PartState.READY if after.state is OPEN else PartState.CANCELLED)
    match event:
        case Returned():
            assert actions == (Remind(subject),)
        case Stopped() | Summed():
            ended = (Withdraw(part),) if before in OPEN_PARTS else ()
            assert actions == (*ended, Withdraw(after.parts[id_of("bob")]))
        case Arrived():
            assert actions == expected_actions(subject, part, event, after)
        case _:
            assert actions == ()
    if OF_SUM[before, name] is before:
        assert part is subject


def test_the_sum_begins_with_those_who_are_ready_and_ends_everybody_elses_part() -> None:
    round, _ = play(round_of(["alice", "bob", "carol"], 2, 2), [Ready(id_of("carol"))])
    assert not round.summing
    after, actions = step(round, Ready(id_of("alice")))
    assert after.summing
    assert states(after) == {"alice": "ready", "bob": "cancelled", "carol": "ready"}
    why = "the sum of round 3 began without it: the goal was reached"
    assert after.parts[id_of("bob")].reason == why
    assert actions == (
        Withdraw(after.parts[id_of("bob")]),
        BeginSum((after.parts[id_of("alice")], after.parts[id_of("carol")])),
    )


def test_who_is_ready_is_not_cut_off_while_a_transfer_advances() -> None:
    """As little as a result that was accepted: it waits for the one that is about to be there."""
    round, _ = play(round_of(["alice", "bob", "carol"], 3, 2), [Ready(id_of("alice")), Ready(id_of("carol"))])
    after, actions = step(round, ADVANCING)
    assert states(after) == {"alice": "ready", "bob": "announced", "carol": "ready"}
    assert actions == (Extend(),)
    summing, actions = step(after, DEADLINE)
    assert summing.summing
    assert states(summing) == {"alice": "ready", "bob": "cancelled", "carol": "ready"}
    assert isinstance(actions[-1], BeginSum)


@pytest.mark.parametrize("summing", [False, True])
@pytest.mark.parametrize("closed", [CLOSED, DONE, ABANDONED])
@pytest.mark.parametrize("state", [state for state in PartState if state not in OPEN_PARTS])
@pytest.mark.parametrize("name", EVENTS)
def test_nothing_changes_a_closed_round(closed: RoundState, state: PartState, name: str, summing: bool) -> None:
    parts = {id_of("alice"): part_in(state)}
    round = replace(
        round_of(["alice"], goal=1, quorum=1), parts=parts, state=closed, reason="as it was", duration_s=2.0, summing=summing
    )
    after, actions = step(round, EVENTS[name])
    assert after is round
    assert [type(action) for action in actions] == ([Answer] if name == "arrived" else [])


def test_what_an_accepted_result_leaves_behind() -> None:
    after, actions = step(round_of(["alice", "bob"], 2, 2), arrived("alice"))
    part = after.parts[id_of("alice")]
    assert part == Part(
        id_of("alice"),
        "alice",
        PartState.ACCEPTED,
        "",
        10,
        (Metric("loss", 0.5, 10),),
        (Metric("train_s", 1.0, 10),),
        DIGEST,
    )
    assert actions == (Answer(upload("alice"), Receipt(Verdict.ACCEPTED)), Fold(upload("alice")))


# Scenarios: what happened, in order; then the round's state, its reason and its parts


@dataclass(frozen=True)
class Scenario:
    clients: str
    goal: int
    quorum: int
    events: Sequence[Event]
    state: RoundState
    reason: str
    parts: str


DEADLINE = DeadlinePassed(30.0)
ADVANCING = DeadlinePassed(30.0, frozenset({id_of("bob")}))
SCENARIOS = {
    "nothing happened yet": Scenario("alice bob", 2, 2, [], OPEN, "", "announced announced"),
    "goal: the last of two results closes the round": Scenario(
        "alice bob",
        2,
        2,
        [
            reported("alice", Phase.DOWNLOADING),
            reported("bob", Phase.DOWNLOADING),
            reported("alice", Phase.WORKING),
            reported("alice", Phase.UPLOADING),
            arrived("alice"),
            reported("bob", Phase.WORKING),
            arrived("bob"),
        ],
        CLOSED,
        "",
        "accepted accepted",
    ),
    "goal not yet reached": Scenario("alice bob carol", 2, 1, [arrived("alice")], OPEN, "", "accepted announced announced"),
    "over-selection: the goal cancels the rest": Scenario(
        "alice bob carol dave",
        2,
        2,
        [reported("carol", Phase.WORKING), Left("dave"), arrived("bob"), arrived("alice")],
        CLOSED,
        "",
        "accepted accepted cancelled cancelled",
    ),
    "a quorum at the deadline is enough": Scenario(
        "alice bob carol", 3, 2, [arrived("alice"), arrived("carol"), DEADLINE], CLOSED, "", "accepted cancelled accepted"
    ),
    "a quorum before the deadline waits for those at work": Scenario(
        "alice bob carol", 3, 2, [arrived("alice"), arrived("carol")], OPEN, "", "accepted announced accepted"
    ),
    "one who left may be back in a moment": Scenario(
        "alice bob carol", 3, 2, [arrived("alice"), arrived("carol"), Left("bob")], OPEN, "", "accepted absent accepted"
    ),
    "a quorum is enough once nobody is waited for": Scenario(
        "alice bob carol",
        3,
        2,
        [arrived("alice"), arrived("carol"), Left("bob"), Overdue("bob")],
        CLOSED,
        "",
        "accepted cancelled accepted",
    ),
    "a quorum is enough once the last has declined": Scenario(
        "alice bob carol",
        3,
        2,
        [arrived("alice"), arrived("carol"), reported("bob", Phase.DECLINED, "the loss is nan")],
        CLOSED,
        "",
        "accepted declined accepted",
    ),
    "no quorum at the deadline: each client's reason is named": Scenario(
        "alice bob carol dave",
        4,
        3,
        [arrived("alice"), reported("bob", Phase.WORKING), Left("carol"), DEADLINE],
        ABANDONED,
        "the deadline of 30 s passed: quorum of 3 missed with 1 accepted: "
        "bob working; carol absent (the client left); dave announced",
        "accepted cancelled cancelled cancelled",
    ),
    "a decline can make the quorum impossible": Scenario(
        "alice bob",
        2,
        2,
        [arrived("alice"), reported("bob", Phase.DECLINED, "the loss is nan in epoch 2 of 5")],
        ABANDONED,
        "quorum of 2 missed with 1 accepted: bob declined (the loss is nan in epoch 2 of 5)",
        "accepted declined",
    ),
    "so can a refused upload": Scenario(
        "alice bob carol",
        3,
        2,
        [
            Rejected(id_of("alice"), "it holds NaN"),
            reported("carol", Phase.WORKING),
            reported("bob", Phase.DECLINED, "on battery"),
        ],
        ABANDONED,
        "quorum of 2 missed with 0 accepted: alice refused (it holds NaN); bob declined (on battery); carol working",
        "refused declined cancelled",
    ),
    "a refused upload is survived if others are enough": Scenario(
        "alice bob carol",
        3,
        2,
        [Rejected(id_of("alice"), "it holds NaN"), arrived("bob"), arrived("carol")],
        CLOSED,
        "",
        "refused accepted accepted",
    ),
    "the deadline of a fraction of a second is shown as such": Scenario(
        "alice",
        1,
        1,
        [DeadlinePassed(0.25)],
        ABANDONED,
        "the deadline of 0.25 s passed: quorum of 1 missed with 0 accepted: alice announced",
        "cancelled",
    ),
    "one who leaves may come back and finish": Scenario(
        "alice bob",
        2,
        2,
        [reported("alice", Phase.WORKING), Left("alice"), arrived("bob"), Returned("alice"), arrived("alice")],
        CLOSED,
        "",
        "accepted accepted",
    ),
    "everyone may be gone for a while": Scenario("alice bob", 2, 2, [Left("alice"), Left("bob")], OPEN, "", "absent absent"),
    "everyone may be gone until the deadline": Scenario(
        "alice bob",
        2,
        2,
        [Left("alice"), Left("bob"), DEADLINE],
        ABANDONED,
        "the deadline of 30 s passed: quorum of 2 missed with 0 accepted: "
        "alice absent (the client left); bob absent (the client left)",
        "cancelled cancelled",
    ),
    "an upload on its own call outlives the stream": Scenario(
        "alice bob", 2, 1, [Left("alice"), arrived("alice")], OPEN, "", "accepted announced"
    ),
    "one who has answered may leave": Scenario(
        "alice bob", 2, 2, [arrived("alice"), Left("alice"), Returned("alice")], OPEN, "", "accepted announced"
    ),
    "a duplicate counts once": Scenario(
        "alice bob", 2, 2, [arrived("alice"), arrived("alice", attempt=2)], OPEN, "", "accepted announced"
    ),
    "a late result does not count": Scenario(
        "alice bob",
        2,
        1,
        [arrived("alice"), DEADLINE, arrived("bob")],
        CLOSED,
        "",
        "accepted cancelled",
    ),
    "another's assignment cannot be answered": Scenario(
        "alice bob", 2, 1, [arrived("alice", sender="bob"), arrived("alice", sender="mallory")], OPEN, "", "announced announced"
    ),
    "strangers change nothing": Scenario(
        "alice bob",
        2,
        1,
        [
            arrived("mallory"),
            reported("mallory", Phase.DECLINED, "x"),
            Rejected(id_of("mallory"), "x"),
            Left("mallory"),
            Returned("mallory"),
        ],
        OPEN,
        "",
        "announced announced",
    ),
    "a transfer that advances outlives the deadline and counts": Scenario(
        "alice bob carol",
        3,
        2,
        [arrived("alice"), ADVANCING, reported("bob", Phase.UPLOADING), arrived("bob")],
        CLOSED,
        "",
        "accepted accepted cancelled",
    ),
    "it is waited for even if there is a quorum": Scenario(
        "alice bob carol", 3, 1, [arrived("alice"), ADVANCING], OPEN, "", "accepted announced cancelled"
    ),
    "one that stands still at last does not": Scenario(
        "alice bob carol",
        3,
        2,
        [arrived("alice"), ADVANCING, DEADLINE],
        ABANDONED,
        "the deadline of 30 s passed: quorum of 2 missed with 1 accepted: "
        "bob announced; carol cancelled (the deadline of 30 s passed)",
        "accepted cancelled cancelled",
    ),
    "one that has ended moves no deadline": Scenario(
        "alice bob", 2, 1, [arrived("bob"), ADVANCING], CLOSED, "", "cancelled accepted"
    ),
    "a recruit takes the part of one who is away": Scenario(
        "alice bob",
        2,
        2,
        [Left("alice"), recruited("carol"), arrived("bob"), arrived("carol")],
        CLOSED,
        "",
        "cancelled accepted accepted",
    ),
    "unless that one is faster": Scenario(
        "alice bob",
        2,
        2,
        [Left("alice"), recruited("carol"), Returned("alice"), arrived("bob"), arrived("alice")],
        CLOSED,
        "",
        "accepted accepted cancelled",
    ),
    "nobody is recruited twice, or after the end": Scenario(
        "alice", 1, 1, [recruited("alice"), arrived("alice"), recruited("carol")], CLOSED, "", "accepted"
    ),
    "stop abandons whatever there is": Scenario(
        "alice bob carol",
        3,
        1,
        [arrived("alice"), reported("bob", Phase.DECLINED, "on battery"), Stopped("stopped by an operator")],
        ABANDONED,
        "stopped by an operator",
        "accepted declined cancelled",
    ),
    "stop after the end changes nothing": Scenario(
        "alice", 1, 1, [arrived("alice"), Stopped("stopped by an operator"), DEADLINE], CLOSED, "", "accepted"
    ),
    "a secure round: work, then the sum of those who are ready": Scenario(
        "alice bob carol",
        2,
        2,
        [Ready(id_of("alice")), Ready(id_of("bob")), arrived("bob"), DEADLINE, arrived("alice"), Summed()],
        CLOSED,
        "",
        "accepted accepted cancelled",
    ),
    "a secure round: all who are still here are ready, and a quorum": Scenario(
        "alice bob carol",
        3,
        2,
        [Ready(id_of("alice")), reported("bob", Phase.DECLINED, "on battery"), Ready(id_of("carol"))],
        OPEN,
        "",
        "ready declined ready",
    ),
    "a secure round: too few are ready at the deadline": Scenario(
        "alice bob",
        2,
        2,
        [Ready(id_of("alice")), reported("bob", Phase.WORKING), DEADLINE],
        ABANDONED,
        "the deadline of 30 s passed: quorum of 2 missed with 1 accepted: bob working",
        "cancelled cancelled",
    ),
    "a secure round: one who is ready leaves, and is ready again": Scenario(
        "alice bob",
        2,
        2,
        [Ready(id_of("alice")), Left("alice"), Ready(id_of("bob")), Returned("alice"), Ready(id_of("alice"))],
        OPEN,
        "",
        "ready ready",
    ),
    "a secure round: the sum comes to nothing": Scenario(
        "alice bob",
        2,
        2,
        [Ready(id_of("alice")), Ready(id_of("bob")), arrived("alice"), Overdue("bob"), Stopped("too few are left")],
        ABANDONED,
        "too few are left",
        "accepted cancelled",
    ),
    "a round of nobody ends when it is stopped": Scenario("", 0, 1, [Stopped("nobody attends")], ABANDONED, "nobody attends", ""),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios(name: str) -> None:
    told = SCENARIOS[name]
    round, _ = play(round_of(told.clients.split(), told.goal, told.quorum), told.events)
    assert round.state is told.state
    assert round.reason == told.reason
    assert list(states(round).values()) == told.parts.split()


def test_the_cancelled_are_told_and_why() -> None:
    round = round_of(["alice", "bob", "carol"], goal=1, quorum=1)
    after, actions = step(round, arrived("bob"))
    withdrawn = [action.part for action in actions if isinstance(action, Withdraw)]
    assert [part.client for part in withdrawn] == ["alice", "carol"]
    assert {part.reason for part in withdrawn} == {"round 3 closed: the goal was reached"}
    assert actions[:2] == (Answer(upload("bob"), Receipt(Verdict.ACCEPTED)), Fold(upload("bob")))
    assert all(after.parts[part.assignment] is part for part in withdrawn)


def test_one_who_returns_is_told_of_its_part_again() -> None:
    round, _ = play(round_of(["alice", "bob"], 2, 2), [reported("alice", Phase.WORKING), Left("alice")])
    after, actions = step(round, Returned("alice"))
    assert actions == (Announce(Part(id_of("alice"), "alice")),)
    assert after.parts[id_of("alice")] == Part(id_of("alice"), "alice")


@pytest.mark.parametrize(
    ("history", "event", "receipt"),
    [
        (
            [arrived("alice")],
            arrived("alice", attempt=2),
            Receipt(Verdict.DUPLICATE, "this result was accepted before and counts once"),
        ),
        (
            [Stopped("stopped by an operator")],
            arrived("alice"),
            Receipt(Verdict.LATE, "this part was cancelled: round 3 closed: stopped by an operator"),
        ),
        (
            [arrived("bob"), DEADLINE],
            arrived("alice"),
            Receipt(Verdict.LATE, "this part was cancelled: round 3 closed: the deadline of 30 s passed"),
        ),
        (
            [reported("alice", Phase.DECLINED, "on battery")],
            arrived("alice"),
            Receipt(Verdict.REFUSED, "this part was declined: on battery"),
        ),
        (
            [Rejected(id_of("alice"), "it holds NaN")],
            arrived("alice"),
            Receipt(Verdict.REFUSED, "this part was refused: it holds NaN"),
        ),
        ([], arrived("alice", sender="bob"), Receipt(Verdict.REFUSED, "assignment run/3/alice was not given to bob in round 3")),
        ([], arrived("mallory"), Receipt(Verdict.REFUSED, "assignment run/3/mallory was not given to mallory in round 3")),
    ],
)
def test_receipts_for_what_does_not_count(history: list[Event], event: Arrived, receipt: Receipt) -> None:
    round, _ = play(round_of(["alice", "bob"], goal=2, quorum=1), history)
    after, actions = step(round, event)
    assert after is round
    assert actions == (Answer(event.upload, receipt),)


def test_counting() -> None:
    round, _ = play(round_of(["alice", "bob", "carol"], 3, 1), [arrived("alice"), reported("bob", Phase.WORKING)])
    assert round.count(PartState.ACCEPTED) == 1
    assert round.count(*AT_WORK) == 2
    assert round.count() == 0
    assert round.part_of("carol") == Part(id_of("carol"), "carol")
    assert round.part_of("dave") is None


# Any order of any events

CLIENTS = ["alice", "bob", "carol", "dave"]
ANYONE = st.sampled_from([*CLIENTS, "mallory"])
ANY_EVENT = st.one_of(
    st.builds(reported, ANYONE, st.sampled_from(Phase), st.sampled_from(["", "on battery"])),
    st.builds(arrived, ANYONE, st.none() | ANYONE, st.integers(1, 3)),
    st.builds(arrived, ANYONE),  # again, so that many rounds reach their goal
    st.builds(lambda client: Ready(id_of(client)), ANYONE),
    st.builds(lambda client: Rejected(id_of(client), "it holds NaN"), ANYONE),
    st.builds(Left, ANYONE),
    st.builds(Overdue, ANYONE),
    st.builds(Returned, ANYONE),
    st.builds(recruited, ANYONE),
    st.builds(lambda clients: DeadlinePassed(30.0, frozenset(map(id_of, clients))), st.sets(ANYONE)),
    st.just(DEADLINE),
    st.just(Stopped("stopped by an operator")),
    st.just(Summed()),
)


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    clients = CLIENTS[: draw(st.integers(1, 4))]
    goal = draw(st.integers(1, len(clients)))
    return round_of(clients, goal, draw(st.integers(1, goal)))


@given(rounds(), st.lists(ANY_EVENT, max_size=25))
def test_invariants_hold_in_any_order_of_events(round: Round, events: list[Event]) -> None:
    answered: Counter[str] = Counter()
    folded: Counter[str] = Counter()
    for event in events:
        if isinstance(event, Summed) and not can_be_summed(round):
            continue
        before = replace(round, parts=dict(round.parts))
        after, actions = step(round, event)
        assert round == before, "the machine is pure"
        assert step(round, event) == (after, actions), "and repeatable"
        check_step(before, event, after, actions)
        folded.update(action.upload.assignment for action in actions if isinstance(action, Fold))
        answered.update(type(action).__name__ for action in actions if isinstance(action, Answer))
        round = after
    assert all(count == 1 for count in folded.values()), "each assignment is folded at most once"
    assert answered["Answer"] == sum(isinstance(event, Arrived) for event in events)
    assert set(folded) == accepted_in(round)
    assert len(folded) <= round.goal
    if any(event == DEADLINE or isinstance(event, Stopped) for event in events):
        assert round.state is not OPEN or round.summing
    if any(isinstance(event, Stopped) for event in events):
        assert round.state is not OPEN


def can_be_summed(round: Round) -> bool:
    """Whether the secure sum could be over now: it is not, before a quorum is in it."""
    return not round.summing or round.count(PartState.ACCEPTED) >= round.quorum


def accepted_in(round: Round) -> set[str]:
    return {part.assignment for part in round.parts.values() if part.state is PartState.ACCEPTED}


def check_step(before: Round, event: Event, after: Round, actions: tuple[Action, ...]) -> None:
    answers = [action for action in actions if isinstance(action, Answer)]
    folds = [action for action in actions if isinstance(action, Fold)]
    withdrawn = [action.part for action in actions if isinstance(action, Withdraw)]
    announced = [action.part for action in actions if isinstance(action, Announce)]
    begun = [action.parts for action in actions if isinstance(action, BeginSum)]
    closing = before.state is OPEN and (after.state is not OPEN or after.summing is not before.summing)

    # answers and folds
    assert [answer.upload for answer in answers] == ([event.upload] if isinstance(event, Arrived) else [])
    assert [fold.upload for fold in folds] == [one.upload for one in answers if one.receipt.verdict is Verdict.ACCEPTED]
    assert {fold.upload.assignment for fold in folds} == accepted_in(after) - accepted_in(before)
    assert all(before.parts[fold.upload.assignment].client == fold.upload.client for fold in folds)

    # what never changes
    said = {"parts": {}, "state": OPEN, "reason": "", "summing": False}
    assert replace(after, **said) == replace(before, **said)  # type: ignore[arg-type]
    clients = [(key, part.client) for key, part in before.parts.items()]
    new = [event.part] if isinstance(event, Recruited) and recruits(before, event) else []
    assert [(key, part.client) for key, part in after.parts.items()] == clients + [(part.assignment, part.client) for part in new]
    for key, part in before.parts.items():
        if part.state not in OPEN_PARTS:
            assert after.parts[key] is part, "an ended part never changes"
    if before.state is not OPEN or concerns_nobody(before, event):
        assert after == before, "an illegal event changes nothing"
        assert not folds
        assert not withdrawn
        assert not announced

    # the sum
    assert after.summing or not before.summing, "what has begun is not undone"
    assert begun == [tuple(part for part in after.parts.values() if part.state is PartState.READY)][: len(begun)]
    assert len(begun) == (after.summing is not before.summing)
    if after.summing and after.state is OPEN:
        assert after.count(*AT_WORK, PartState.ABSENT) == 0, "nobody is at work on what it cannot enter any more"
    if begun:
        assert after.quorum <= after.count(PartState.READY, PartState.ACCEPTED) <= after.goal

    # the end
    if after.state is not OPEN:
        assert after.count(*OPEN_PARTS) == 0, "a closed round has no open part"
    if after.state is CLOSED:
        assert after.count(PartState.ACCEPTED) >= after.quorum
    assert (after.reason != "") is (after.state is ABANDONED)
    cancelled = {key for key, part in after.parts.items() if part.state is PartState.CANCELLED and part != before.parts.get(key)}
    assert {part.assignment for part in withdrawn} == cancelled
    assert len(withdrawn) == len(cancelled)
    cutting = isinstance(event, DeadlinePassed) and Extend() in actions
    if not closing and not cutting:
        assert sum(after.parts[key] != part for key, part in before.parts.items()) <= 1, "one event, one part"
    back = [part.client for part in before.parts.values() if isinstance(event, Returned) and legal_return(before, part, event)]
    assert [part.client for part in announced] == back + [part.client for part in new]


def recruits(round: Round, event: Recruited) -> bool:
    return round.state is OPEN and not round.summing and event.part.assignment not in round.parts


def legal_return(round: Round, part: Part, event: Returned) -> bool:
    return part.client == event.client and part.state in OPEN_PARTS and not round.summing


def concerns_nobody(round: Round, event: Event) -> bool:
    """Whether no open part is meant, or the sum is under way and the event is none of it."""
    if round.summing and isinstance(event, Left | Returned | Recruited | Ready | DeadlinePassed):
        return True
    match event:
        case Summed():
            return not round.summing
        case Reported(_, phase) if round.summing and phase is not Phase.DECLINED:
            return True
        case Ready(assignment):
            part = round.parts.get(assignment)
        case Reported(assignment) | Rejected(assignment):
            part = round.parts.get(assignment)
        case Left(client) | Returned(client):
            part = round.part_of(client)
        case Overdue(client):
            part = round.part_of(client)
            return part is None or part.state is not (PartState.READY if round.summing else PartState.ABSENT)
        case Recruited(recruit):
            return recruit.assignment in round.parts
        case Arrived(arriving):
            part = round.parts.get(arriving.assignment)
            part = part if part is not None and part.client == arriving.client else None
        case _:
            return False
    return part is None or part.state not in OPEN_PARTS


@given(st.permutations(CLIENTS), st.integers(1, 4))
def test_the_first_results_to_arrive_count_whoever_sends_them(order: list[str], goal: int) -> None:
    round, actions = play(round_of(CLIENTS, goal, goal), [arrived(client) for client in order])
    assert round.state is CLOSED
    assert accepted_in(round) == {id_of(client) for client in order[:goal]}
    assert [action.upload.client for action in actions if isinstance(action, Fold)] == order[:goal]
    late = [action for action in actions if isinstance(action, Answer) and action.receipt.verdict is Verdict.LATE]
    assert [action.upload.client for action in late] == order[goal:]


# Restarts: what is kept of a round, and the round that is made of it


def test_after_a_restart_whoever_had_not_ended_is_away_and_told_again_on_return() -> None:
    before, _ = play(round_of(["alice", "bob", "carol"], 3, 2), [arrived("alice"), reported("bob", Phase.UPLOADING)])
    kept = replace(before, parts={key: as_kept(part) for key, part in before.parts.items()})
    again = resumed(kept)
    assert states(again) == {"alice": "accepted", "bob": "absent", "carol": "absent"}
    assert again.parts[id_of("alice")] == before.parts[id_of("alice")]
    after, actions = step(again, Returned("bob"))
    assert actions == (Announce(Part(id_of("bob"), "bob")),)
    closed, _ = play(after, [arrived("bob"), arrived("carol")])
    assert closed.state is CLOSED


def test_what_is_given_up_from_outside_ends_every_part() -> None:
    round, _ = play(round_of(["alice", "bob"], 2, 2), [arrived("alice")])
    given_up = discarded(round, "the spool is lost")
    assert (given_up.state, given_up.reason) == (ABANDONED, "the spool is lost")
    assert states(given_up) == {"alice": "accepted", "bob": "cancelled"}


def test_only_a_closed_round_is_published() -> None:
    closed, _ = play(round_of(["alice"], 1, 1), [arrived("alice")])
    assert published(closed) == replace(closed, state=DONE)
    for state in (OPEN, DONE, ABANDONED):
        with pytest.raises(AssertionError):
            published(replace(closed, state=state))


class Kept(RuleBasedStateMachine):
    """A round as its coordinator sees it, and what is on disk: the process may die between any step and its commit, or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.round = self.disk = round_of(CLIENTS, 3, 2)
        self.receipts: dict[str, Verdict] = {}
        self.ended: dict[str, Part] = {}
        self.published = 0

    def take(self, event: Event, dies: str) -> None:
        after, actions = step(self.round, event)
        if dies == "before the commit":
            return self.restart()
        self.disk = self.round = after
        self.disk = replace(after, parts={key: as_kept(part) for key, part in after.parts.items()}, summing=False)
        if dies == "after the commit":
            return self.restart()
        for action in actions:
            if isinstance(action, Answer) and action.receipt.verdict is Verdict.ACCEPTED:
                assert action.upload.assignment not in self.receipts, "a receipt is given once"
                self.receipts[action.upload.assignment] = Verdict.ACCEPTED
        return None

    def restart(self) -> None:
        self.round = resumed(self.disk)

    @rule(event=ANY_EVENT, dies=st.sampled_from(["no", "no", "no", "before the commit", "after the commit"]))
    def something_happens(self, event: Event, dies: str) -> None:
        if not isinstance(event, Summed) or can_be_summed(self.round):
            self.take(event, dies)

    @rule(client=st.sampled_from(CLIENTS), dies=st.sampled_from(["no", "before the commit", "after the commit"]))
    def a_result_arrives(self, client: str, dies: str) -> None:
        self.take(arrived(client), dies)

    @precondition(lambda self: self.round.state is CLOSED)
    @rule(dies=st.sampled_from(["no", "before the commit", "after the commit"]))
    def publish(self, dies: str) -> None:
        if dies == "before the commit":
            return self.restart()
        self.disk = self.round = published(self.round)
        self.published += 1
        return self.restart() if dies == "after the commit" else None

    @invariant()
    def a_receipt_holds_for_ever(self) -> None:
        for assignment in self.receipts:
            assert self.round.parts[assignment].state is PartState.ACCEPTED
            assert self.disk.parts[assignment].state is PartState.ACCEPTED

    @invariant()
    def an_ended_part_never_changes(self) -> None:
        for key, part in self.disk.parts.items():
            if part.state not in OPEN_PARTS:
                assert self.ended.setdefault(key, part) == part

    @invariant()
    def a_round_is_published_once_and_counts_at_most_its_goal(self) -> None:
        assert self.published <= 1
        assert self.disk.count(PartState.ACCEPTED) <= self.disk.goal

    @invariant()
    def every_assignment_of_an_ended_round_has_ended(self) -> None:
        if self.disk.state is not OPEN:
            assert self.disk.count(*OPEN_PARTS) == 0


TestKept = Kept.TestCase
