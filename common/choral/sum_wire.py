"""The messages of a secure sum <-> protobuf."""

from __future__ import annotations

from collections.abc import Mapping

from choral.errors import InvalidMessage
from choral.secagg.keys import Shown
from choral.secagg.roster import Advert
from choral.secagg.shamir import NUMBER_BYTES
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

_LONGEST_NAME, _LONGEST_ID = 64, 500  # characters
_LONGEST_VOUCHER = 1024  # bytes: the longest signature of an RSA key that is used has half of it


def to_request(said: FromSummand) -> pb.AttendRequest:
    """What a client says, to protobuf."""
    match said:
        case SumAdvert():
            return pb.AttendRequest(sum_advert=_advert_to_pb(said.advert, said.assignment))
        case SumShares():
            return pb.AttendRequest(sum_shares=pb.SumShares(assignment=said.assignment, sealed=said.sealed))
        case SumSignature():
            return pb.AttendRequest(sum_signature=pb.SumSignature(assignment=said.assignment, signature=said.signature))
        case SumRevealed():
            mask_seeds, key_seeds = _numbers_to_pb(said.mask_seeds), _numbers_to_pb(said.key_seeds)
            revealed = pb.SumRevealed(assignment=said.assignment, mask_seeds=mask_seeds, key_seeds=key_seeds)
            return pb.AttendRequest(sum_revealed=revealed)


def of_request(request: pb.AttendRequest) -> FromSummand | None:
    """What a client says in a secure sum; None: something else. Raises InvalidMessage: a name or a number that cannot be."""
    match request.WhichOneof("message"):
        case "sum_advert":
            return SumAdvert(_id(request.sum_advert.assignment), _advert_from_pb(request.sum_advert))
        case "sum_shares":
            return _shares(request.sum_shares)
        case "sum_signature":
            return SumSignature(_id(request.sum_signature.assignment), request.sum_signature.signature)
        case "sum_revealed":
            revealed = request.sum_revealed
            mask_seeds, key_seeds = _numbers_from_pb(revealed.mask_seeds), _numbers_from_pb(revealed.key_seeds)
            return SumRevealed(_id(revealed.assignment), mask_seeds, key_seeds)
    return None


def to_response(said: ToSummand) -> pb.AttendResponse:
    """What the coordinator says, to protobuf."""
    match said:
        case SumRoster():
            adverts = [_advert_to_pb(one) for one in said.adverts]
            return pb.AttendResponse(sum_roster=pb.SumRoster(assignment=said.assignment, adverts=adverts))
        case SumShares():
            return pb.AttendResponse(sum_shares=pb.SumShares(assignment=said.assignment, sealed=said.sealed))
        case SumSurvivors():
            return pb.AttendResponse(sum_survivors=pb.SumSurvivors(assignment=said.assignment, clients=said.clients))
        case SumSignatures():
            return pb.AttendResponse(sum_signatures=pb.SumSignatures(assignment=said.assignment, signatures=said.signatures))


def of_response(response: pb.AttendResponse) -> ToSummand | None:
    """What the coordinator says in a secure sum; None: something else. Raises InvalidMessage: a name that cannot be."""
    match response.WhichOneof("message"):
        case "sum_roster":
            return SumRoster(_id(response.sum_roster.assignment), tuple(map(_advert_from_pb, response.sum_roster.adverts)))
        case "sum_shares":
            return _shares(response.sum_shares)
        case "sum_survivors":
            return SumSurvivors(_id(response.sum_survivors.assignment), tuple(map(_name, response.sum_survivors.clients)))
        case "sum_signatures":
            signatures = _by_name(response.sum_signatures.signatures)
            return SumSignatures(_id(response.sum_signatures.assignment), signatures)
    return None


def _shares(message: pb.SumShares) -> SumShares:
    return SumShares(_id(message.assignment), _by_name(message.sealed))


def _advert_to_pb(advert: Advert, assignment: str = "") -> pb.SumAdvert:
    return pb.SumAdvert(
        assignment=assignment,
        client=advert.client,
        mask_key=advert.shown.mask_key,
        share_key=advert.shown.share_key,
        commitment=advert.shown.commitment,
        signing_key=advert.key,
        signature=advert.signature,
        voucher=advert.voucher,
    )


def _advert_from_pb(message: pb.SumAdvert) -> Advert:
    if len(message.voucher) > _LONGEST_VOUCHER:  # it is passed on to everybody
        raise InvalidMessage(f"a voucher of {len(message.voucher)} bytes in a secure sum; it has {_LONGEST_VOUCHER} at the most")
    shown = Shown(message.mask_key, message.share_key, message.commitment)
    return Advert(_name(message.client), shown, message.signing_key, message.signature, message.voucher)


def _numbers_to_pb(numbers: Mapping[str, int]) -> dict[str, bytes]:
    return {name: number.to_bytes(NUMBER_BYTES, "big") for name, number in numbers.items()}


def _numbers_from_pb(message: Mapping[str, bytes]) -> dict[str, int]:
    if any(len(content) != NUMBER_BYTES for content in message.values()):
        raise InvalidMessage(f"a share in a secure sum that has not {NUMBER_BYTES} bytes: update Choral on both sides")
    return {name: int.from_bytes(content, "big") for name, content in _by_name(message).items()}


def _by_name(message: Mapping[str, bytes]) -> dict[str, bytes]:
    return {_name(name): content for name, content in message.items()}


def _name(text: str) -> str:
    return _no_longer(text, _LONGEST_NAME, "a client's name")


def _id(text: str) -> str:
    return _no_longer(text, _LONGEST_ID, "an assignment's name")


def _no_longer(text: str, longest: int, what: str) -> str:
    if len(text) > longest:
        raise InvalidMessage(f"{what} of {len(text)} characters in a secure sum; it has {longest} at the most")
    return text
