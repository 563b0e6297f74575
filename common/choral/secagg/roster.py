"""Who takes part in a secure sum, with which keys, and what all of them sign: the one thing that the coordinator cannot make up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from choral.canonical import canonical
from choral.errors import Deceived, InvalidMessage
from choral.secagg.graph import Shape, neighbours_of, shape_of
from choral.secagg.keys import Shown, check_shown, points

Sign = Callable[[bytes], bytes]
"""Makes a client's Ed25519 signature."""


@dataclass(frozen=True, slots=True)
class Signer:
    """A client's long-term Ed25519 key: who signs with it, the public key, 32 bytes, and by whom it is certified, if it is."""

    sign: Sign
    key: bytes
    voucher: bytes = b""


@dataclass(frozen=True, slots=True)
class Terms:
    """What all clients of a round must have been told alike: `version` and `plan` are the digests of the model and of the plan.

    `threshold`, which the plan says as well, is the share of the holders of a secret who must reveal; 0: as few as is safe.
    """

    run: str
    round: int
    version: bytes
    plan: bytes
    threshold: float = 0.0

    def told(self) -> dict[str, str | int]:
        """As it is signed."""
        return {"run": self.run, "round": self.round, "version": self.version.hex(), "plan": self.plan.hex()}


@dataclass(frozen=True, slots=True)
class Advert:
    """A client takes part, with these keys; it has signed that, with the terms. `key` and `voucher` are its `Signer`'s."""

    client: str
    shown: Shown
    key: bytes
    signature: bytes
    voucher: bytes = b""


Vouch = Callable[[Advert], None]
"""Sees whether the signing key of an advert is known to be its client's. Raises Deceived: it is not."""


def advert(terms: Terms, client: str, shown: Shown, signer: Signer) -> Advert:
    """What a client says first."""
    return Advert(client, shown, signer.key, signer.sign(_advertised(terms, client, shown)), signer.voucher)


def check_advert(terms: Terms, said: Advert, vouch: Vouch) -> None:
    """Raises Deceived: it is not signed, or not on these terms, or the keys are none, or the signing key is not the client's."""
    try:
        check_shown(said.client, said.shown)
    except InvalidMessage as error:
        raise Deceived(str(error)) from error
    vouch(said)
    if not _is_signed(_advertised(terms, said.client, said.shown), said.signature, said.key):
        raise Deceived(
            f"{said.client} has not signed the keys that are said to be its own for round {terms.round} of run {terms.run}, or was "
            f"told of another model or another plan"
        )


def shared_keys(adverts: Iterable[Advert]) -> tuple[str, str] | None:
    """Two clients that show the same key, however it is written, if there are two."""
    owners: dict[int, str] = {}
    for one in adverts:
        for point in points(one.shown):
            if owners.setdefault(point, one.client) != one.client:
                return owners[point], one.client
    return None


@dataclass(frozen=True)
class Roster:
    """All adverts of a round, in the order of their names; a client's number is its place in it, from 0."""

    terms: Terms
    adverts: tuple[Advert, ...]

    @classmethod
    def of(cls, terms: Terms, adverts: Iterable[Advert]) -> Roster:
        """The roster of these adverts."""
        return cls(terms, tuple(sorted(adverts, key=lambda one: one.client)))

    @cached_property
    def session(self) -> bytes:
        """Its digest, to which all that follows is bound."""
        told = [_shown(one.client, one.shown) | {"key": one.key.hex(), "signature": one.signature.hex()} for one in self.adverts]
        return hashlib.sha256(canonical({"choral secagg": 1, "adverts": told, **self.terms.told()}).encode()).digest()

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Each client's number."""
        return {one.client: number for number, one in enumerate(self.adverts)}

    @cached_property
    def shape(self) -> Shape:
        """Of the graph. Raises ConfigError: of one client there is no sum, or the threshold is none."""
        return shape_of(len(self.adverts), self.terms.threshold)

    @cached_property
    def _neighbours(self) -> list[tuple[int, ...]]:
        return neighbours_of(self.shape, self.session)

    def shown(self, client: str) -> Shown:
        """A client's public keys of this round."""
        return self.adverts[self.numbers[client]].shown

    def key(self, client: str) -> bytes:
        """A client's signing key."""
        return self.adverts[self.numbers[client]].key

    def neighbours(self, client: str) -> tuple[str, ...]:
        """With whom a client shares masks."""
        return tuple(self.adverts[number].client for number in self._neighbours[self.numbers[client]])

    def pair(self, one: str, other: str) -> bytes:
        """Says which two clients have a mask in common, the same on both sides: in the order of their numbers."""
        pair = sorted((one, other), key=self.numbers.__getitem__)
        return canonical({"pair": [_shown(client, self.shown(client)) for client in pair]}).encode()

    def holders(self, client: str) -> tuple[str, ...]:
        """Who has shares of a client's secrets: its neighbours, and itself."""
        return (client, *self.neighbours(client))


def share_number(roster: Roster, holder: str) -> int:
    """Where a holder's shares are taken: from 1 on, since at 0 the secret is."""
    return roster.numbers[holder] + 1


def sign_survivors(roster: Roster, survivors: Iterable[str], sign: Sign) -> bytes:
    """That a client was told that these and no others have sent a masked update."""
    return sign(_survivors(roster, survivors))


def has_signed_survivors(roster: Roster, survivors: Iterable[str], client: str, signature: bytes) -> bool:
    """Whether a client of the roster was told the same."""
    return _is_signed(_survivors(roster, survivors), signature, roster.key(client))


def _advertised(terms: Terms, client: str, shown: Shown) -> bytes:
    return canonical({"choral secagg": 1, "advert": _shown(client, shown), **terms.told()}).encode()


def _survivors(roster: Roster, survivors: Iterable[str]) -> bytes:
    return canonical({"choral secagg": 1, "session": roster.session.hex(), "survivors": sorted(survivors)}).encode()


def _shown(client: str, shown: Shown) -> dict[str, str]:
    return {
        "client": client,
        "mask_key": shown.mask_key.hex(),
        "share_key": shown.share_key.hex(),
        "commitment": shown.commitment.hex(),
    }


def _is_signed(statement: bytes, signature: bytes, key: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True
