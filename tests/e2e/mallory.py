"""A client that cheats in a secure sum: it has the real one's mathematics, and says what a test wants said."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from choral import sum_wire, wire
from choral.messages import Assignment, Status
from choral.plan import digest_of
from choral.secagg import summand
from choral.secagg.fixed_point import fixed_point
from choral.secagg.keys import Secrets
from choral.secagg.masks import Mask
from choral.secagg.roster import Roster, Terms, advert
from choral.secagg.summand import Summand, layout_of
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
from choral_client.masking import Floor, Masking
from choral_client.signing_key import SigningKey
from e2e.federation import Federation
from e2e.scripted import Scripted, hello

NAME = "mallory"
UPDATE = (1.0, 2.0, 3.0)
"""What its model has changed by: of a, of b, and of the bias."""
M = TypeVar("M", bound=ToSummand)


def as_it_is(said: Any) -> Any:
    """No change."""
    return said


class Blind(Masking):
    """Takes any roster: also one in which it has shown what is not its own."""

    def _check_roster(self, roster: Roster, secrets: Secrets) -> None:
        pass


class Mallory(Scripted):
    """Attends, and takes part step by step; each takes what is to be changed of what is said."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation, hello(NAME, task="slope", codecs=["masked"]))
        self.federation = federation
        self.hear("welcome")
        self.signer = SigningKey.of(federation.folder / "members" / NAME).signer(NAME)

    def asked(self) -> None:
        """Wait until it is asked for its part."""
        asked = wire.from_coordinator_from_pb(pb.AttendResponse(assignment=self.hear("assignment")))
        assert isinstance(asked, Assignment)
        assert asked.plan.secure is not None
        self.assignment, self.plan, self.secure = asked.id, asked.plan, asked.plan.secure
        digest, share = digest_of(asked.plan), asked.plan.secure.threshold
        self.terms = Terms(asked.plan.secure.run, asked.round, asked.version.digest, digest, share)
        self.masking = Blind(self.terms, NAME, self.signer, lambda said: None, Floor(2), lambda terms: None)

    def advertise(self, change: Callable[[SumAdvert], SumAdvert] = as_it_is) -> None:
        """That it takes part."""
        self.tell(change(SumAdvert(self.assignment, self.masking.advertise())))

    def sign(self, said: SumAdvert, **changes: Any) -> SumAdvert:
        """The same advert with other keys, and signed."""
        return replace(said, advert=advert(self.terms, NAME, replace(said.advert.shown, **changes), self.signer))

    def share(self, change: Callable[[SumShares], SumShares] = as_it_is) -> None:
        """Shares for the others."""
        self.roster = Roster.of(self.terms, self._next(SumRoster).adverts)
        self.tell(change(SumShares(self.assignment, self.masking.take_roster(self.roster))))

    def masks(self) -> Mask:
        """What hides its result, once the others' shares are here."""
        return self.masking.take_shares(self._next(SumShares).sealed)

    def send_result(
        self,
        mask: Mask | None = None,
        numbers: Mapping[str, float] | None = None,
        content: Callable[[bytes], bytes] = as_it_is,
        **header: Any,
    ) -> pb.UploadResponse:
        """Its result, under a mask if there is one; with other numbers, other bytes, another header."""
        layout, secure = layout_of(self.plan, len(UPDATE), None, ("loss",)), self.secure
        scale = fixed_point(secure.most_clients, secure.clip, secure.ring_bits, secure.fraction_bits)
        told = {summand.CLIENTS: 1.0, summand.WEIGHT: float(secure.weight_cap)} | dict(numbers or {})
        made = Summand(scale.encode(np.array(UPDATE, np.float32)), layout.numbers(told))
        if mask is not None:
            made.add_mask(mask)
        payload = content(b"".join(made.pieces()))
        said: dict[str, Any] = {"assignment": self.assignment, "client": NAME, "payload": pb.PAYLOAD_KIND_DELTA, "codec": "masked"}
        said |= {"payload_bytes": len(payload), "digest": hashlib.sha256(payload).digest(), "content": payload}
        return self.send([pb.UploadRequest(header=pb.UploadHeader(**said | header))])

    def sign_survivors(self, change: Callable[[SumSignature], SumSignature] = as_it_is) -> None:
        """Who has survived."""
        self.tell(change(SumSignature(self.assignment, self.masking.take_survivors(self._next(SumSurvivors).clients))))

    def reveal(self, change: Callable[[SumRevealed], SumRevealed] = as_it_is) -> None:
        """What it holds of the others' secrets."""
        said = self.masking.reveal(self._next(SumSignatures).signatures)
        self.tell(change(SumRevealed(self.assignment, said.mask_seeds, said.key_seeds)))

    def tell(self, said: FromSummand | Status) -> None:
        """Say it on the stream."""
        self.say(wire.from_client_to_pb(said))

    def _next(self, kind: type[M]) -> M:
        for message in self._call:
            said = sum_wire.of_response(message)
            if isinstance(said, kind):
                return said
        raise AssertionError(f"the stream ended without {kind.__name__}")


def noise(content: bytes) -> bytes:
    """As many bytes, of no meaning."""
    return secrets.token_bytes(len(content))
