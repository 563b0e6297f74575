from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from choral.plan import Kind
from choral_server.records import ClientRecord, EventRecord
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.standing import consequences, release

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
ALICE = ClientRecord("alice", True, 202, "0.1.0", "10.0.0.7:40000", NOON, accepted=4)
BOB = replace(ALICE, name="bob", accepted=0)
CLIENTS = {"alice": ALICE, "bob": BOB}


def part(client: str, state: PartState, reason: str = "", examples: int = 0) -> Part:
    return Part(f"run/3/{client}", client, state, reason, examples)


def round_of(*parts: Part, state: RoundState = RoundState.OPEN, reason: str = "") -> Round:
    return Round("run", 3, Kind.TRAINING, 7, 2, 1, {p.assignment: p for p in parts}, NOON, state, reason)


def follows(
    *ended: Part, clients: dict[str, ClientRecord] = CLIENTS, after: int | None = 3, round: Round | None = None
) -> list[tuple[object, ...] | ClientRecord]:
    """What follows, events without their ids."""
    found = list(consequences(round or round_of(*ended), ended, clients, after, NOON))
    assert all(record.at == NOON and record.run == "run" for record in found if isinstance(record, EventRecord))
    return [
        (record.what, record.told, record.round, record.client) if isinstance(record, EventRecord) else record for record in found
    ]


def test_a_result_that_counts_is_counted_and_ends_the_row_of_refused_ones() -> None:
    before = {"alice": replace(ALICE, refused=2), "bob": BOB}
    found = follows(part("alice", PartState.ACCEPTED), part("bob", PartState.ACCEPTED), clients=before)
    assert found == [replace(ALICE, accepted=5, refused=0), replace(BOB, accepted=1)]


def test_how_many_examples_a_client_has_is_known_by_its_results_unless_they_are_masked() -> None:
    [plain] = follows(part("alice", PartState.ACCEPTED, examples=7))
    assert plain == replace(ALICE, accepted=5, examples=7)
    [masked] = follows(part("alice", PartState.ACCEPTED))
    assert masked == replace(ALICE, accepted=5, examples=202)
    [_, refused] = follows(part("alice", PartState.REFUSED, "the norm is 9", examples=7))
    assert refused == replace(ALICE, refused=1)


def test_a_refused_result_is_counted_and_told() -> None:
    assert follows(part("alice", PartState.REFUSED, "the norm is 9")) == [
        ("result refused", "the norm is 9", 3, "alice"),
        replace(ALICE, refused=1),
    ]


def test_one_too_many_in_a_row_is_enough() -> None:
    why = "3 results in a row were refused, the last because the norm is 9"
    assert follows(part("alice", PartState.REFUSED, "the norm is 9"), clients={"alice": replace(ALICE, refused=2)}) == [
        ("result refused", "the norm is 9", 3, "alice"),
        ("client quarantined", why, 3, "alice"),
        replace(ALICE, refused=3, quarantine=why),
    ]


@pytest.mark.parametrize(
    ("after", "refused", "quarantined"), [(1, 0, True), (3, 1, False), (3, 2, True), (2, 8, True), (None, 99, False)]
)
def test_how_many_are_too_many(after: int | None, refused: int, quarantined: bool) -> None:
    *_, client = follows(part("alice", PartState.REFUSED, "so"), clients={"alice": replace(ALICE, refused=refused)}, after=after)
    assert isinstance(client, ClientRecord)
    assert (client.refused, bool(client.quarantine)) == (refused + 1, quarantined)


def test_who_is_quarantined_already_keeps_the_first_reason() -> None:
    held = replace(ALICE, refused=5, quarantine="by an operator")
    assert follows(part("alice", PartState.REFUSED, "so"), clients={"alice": held}) == [
        ("result refused", "so", 3, "alice"),
        replace(held, refused=6),
    ]


def test_a_result_that_counts_does_not_release() -> None:
    held = replace(ALICE, refused=3, quarantine="so")
    assert follows(part("alice", PartState.ACCEPTED), clients={"alice": held}) == [replace(held, accepted=5, refused=0)]


def test_who_declines_is_noted_and_not_blamed() -> None:
    assert follows(part("bob", PartState.DECLINED, "out of memory"), clients={"bob": replace(BOB, refused=2)}) == [
        ("client declined", "out of memory", 3, "bob")
    ]


def test_what_is_cut_off_has_no_consequences() -> None:
    assert follows(part("alice", PartState.CANCELLED, "the deadline passed")) == []


def test_an_abandoned_round_is_told_before_its_parts() -> None:
    parts = part("alice", PartState.REFUSED, "so"), part("bob", PartState.CANCELLED, "too few")
    given_up = round_of(*parts, state=RoundState.ABANDONED, reason="too few are left")
    assert follows(*parts, round=given_up) == [
        ("round abandoned", "too few are left", 3, ""),
        ("result refused", "so", 3, "alice"),
        replace(ALICE, refused=1),
    ]
    assert follows(round=given_up) == [("round abandoned", "too few are left", 3, "")]
    assert follows(round=round_of(state=RoundState.CLOSED)) == []


def test_of_a_client_without_record_only_the_event_is_kept() -> None:
    assert follows(part("carol", PartState.REFUSED, "so"), part("dave", PartState.ACCEPTED)) == [
        ("result refused", "so", 3, "carol")
    ]


def test_who_is_released_begins_anew() -> None:
    assert release(replace(ALICE, refused=3, quarantine="so")) == ALICE
