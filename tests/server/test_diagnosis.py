from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from choral.plan import Kind
from choral_server.diagnosis import Condition, Finding, diagnose, moving
from choral_server.records import ClientRecord, RunRecord, RunState
from choral_server.rounds import Part, PartState, Round, RoundState

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
RUN = RunRecord("run", "plane", "1", 10, NOON, rounds_done=4)
ALICE = ClientRecord("alice", True, 202, "0.1.0", "10.0.0.7:40000", NOON)
CLIENTS = {name: replace(ALICE, name=name) for name in ("alice", "bob", "carol")}


def condition(**changes: Any) -> Condition:
    """All is well: of three known clients two attend, and no round is open."""
    return replace(Condition(RUN, None, CLIENTS, ("alice", "bob"), 2, {}), **changes)


def quarantined(*names: str) -> dict[str, ClientRecord]:
    return {name: replace(client, quarantine="3 refused" if name in names else "") for name, client in CLIENTS.items()}


def round_of(**states: PartState) -> Round:
    parts = {
        f"run/4/{name}": Part(f"run/4/{name}", name, state, "so" if state is PartState.ABSENT else "")
        for name, state in states.items()
    }
    return Round("run", 4, Kind.TRAINING, 4, 3, 2, parts, NOON)


def of(subject: str, found: list[Finding]) -> Finding:
    [one] = [finding for finding in found if finding.subject == subject]
    return one


def test_when_all_is_well_everything_is_told() -> None:
    found = diagnose(condition())
    assert found == [
        Finding("run", True, "run run: 4 of 10 rounds done; waiting"),
        Finding("clients", True, "2 eligible clients attend, 2 are needed to open a round; known but away: carol"),
        Finding("disk", True, "works"),
        Finding("database", True, "works"),
        Finding("artifacts", True, "works"),
    ]
    assert moving(found)


# The run


@pytest.mark.parametrize("state", [RunState.FINISHED, RunState.STOPPED])
def test_a_run_that_is_over_is_as_it_should_be(state: RunState) -> None:
    found = diagnose(condition(run=replace(RUN, state=state, reason="10 rounds completed"), present=()))
    assert of("run", found) == Finding("run", True, "run run: 4 of 10 rounds done; it is over: 10 rounds completed")
    assert moving(found)


def test_a_run_that_failed_says_why_and_what_to_do() -> None:
    found = diagnose(condition(run=replace(RUN, state=RunState.FAILED, reason="10 rounds in a row were abandoned")))
    assert of("run", found) == Finding(
        *("run", False, "run run: 4 of 10 rounds done; it failed: 10 rounds in a row were abandoned"),
        "mend that, then `choral runs resume`",
    )
    assert not moving(found)


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.IN_ROUND])
def test_a_paused_run_names_the_command(state: RunState) -> None:
    found = diagnose(condition(run=replace(RUN, state=state, paused=True)))
    assert of("run", found) == Finding("run", False, "run run: 4 of 10 rounds done; paused by an operator", "`choral runs resume`")


def test_a_schedule_is_nothing_in_the_way() -> None:
    later = replace(RUN, reason="the schedule opens the next round later", next_round_at=NOON + timedelta(hours=15))
    found = diagnose(condition(run=later))
    assert of("schedule", found) == Finding(
        "schedule",
        True,
        "the schedule opens the next round later: at 2025-06-02 03:00:00 UTC; `choral rounds trigger` opens it now",
    )
    assert moving(found)
    in_trouble = diagnose(condition(run=later, troubles={"disk": "full"}))  # which it looks at again then: no schedule
    assert [finding.subject for finding in in_trouble].count("schedule") == 0


# Clients


def test_too_few_clients() -> None:
    found = diagnose(condition(present=("alice",)))
    assert of("clients", found) == Finding(
        "clients", False, "1 eligible clients attend, 2 are needed to open a round; known but away: bob, carol", "start 1 more"
    )
    assert not moving(found)


def test_nobody_has_ever_come() -> None:
    found = of("clients", diagnose(condition(clients={}, present=(), needed=3)))
    assert found == Finding("clients", False, "0 eligible clients attend, 3 are needed to open a round", "start 3 more")


def test_quarantined_clients_do_not_count_and_can_be_released() -> None:
    found = diagnose(condition(clients=quarantined("bob", "carol")))
    assert of("clients", found) == Finding(
        "clients",
        False,
        "1 eligible clients attend, 2 are needed to open a round",
        "start 1 more, or `choral clients release` one of bob, carol",
    )
    assert [finding for finding in found if finding.subject == "quarantine"] == [
        Finding("quarantine", False, f"{name}: 3 refused", f"look at it, then `choral clients release {name}`")
        for name in ("bob", "carol")
    ]


def test_a_quarantine_that_hinders_nobody_is_told_and_no_more() -> None:
    found = diagnose(condition(clients=quarantined("carol")))
    assert of("quarantine", found).good
    assert moving(found)


def test_while_a_round_is_open_nobody_more_is_needed() -> None:
    found = diagnose(condition(run=replace(RUN, state=RunState.IN_ROUND), present=()))
    assert of("clients", found).good


# The round


def test_an_open_round_names_who_is_still_out() -> None:
    current = round_of(alice=PartState.ACCEPTED, bob=PartState.UPLOADING, carol=PartState.ABSENT)
    found = of("round", diagnose(condition(current=current)))
    assert found == Finding("round", True, "round 4: 1 results of 3, 2 are the least; still out: bob uploading; carol absent (so)")


def test_a_round_that_cannot_reach_its_quorum_waits_for_the_absent() -> None:
    current = round_of(alice=PartState.ACCEPTED, bob=PartState.DECLINED, carol=PartState.ABSENT)
    found = of("round", diagnose(condition(current=current)))
    assert (found.good, found.cure) == (False, "start the clients that are absent; otherwise the deadline ends the round")


@pytest.mark.parametrize("state", [RoundState.CLOSED, RoundState.DONE, RoundState.ABANDONED])
def test_a_round_that_is_not_open_is_not_looked_at(state: RoundState) -> None:
    current = replace(round_of(alice=PartState.ABSENT), state=state)
    assert all(finding.subject != "round" for finding in diagnose(condition(current=current)))


# Troubles


@pytest.mark.parametrize(
    ("subject", "cure"),
    [
        ("disk", "make room; the coordinator goes on by itself"),
        ("database", "start the database, or make it reachable from here; the coordinator goes on by itself"),
        ("artifacts", "make the object store reachable from here; the coordinator goes on by itself"),
    ],
)
def test_each_trouble_has_its_cure(subject: str, cure: str) -> None:
    found = diagnose(condition(troubles={subject: "it is gone"}))
    assert of(subject, found) == Finding(subject, False, "it is gone", cure)
    assert [finding.subject for finding in found if not finding.good] == [subject]
    assert not moving(found)
