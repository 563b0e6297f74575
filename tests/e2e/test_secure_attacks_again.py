"""A coordinator that asks in a secure sum for what was given before, for what a device's owner does not allow, or for nonsense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from choral.v1 import admin_pb2
from choral.v1 import federation_pb2 as pb
from choral_server.trust import make_authority
from e2e.federation import PATIENCE_S, Federation
from e2e.liar import Lie, Told
from e2e.secure_stage import NAMES, OTHERS, VICTIM, Change, Instead, Stage, staged

ALICE, BOB, CAROL, DAVE = NAMES


# Once more


def asked_again(stage: Stage, name: str = VICTIM) -> pb.Assignment:
    """What the client was last asked, with another name."""
    asked = pb.Assignment()
    asked.CopyFrom([one for client, one in stage.liar.spoken("assignment") if client == name][-1])
    asked.id += "-again"
    return asked


@pytest.mark.parametrize("restarted", [False, True])
def test_a_round_again_that_was_revealed(stage: Stage, restarted: bool) -> None:
    """Also by a client that was killed meanwhile and remembers nothing but its files."""
    played = stage.play()
    stage.clients[VICTIM].saw("secure sum done", round=played.number)
    asked = asked_again(stage)
    if restarted:
        stage.clients[VICTIM].kill()
        stage.client(VICTIM).saw("attending")
    adverts = len(stage.liar.heard("sum_advert"))
    stage.liar.tell(VICTIM, pb.AttendResponse(assignment=asked))
    reason = stage.clients[VICTIM].saw("declined", error="Deceived", round=played.number)["reason"]
    assert f"this client has revealed what it held in round {played.number} of run" in reason
    assert len(stage.liar.heard("sum_advert")) == adverts
    assert (
        f"revealed what it held in round {played.number}" in stage.coordinator.saw("client declines", assignment=asked.id)["reason"]
    )
    stage.play().sums(NAMES)


def test_who_survives_again_after_it_has_revealed(stage: Stage) -> None:
    """That one of them has dropped out after all."""

    played = stage.play()
    stage.clients[VICTIM].saw("secure sum done", round=played.number)
    about = asked_again(stage).id.removesuffix("-again")
    stage.liar.tell(VICTIM, pb.AttendResponse(sum_survivors=pb.SumSurvivors(assignment=about, clients=(ALICE, CAROL, DAVE))))
    reason = stage.clients[VICTIM].saw("declined", error="Deceived", assignment=about)["reason"]
    assert "who survives when it has revealed what it held, which it does once" in reason
    assert played.said("sum_signature").count(VICTIM) == played.said("sum_revealed").count(VICTIM) == 1
    played.sums(NAMES)


# What this device's owner asks


def of_someone(stage: Stage, *, wrong: str) -> str:
    """A guard that pins the others' keys, one of them wrongly."""
    pinned = {name: stage.clients[name].saw("client starts")["signing_key"] for name in OTHERS}
    pinned[wrong] = pinned[next(name for name in OTHERS if name != wrong)]
    return "".join(["clients:\n", *(f"  {name}: {key}\n" for name, key in pinned.items())])


@pytest.mark.parametrize(
    ("guard", "told"),
    [
        (
            "min_threshold: 0.9",
            "3 of 4 shares give a secret back; this device asks for a share of 0.9 (min_threshold in its guard)",
        ),
        ("clients: {bob: PIN}", "does not allow a secure sum with carol, which is not among those that it pins"),
        ("WRONG", "carol shows a signing key with the fingerprint"),
        ("authority: other/ca.pem", "is not certified by an authority that this device trusts"),
    ],
)
def test_a_guard_that_asks_for_more_than_there_is(stage: Stage, guard: str, told: str) -> None:
    other = stage.federation.folder / VICTIM / "client" / "other"
    if guard.startswith("authority") and not other.exists():
        other.mkdir()
        make_authority(other, ["localhost"])
    guard = guard.replace("PIN", stage.clients[BOB].saw("client starts")["signing_key"])
    with guarded(stage, of_someone(stage, wrong=CAROL) if guard == "WRONG" else guard):
        played = stage.play()
        assert told in played.deceived(VICTIM)
    assert told in played.event("client declined", VICTIM)
    assert VICTIM not in played.said("sum_shares")
    played.sums(OTHERS)


def in_the_clear(asked: pb.Assignment, lie: Lie) -> None:
    asked.plan.ClearField("secure")
    asked.codec = ""


def of_two(asked: pb.Assignment, lie: Lie) -> None:
    asked.plan.cohort = asked.plan.secure.least_clients = 2


@pytest.mark.parametrize(
    ("guard", "change", "told"),
    [
        ("secure_aggregation: true", in_the_clear, "requires secure_aggregation, and the coordinator does not ask for it"),
        ("min_cohort: 3", of_two, "does not allow a cohort of 2; it allows at least 3 (min_cohort)"),
        ("min_cohort: 5", lambda asked, lie: None, "does not allow a cohort of 4; it allows at least 5 (min_cohort)"),
    ],
)
def test_what_a_guard_does_not_allow_is_not_begun(stage: Stage, guard: str, change: Any, told: str) -> None:
    with guarded(stage, guard):
        played = stage.play(Instead("assignment", change))
        assert told in stage.clients[VICTIM].saw("declined", error="Declined", round=played.number)["reason"]
    assert told in played.event("client declined", VICTIM)
    assert VICTIM not in {*played.said("sum_advert"), *played.sent}
    played.sums(OTHERS)


@contextmanager
def guarded(stage: Stage, guard: str) -> Iterator[None]:
    """The victim's owner asks for that, for a while."""
    stage.guard(VICTIM, guard)
    try:
        yield
    finally:
        stage.guard(VICTIM, "min_cohort: 3")


# Two, of whom each would know the other's


def test_two_are_enough_only_if_both_their_owners_say_so(quick: Federation) -> None:
    sizes = {"cohort_size": 2, "quorum": 2, "start_with": 2, "max_abandoned": 1, "secure_aggregation": {"minimum_cohort": 2}}
    told = "this device's guard does not allow a secure sum of 2; it allows at least 3 (min_cohort)"
    with staged(quick, (ALICE, BOB), guard="", **sizes) as stage:
        for number, (allows, declines) in enumerate([((), (ALICE, BOB)), ((ALICE,), (BOB,)), ((BOB,), ())]):
            for name in allows:
                stage.guard(name, "min_cohort: 2")
            if number:
                stage.coordinator.saw("run over", number)  # until an operator has mended it
                with quick.admin() as admin:
                    admin.ResumeRun(admin_pb2.ResumeRunRequest(), timeout=PATIENCE_S)
                stage.ask()
            ended = stage.over(number)
            if declines:
                assert ended["event"] == "round abandoned"
                assert told in stage.event("client declined", number=number)
                first = stage.coordinator.events("client declines")[-1]["assignment"].split("/")[2]  # then it is over for the other
                assert first in declines
                assert told in stage.clients[first].saw("declined", error="Declined", round=number)["reason"]
                assert not stage.liar.sent
                assert not stage.liar.heard("sum_revealed")
        assert ended["event"] == "round done"
        assert {client for client, _ in stage.liar.heard("sum_revealed", number)} == {ALICE, BOB}


# What is no message


def changed(change: Callable[[Any], object]) -> Change:
    """The message itself is changed."""

    def apply(message: Any, lie: Lie) -> None:
        change(message)

    return apply


def survivors(*names: str) -> Change:
    def apply(message: pb.SumSurvivors, lie: Lie) -> None:
        message.clients[:] = names

    return apply


def test_a_message_for_another_assignment(stage: Stage) -> None:
    def astray(message: pb.SumShares, lie: Lie) -> Iterable[Told]:
        other = pb.SumShares(assignment="another", sealed=message.sealed)
        return pb.AttendResponse(sum_shares=other), pb.AttendResponse(sum_shares=message)

    stage.play(Instead("sum_shares", astray)).sums(NAMES)
    assert (
        "no keys for the secure sum any more"
        in stage.clients[VICTIM].saw("declined", error="Declined", assignment="another")["reason"]
    )


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("sum_survivors", survivors("a" * 65), "a client's name of 65 characters"),
        ("sum_shares", changed(lambda m: m.sealed.update({"a" * 100_000: b""})), "a client's name of 100000 characters"),
        ("sum_roster", lambda roster, lie: (b"\xff" * 100,), ""),
    ],
)
def test_what_cannot_be_said_at_all(stage: Stage, kind: str, change: Any, told: str) -> None:
    """It ends the client, with the reason; its owner starts it again."""
    lie = Instead(kind, change)
    number, before = stage.next, stage.model()
    stage.liar.lies(lie, number)
    stage.ask()
    victim = stage.clients[VICTIM]
    assert victim.code() != 0
    victim.said(told)
    assert "Traceback" not in victim.stderr
    played = stage.played(number, before)
    stage.client(VICTIM).saw("attending")
    assert VICTIM not in played.said("sum_revealed")
    played.sums(NAMES if kind == "sum_survivors" else OTHERS)
    stage.play().sums(NAMES)
