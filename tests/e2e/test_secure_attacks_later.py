"""A coordinator that lies in a secure sum when it has begun: about shares, survivors and signatures.

As in test_secure_attacks: the victim says why it goes no further, reveals nothing, and operators see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from choral.v1 import federation_pb2 as pb
from e2e.liar import Lie, Told
from e2e.secure_stage import NAMES, OTHERS, VICTIM, Change, Instead, Stage

ALICE, BOB, CAROL, DAVE = NAMES


# Shares, survivors, signatures


def instead(kind: str, **fields: Any) -> Change:
    """A message of another kind, to the same assignment."""
    made = getattr(pb, "".join(part.capitalize() for part in kind.split("_")))

    def change(message: Any, lie: Lie) -> Iterable[Told]:
        return (pb.AttendResponse(**{kind: made(assignment=message.assignment, **fields)}),)

    return change


def changed(change: Callable[[Any], object]) -> Change:
    """The message itself is changed."""

    def apply(message: Any, lie: Lie) -> None:
        change(message)

    return apply


def survivors(*names: str) -> Change:
    def apply(message: pb.SumSurvivors, lie: Lie) -> None:
        message.clients[:] = names

    return apply


def only(field: str, *names: str) -> Change:
    def apply(message: Any, lie: Lie) -> None:
        given = getattr(message, field)
        for name in set(given) - set(names):
            del given[name]

    return apply


def in_place_of_all(content: bytes) -> Change:
    def apply(message: pb.SumSignatures, lie: Lie) -> None:
        for name in list(message.signatures):
            message.signatures[name] = content

    return apply


def of_bob_in_place_of_all(message: pb.SumSignatures, lie: Lie) -> None:
    in_place_of_all(message.signatures[BOB])(message, lie)


def another_roster_after(message: pb.SumShares, lie: Lie) -> Iterable[Told]:
    (roster,) = [one for client, one in lie.liar.spoken("sum_roster") if client == VICTIM][-1:]
    del roster.adverts[0]
    return (pb.AttendResponse(sum_roster=roster), pb.AttendResponse(sum_shares=message))


def two_lists(message: pb.SumSignatures, lie: Lie) -> Iterable[Told]:
    """After it has signed that all survive, that one of them has dropped out: both of that one's secrets, if it answered."""
    again = pb.SumSurvivors(assignment=message.assignment, clients=(ALICE, CAROL, DAVE))
    return (pb.AttendResponse(sum_survivors=again), pb.AttendResponse(sum_signatures=message))


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("sum_shares", changed(lambda m: m.sealed.update({"stranger": m.sealed[BOB]})), "shares come from stranger"),
        ("sum_shares", changed(lambda m: m.sealed.update({VICTIM: m.sealed[BOB]})), "shares come from alice"),
        ("sum_shares", only("sealed", BOB), "2 of this client's 4 holders have sent shares; 3 are needed"),
        ("sum_shares", only("sealed"), "1 of this client's 4 holders have sent shares; 3 are needed"),
        ("sum_roster", instead("sum_shares"), "the shares of others' secrets, where who takes part in the secure sum is next"),
        ("sum_roster", instead("sum_survivors"), "who survives, where who takes part in the secure sum is next"),
        ("sum_shares", instead("sum_signatures"), "what the others have signed, where the shares of others' secrets is next"),
        ("sum_shares", another_roster_after, "who takes part in the secure sum again, and not the same as before"),
    ],
)
def test_before_its_result_is_sent(stage: Stage, kind: str, change: Any, told: str) -> None:
    played = stage.play(Instead(kind, change))
    assert told in played.deceived(VICTIM)
    assert told in played.event("client declined", VICTIM)
    assert VICTIM not in played.sent
    assert sorted(played.said("sum_revealed")) == sorted(OTHERS)
    played.sums(OTHERS)


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("sum_survivors", survivors(*OTHERS), "this client is said to have dropped out"),
        ("sum_survivors", survivors(), "this client is said to have dropped out"),
        ("sum_survivors", survivors(*NAMES, "stranger"), "stranger are said to survive, who are not in the roster"),
        ("sum_survivors", survivors(ALICE, BOB), "2 clients survive; this device asks for 3 in a secure sum at least"),
        ("sum_survivors", instead("sum_signatures"), "what the others have signed, where who survives is next"),
        ("sum_signatures", two_lists, "who survives again, and not the same as before"),
        ("sum_signatures", only("signatures"), "only 0 of 4 who survive were told the same as this client, where 3 must be"),
        ("sum_signatures", only("signatures", ALICE, BOB), "only 2 of 4 who survive were told the same"),
        ("sum_signatures", in_place_of_all(bytes(64)), "only 0 of 4 who survive were told the same"),
        ("sum_signatures", in_place_of_all(b""), "only 0 of 4 who survive were told the same"),
        ("sum_signatures", of_bob_in_place_of_all, "only 1 of 4 who survive were told the same"),
    ],
)
def test_before_it_reveals(stage: Stage, kind: str, change: Any, told: str) -> None:
    played = stage.play(Instead(kind, change))
    assert told in played.deceived(VICTIM)
    assert told in played.event("secure sum left", VICTIM)
    assert sorted(played.said("sum_revealed")) == sorted(OTHERS)
    played.sums(NAMES)  # its result was in the sum before the lie, and is hidden in it


def test_one_of_whom_no_shares_came_is_said_to_survive(stage: Stage) -> None:
    class Withheld(Lie):
        def told(self, client: str, message: pb.AttendResponse) -> Iterable[Told]:
            if client == VICTIM and message.WhichOneof("message") == "sum_shares":
                del message.sum_shares.sealed[BOB]
            return (message,)

    played = stage.play(Withheld())
    told = "bob are said to survive, whose shares never came here"
    assert told in played.deceived(VICTIM)
    assert told in played.event("secure sum left", VICTIM)
    assert VICTIM not in played.said("sum_revealed")


class Halves(Lie):
    """Half are told that the victim survives, half that it does not; to all, all signatures are shown."""

    def __init__(self) -> None:
        super().__init__()
        self.signatures: dict[str, bytes] = {}
        self.assignments: dict[str, str] = {}

    def told(self, client: str, message: pb.AttendResponse) -> Iterable[Told]:
        match message.WhichOneof("message"):
            case "sum_survivors" if client in (CAROL, DAVE):
                message.sum_survivors.clients.remove(VICTIM)
            case "cancel":
                return ()
        return (message,)

    def said(self, client: str, message: pb.AttendRequest) -> Iterable[pb.AttendRequest]:
        if message.WhichOneof("message") == "sum_signature":
            self.assignments[client] = message.sum_signature.assignment
            self.signatures[client] = message.sum_signature.signature
            if len(self.signatures) == len(NAMES):
                for one, assignment in self.assignments.items():
                    said = pb.SumSignatures(assignment=assignment, signatures=self.signatures)
                    self.liar.tell(one, pb.AttendResponse(sum_signatures=said))
        return (message,)


def test_a_live_client_is_called_dead_to_some(stage: Stage) -> None:
    """Both its secrets would be known, had each half believed what it was told: its update, then, would be."""
    played = stage.play(Halves())
    for name in NAMES:
        alive = 3 if name in (CAROL, DAVE) else 4
        assert f"only 2 of {alive} who survive were told the same as this client, where 3 must be" in played.deceived(name)
    assert not played.said("sum_revealed")
    assert played.state == "round abandoned"
    assert "the secure sum came to nothing" in played.event("round abandoned")


def test_shares_that_were_tampered_with_on_their_way(stage: Stage) -> None:
    """They stop nobody: of three other holders there are enough. The victim has nothing of bob's to reveal."""

    def tamper(message: pb.SumShares, lie: Lie) -> None:
        sealed = message.sealed[BOB]
        message.sealed[BOB] = sealed[:-1] + bytes([sealed[-1] ^ 1])

    played = stage.play(Instead("sum_shares", tamper))
    assert "not what it has sealed for alice" in stage.clients[VICTIM].saw("no shares", sender=BOB)["reason"]
    (said,) = [one for client, one in stage.liar.heard("sum_revealed", played.number) if client == VICTIM]
    assert set(said.mask_seeds) == {ALICE, CAROL, DAVE}
    played.sums(NAMES)
