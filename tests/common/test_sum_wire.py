"""The messages of a secure sum on the wire: there and back as they are, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
from choral import sum_wire, wire
from choral.errors import InvalidMessage
from choral.secagg import keys
from choral.secagg.roster import advert
from choral.secagg.shamir import NUMBER_BYTES, PRIME
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
from choral.v1 import federation_pb2 as pb
from e2e.secure_sum import TERMS, People

ID, NAMES = "run/3/alice/0123abcd", ("alice", "bob")
PEOPLE = People.named(NAMES)
ADVERTS = tuple(advert(TERMS, name, keys.fresh().shown(), PEOPLE.signer(name)) for name in NAMES)
FROM: list[FromSummand] = [
    SumAdvert(ID, ADVERTS[0]),
    SumShares(ID, {"bob": b"sealed", "carol": b""}),
    SumShares(ID, {}),
    SumSignature(ID, bytes(64)),
    SumRevealed(ID, {"alice": 0, "bob": PRIME - 1}, {"carol": 7}),
    SumRevealed(ID, {}, {}),
]
TO: list[ToSummand] = [
    SumRoster(ID, ADVERTS),
    SumRoster(ID, ()),
    SumShares(ID, {"bob": b"sealed"}),
    SumSurvivors(ID, NAMES),
    SumSignatures(ID, {"alice": bytes(64), "bob": b"x"}),
]


@pytest.mark.parametrize("said", FROM, ids=lambda said: type(said).__name__)
def test_what_a_client_says_arrives_as_it_is(said: FromSummand) -> None:
    request = pb.AttendRequest.FromString(wire.from_client_to_pb(said).SerializeToString())
    assert sum_wire.of_request(request) == said
    assert wire.from_client_from_pb(request) == said


@pytest.mark.parametrize("said", TO, ids=lambda said: type(said).__name__)
def test_what_the_coordinator_says_arrives_as_it_is(said: ToSummand) -> None:
    response = pb.AttendResponse.FromString(wire.from_coordinator_to_pb(said).SerializeToString())
    assert sum_wire.of_response(response) == said
    assert wire.from_coordinator_from_pb(response) == said


def test_the_voucher_and_the_signature_of_an_advert_hold_after_the_trip() -> None:
    arrived = sum_wire.of_request(sum_wire.to_request(SumAdvert(ID, ADVERTS[0])))
    assert isinstance(arrived, SumAdvert)
    PEOPLE.vouch(arrived.advert)
    assert arrived.advert.signature == ADVERTS[0].signature


def test_other_messages_are_none_of_it() -> None:
    assert sum_wire.of_request(pb.AttendRequest(heartbeat=pb.Heartbeat())) is None
    assert sum_wire.of_request(pb.AttendRequest()) is None
    assert sum_wire.of_response(pb.AttendResponse(cancel=pb.Cancel())) is None
    assert sum_wire.of_response(pb.AttendResponse()) is None


LONG, LONGER = "a" * 64, "a" * 65
NAME_TOLD = "a client's name of 65 characters in a secure sum; it has 64 at the most"


@pytest.mark.parametrize(
    "message",
    [
        pb.AttendRequest(sum_advert=pb.SumAdvert(client=LONGER)),
        pb.AttendRequest(sum_shares=pb.SumShares(sealed={LONGER: b""})),
        pb.AttendRequest(sum_revealed=pb.SumRevealed(mask_seeds={LONGER: bytes(NUMBER_BYTES)})),
        pb.AttendRequest(sum_revealed=pb.SumRevealed(key_seeds={LONGER: bytes(NUMBER_BYTES)})),
    ],
)
def test_a_client_that_tells_a_name_that_is_none_is_refused(message: pb.AttendRequest) -> None:
    with pytest.raises(InvalidMessage, match=f"^{NAME_TOLD}$"):
        wire.from_client_from_pb(message)


@pytest.mark.parametrize(
    "message",
    [
        pb.AttendResponse(sum_roster=pb.SumRoster(adverts=[pb.SumAdvert(client=LONG), pb.SumAdvert(client=LONGER)])),
        pb.AttendResponse(sum_shares=pb.SumShares(sealed={LONGER: b""})),
        pb.AttendResponse(sum_survivors=pb.SumSurvivors(clients=[LONG, LONGER])),
        pb.AttendResponse(sum_signatures=pb.SumSignatures(signatures={LONGER: b""})),
    ],
)
def test_a_coordinator_that_tells_a_name_that_is_none_is_refused(message: pb.AttendResponse) -> None:
    with pytest.raises(InvalidMessage, match=f"^{NAME_TOLD}$"):
        wire.from_coordinator_from_pb(message)


@pytest.mark.parametrize("kind", ["sum_advert", "sum_shares", "sum_signature", "sum_revealed"])
def test_an_assignment_is_named_in_so_many_characters(kind: str) -> None:
    message = pb.AttendRequest()
    getattr(message, kind).assignment = "a" * 500
    assert wire.from_client_from_pb(message).assignment == "a" * 500  # type: ignore[union-attr]
    getattr(message, kind).assignment = "a" * 501
    with pytest.raises(InvalidMessage, match="an assignment's name of 501 characters in a secure sum; it has 500 at the most"):
        wire.from_client_from_pb(message)


@pytest.mark.parametrize("kind", ["sum_roster", "sum_shares", "sum_survivors", "sum_signatures"])
def test_by_a_coordinator_too(kind: str) -> None:
    message = pb.AttendResponse()
    getattr(message, kind).assignment = "a" * 501
    with pytest.raises(InvalidMessage, match="an assignment's name of 501 characters"):
        wire.from_coordinator_from_pb(message)


@pytest.mark.parametrize("length", [0, 1, NUMBER_BYTES - 1, NUMBER_BYTES + 1, 1 << 16])
@pytest.mark.parametrize("of", ["mask_seeds", "key_seeds"])
def test_a_share_of_another_length_is_refused(of: str, length: int) -> None:
    shares: dict[str, Any] = {of: {"alice": bytes(NUMBER_BYTES), "bob": bytes(length)}}
    with pytest.raises(InvalidMessage, match=f"a share in a secure sum that has not {NUMBER_BYTES} bytes"):
        wire.from_client_from_pb(pb.AttendRequest(sum_revealed=pb.SumRevealed(**shares)))


def test_a_share_that_is_no_number_of_the_field_arrives_for_others_to_refuse() -> None:
    largest = b"\xff" * NUMBER_BYTES
    said = wire.from_client_from_pb(pb.AttendRequest(sum_revealed=pb.SumRevealed(mask_seeds={"bob": largest})))
    assert said == SumRevealed("", {"bob": 2 ** (8 * NUMBER_BYTES) - 1}, {})
