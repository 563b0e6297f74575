"""The coordinator's side of one secure sum: what it passes on at each step, and what is left to take off the sum.

    take_advert, close_adverts ─▶ take_shares, shares_for ─▶ (masked updates) ─▶ close ─▶ take_signature, signatures_for
                        ─▶ take_revealed, mask

Pure: nothing waits here, or talks. The coordinator is not trusted with anything; what it checks is that no client spoils the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Set
from itertools import combinations, islice

import structlog
from choral.errors import ChoralError, Deceived, UpdateRefused
from choral.secagg import keys
from choral.secagg.keys import SEALED_BYTES, points
from choral.secagg.masks import Mask
from choral.secagg.roster import (
    Advert,
    Roster,
    Terms,
    Vouch,
    check_advert,
    has_signed_survivors,
    share_number,
)
from choral.secagg.shamir import PRIME, Recovery, corrected

log = structlog.get_logger()
_TRIES = 1000  # of the ways to choose shares, of which all in one must be right


class TooFew(ChoralError):
    """So many have gone, or so much of what was revealed is wrong, that the sum cannot be unmasked."""


class Unmasking:
    """One attempt at a round. `vouch` knows the clients' signing keys; `least_clients` must take part."""

    def __init__(self, terms: Terms, vouch: Vouch, least_clients: int) -> None:
        self._terms = terms
        self._vouch = vouch
        self._least = least_clients
        self._adverts: dict[str, Advert] = {}
        self._points: set[int] = set()  # all keys that were shown
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._signatures: dict[str, bytes] = {}
        self._mask_seeds: dict[str, dict[int, int]] = {}  # shares by whose secret, and by the holder's number
        self._key_seeds: dict[str, dict[int, int]] = {}
        self._revealed: set[int] = set()
        self._recovery: tuple[tuple[int, ...], Recovery] | None = None
        self._roster: Roster | None = None
        self._delivering = False
        self.survivors: tuple[str, ...] = ()

    def take_advert(self, said: Advert) -> None:
        """A client takes part. Raises UpdateRefused: it has not signed that, or says it twice."""
        if self._roster is not None or said.client in self._adverts:
            raise UpdateRefused(f"{said.client} shows keys for the secure sum again, or too late: once a round, before the roster")
        try:
            check_advert(self._terms, said, self._vouch)
        except Deceived as error:
            raise UpdateRefused(str(error)) from error
        if not self._points.isdisjoint(points(said.shown)):
            raise UpdateRefused(f"{said.client} shows a key that another client has shown")
        self._points |= points(said.shown)
        self._adverts[said.client] = said

    def renew_advert(self, said: Advert) -> None:
        """The same, in place of what the client has shown before, if it has. Raises UpdateRefused: then that still holds."""
        before = self._adverts.get(said.client)
        self.retract(said.client)
        try:
            self.take_advert(said)
        except UpdateRefused:
            if before is not None:
                self.take_advert(before)
            raise

    def retract(self, client: str) -> None:
        """A client does not take part after all, or will show other keys."""
        if self._roster is None and (said := self._adverts.pop(client, None)) is not None:
            self._points -= points(said.shown)

    @property
    def advertised(self) -> Set[str]:
        """Who has shown keys."""
        return self._adverts.keys()

    def close_adverts(self) -> Roster:
        """Who takes part, from now on. Raises TooFew."""
        if len(self._adverts) < self._least:
            raise TooFew(f"{len(self._adverts)} clients take part in the secure sum; {self._least} must")
        self._roster = Roster.of(self._terms, self._adverts.values())
        return self._roster

    @property
    def roster(self) -> Roster:
        """Who takes part. Raises UpdateRefused: that is not known yet."""
        if self._roster is None:
            raise UpdateRefused("it is not known yet who takes part in the secure sum: shares come after the roster")
        return self._roster

    def take_shares(self, client: str, sealed: Mapping[str, bytes]) -> None:
        """What a client has sealed for its neighbours. Raises UpdateRefused: not one for each."""
        self._must_belong(client)
        neighbours = self.roster.neighbours(client)
        if self._delivering or client in self._sealed or sealed.keys() != set(neighbours):
            told = f"shares for {len(sealed)} of its {len(neighbours)} neighbours, again, or too late"
            raise UpdateRefused(f"{client} sends {told}")
        if any(len(content) != SEALED_BYTES for content in sealed.values()):
            raise UpdateRefused(f"{client} sends shares that are not of {SEALED_BYTES} bytes")
        self._sealed[client] = dict(sealed)

    def close_shares(self) -> None:
        """Nobody else sends shares. Raises TooFew: no client would send a masked update."""
        least = self.roster.shape.threshold
        for one in self._sealed:
            if (count := sum(holder in self._sealed for holder in self.roster.holders(one))) < least:
                raise TooFew(f"{count} of the {self.roster.shape.holders} who hold shares of {one} have sent shares; {least} must")
        if not self._sealed:
            raise TooFew("nobody has sent shares")

    def shares_for(self, client: str) -> dict[str, bytes]:
        """What was sealed for a client, by those who go on: from now on nobody else does. Raises UpdateRefused: it has no part."""
        self._must_belong(client)
        self._delivering = True
        return {one: self._sealed[one][client] for one in self.roster.neighbours(client) if one in self._sealed}

    def close(self, sent: Collection[str]) -> tuple[str, ...]:
        """Who has sent a masked update that is in the sum. Raises TooFew: their masks could not be taken off."""
        self.survivors = tuple(sorted(one for one in sent if one in self._sealed))
        self._must_be_enough(set(self.survivors))
        return self.survivors

    def take_signature(self, client: str, signature: bytes) -> None:
        """That a survivor was told who survives. Raises UpdateRefused: it is none, or another's."""
        if client not in self.survivors or not has_signed_survivors(self.roster, self.survivors, client, signature):
            raise UpdateRefused(f"{client} has not signed who has sent a masked update")
        self._signatures[client] = signature

    def close_signatures(self) -> None:
        """Nobody else signs. Raises TooFew: nobody would reveal anything."""
        self._must_be_enough(self._signatures.keys())

    def signatures_for(self, client: str) -> dict[str, bytes]:
        """What a client is shown so that it reveals its shares."""
        return {one: self._signatures[one] for one in self.roster.holders(client) if one in self._signatures}

    def take_revealed(self, client: str, mask_seeds: Mapping[str, int], key_seeds: Mapping[str, int]) -> None:
        """A survivor's shares of others' secrets, once. Raises UpdateRefused: of others than are needed, or no such numbers."""
        self._must_belong(client)
        number = share_number(self.roster, client)
        held = {one for one in self.roster.holders(client) if one in self._sealed}
        survived = held.intersection(self.survivors)
        if number in self._revealed or client not in self._signatures:
            raise UpdateRefused(f"{client} reveals shares again, or without having signed who survives")
        if not (mask_seeds.keys() <= survived and key_seeds.keys() <= held - survived):
            raise UpdateRefused(f"{client} reveals shares of others than it was asked for")
        if not all(0 <= share < PRIME for share in (*mask_seeds.values(), *key_seeds.values())):
            raise UpdateRefused(f"{client} reveals what are no shares")
        self._revealed.add(number)
        for into, shares in ((self._mask_seeds, mask_seeds), (self._key_seeds, key_seeds)):
            for one, share in shares.items():
                into.setdefault(one, {})[number] = share

    @property
    def complete(self) -> bool:
        """Whether enough has been revealed of everybody, unless some of it is wrong: then `mask` needs more."""
        least = self.roster.shape.threshold
        return all(len(self._mask_seeds.get(one, ())) >= least for one in self.survivors) and all(
            len(self._key_seeds.get(one, ())) >= least for one in self._gone()
        )

    def mask(self) -> Mask:
        """What must be added to the sum of the survivors' masked updates. Raises TooFew: what was revealed does not give it."""
        roster = self.roster
        minus = [keys.self_mask(self._mask_seed(one), roster.session) for one in self.survivors]
        plus = list[bytes]()
        for gone, beside in self._gone().items():
            mask_key = keys.mask_key_of(self._key_seed(gone))
            for other in beside:
                key = keys.pair_mask(mask_key, roster.shown(other).mask_key, roster.session, roster.pair(gone, other))
                (minus if roster.numbers[other] < roster.numbers[gone] else plus).append(key)  # the lower number has added it
        return Mask(plus, minus)

    def _mask_seed(self, client: str) -> int:
        expected = self.roster.shown(client).commitment
        return self._recovered(client, self._mask_seeds, lambda seed: keys.commitment(seed) == expected)

    def _key_seed(self, client: str) -> int:
        shown = self.roster.shown(client)
        return self._recovered(client, self._key_seeds, lambda seed: keys.is_key_seed(seed, shown))

    def _gone(self) -> dict[str, list[str]]:
        """Who has sent shares and no update, with the survivors in whose updates the mask that they have in common is left."""
        survivors = set(self.survivors)
        gone = sorted(self._sealed.keys() - survivors)
        beside = {one: [other for other in self.roster.neighbours(one) if other in survivors] for one in gone}
        return {one: others for one, others in beside.items() if others}

    def _recovered(self, client: str, shares: Mapping[str, Mapping[int, int]], right: Callable[[int], bool]) -> int:
        """A client's secret, although some shares may be wrong: of holders who lie, or of a client who has shared nonsense."""
        held, least = shares.get(client, {}), self.roster.shape.threshold
        if len(held) >= least:
            if right(secret := self._recovery_of(tuple(sorted(held)[:least])).secret(held)):
                return secret
            found = corrected(held, least)
            if found is not None and right(found[0]):
                log.warning("wrong shares", of=client, held_by=self._names(found[1]))
                return found[0]
            for holders in islice(
                combinations(sorted(held), least), _TRIES
            ):  # of few clients, one wrong share more than can be told
                if right(secret := Recovery(holders).secret(held)):
                    log.warning("wrong shares", of=client, held_by_one_of=self._names(held.keys() - set(holders)))
                    return secret
        raise TooFew(
            f"{len(held)} shares of a secret of {client} do not give it back, where {least} that are right would: it has shared "
            f"something else, or some who hold its shares lie"
        )

    def _names(self, holders: Iterable[int]) -> list[str]:
        return [self.roster.adverts[holder - 1].client for holder in sorted(holders)]

    def _recovery_of(self, holders: tuple[int, ...]) -> Recovery:
        """The same for many secrets, if everybody is everybody's neighbour."""
        if self._recovery is None or self._recovery[0] != holders:
            self._recovery = holders, Recovery(holders)
        return self._recovery[1]

    def _must_belong(self, client: str) -> None:
        if client not in self.roster.numbers:
            raise UpdateRefused(f"{client} takes no part in this secure sum")

    def _must_be_enough(self, present: Set[str]) -> None:
        """Of those who hold shares of each secret that is needed."""
        least = self.roster.shape.threshold
        for one in (*self.survivors, *self._gone()):
            count = sum(holder in present for holder in self.roster.holders(one))
            if count < least:
                raise TooFew(f"{count} of the {self.roster.shape.holders} who hold shares of {one} are left; {least} are needed")
