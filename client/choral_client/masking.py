"""A client's side of one secure sum: what it says at each step, and what it must see before it says it.

    advertise ─▶ take_roster ─▶ take_shares ─▶ (the masked update) ─▶ take_survivors ─▶ reveal

Pure: nothing waits here, or talks. Whatever does not fit ends it: from then on this client says nothing more of its secrets.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from choral.errors import ChoralError, ConfigError, Deceived, InvalidMessage
from choral.secagg import keys, shamir
from choral.secagg.keys import Secrets, Shares
from choral.secagg.masks import Mask
from choral.secagg.roster import (
    Advert,
    Roster,
    Signer,
    Terms,
    Vouch,
    advert,
    check_advert,
    has_signed_survivors,
    share_number,
    shared_keys,
    sign_survivors,
)

log = structlog.get_logger()


class Step(enum.Enum):
    """What this client has said last."""

    NOTHING = "nothing"
    ADVERT = "its keys"
    SHARES = "shares of its secrets"
    MASKED = "its masked update"
    SURVIVORS = "who has survived"
    REVEALED = "shares of others' secrets"
    OVER = "its last word"


@dataclass(frozen=True, slots=True)
class Floor:
    """What this device asks, whatever the coordinator says: `least_clients`, two or more, in the sum that is known in the end.

    `least_share` of the holders of a secret must reveal their shares, or more.
    """

    least_clients: int
    least_share: float = 0.0

    def __post_init__(self) -> None:
        if self.least_clients < 2:
            raise ConfigError(
                f"a device's floor of {self.least_clients} clients: the sum of one is its update, so two at the least"
            )

    @property
    def told(self) -> str:
        """For people."""
        return f"this device asks for {self.least_clients} in a secure sum at least (min_cohort in its guard)"


@dataclass(frozen=True, slots=True)
class Revealed:
    """Shares by whose secret it is: of those who survived of the seed of their own mask, of the others of their key's."""

    mask_seeds: Mapping[str, int]
    key_seeds: Mapping[str, int]


class Masking:
    """One client in one attempt at a round.

    `signer` signs for it, `vouch` knows the others' keys; neither rests on the coordinator's word. `spend` keeps, for good, that
    this client reveals what it holds in a round, and raises Deceived if it has done so before: the sums of two attempts differ by
    whoever is in one of them alone. Each client holds shares of as many as hold shares of its own, so that in an attempt a share
    τ = threshold / holders of all clients must reveal. Of two attempts with nearly the same clients, of whom a share c is corrupt
    and reveals twice, both can come to something only if 2τ ≤ 1 + c, and τ is larger than that.
    """

    def __init__(
        self, terms: Terms, client: str, signer: Signer, vouch: Vouch, floor: Floor, spend: Callable[[Terms], None]
    ) -> None:
        self._terms = terms
        self._client = client
        self._signer = signer
        self._vouch = vouch
        self._floor = floor
        self._spend = spend
        self._step = Step.NOTHING
        self._secrets: Secrets | None = None
        self._held: dict[str, Shares] = {}  # of each other's secrets, and of our own
        self._unread: set[str] = set()  # whose shares are none; their masks are in what we send all the same
        self._survivors: tuple[str, ...] = ()

    def advertise(self) -> Advert:
        """This client's keys of this round."""
        with self._saying(Step.ADVERT, after=Step.NOTHING):
            self._secrets = keys.fresh()
            return advert(self._terms, self._client, self._secrets.shown(), self._signer)

    def take_roster(self, roster: Roster) -> dict[str, bytes]:
        """Look at who takes part; shares of this client's secrets for each neighbour, sealed. Raises Deceived."""
        with self._saying(Step.SHARES, after=Step.ADVERT):
            secrets = self._mine
            self._check_roster(roster, secrets)
            self._roster = roster
            holders = roster.holders(self._client)
            numbers = [share_number(roster, holder) for holder in holders]
            mask_seeds = shamir.split(secrets.mask_seed, numbers, roster.shape.threshold)
            key_seeds = shamir.split(secrets.key_seed, numbers, roster.shape.threshold)
            shares = {
                holder: Shares(mask_seeds[number], key_seeds[number]) for holder, number in zip(holders, numbers, strict=True)
            }
            self._held[self._client] = shares.pop(self._client)
            return {holder: self._seal(secrets, holder, share) for holder, share in shares.items()}

    def take_shares(self, sealed: Mapping[str, bytes]) -> Mask:
        """Take the shares of those who go on; the mask for this client's update, with each of them. Raises Deceived."""
        with self._saying(Step.MASKED, after=Step.SHARES):
            secrets = self._mine
            neighbours = self._roster.neighbours(self._client)
            if strangers := sealed.keys() - set(neighbours):
                raise Deceived(f"shares come from {_named(strangers)}, with whom this client shares no masks in this round")
            self._must_be_enough(len(sealed) + 1, "have sent shares")
            for sender, content in sealed.items():
                self._unseal(secrets, sender, content)
            mask = self._mask(secrets, sorted(sealed))
            self._secrets = None  # of no further use
            return mask

    def take_survivors(self, survivors: Collection[str]) -> bytes:
        """This client's signature of who has sent a masked update. Raises Deceived: it cannot be these."""
        with self._saying(Step.SURVIVORS, after=Step.MASKED):
            if strangers := set(survivors) - self._roster.numbers.keys():
                raise Deceived(f"{_named(strangers)} are said to survive, who are not in the roster")
            if self._client not in survivors:
                raise Deceived("this client is said to have dropped out: its own mask would be taken off what it has sent")
            if len(set(survivors)) < self._floor.least_clients:
                raise Deceived(f"{len(set(survivors))} clients survive; {self._floor.told}")
            if silent := set(survivors).intersection(self._neighbours) - self._held.keys() - self._unread:
                raise Deceived(f"{_named(silent)} are said to survive, whose shares never came here")
            self._must_be_enough(len(set(survivors) & set(self._roster.holders(self._client))), "survive")
            self._survivors = tuple(sorted(survivors))
            return sign_survivors(self._roster, self._survivors, self._signer.sign)

    def reveal(self, signatures: Mapping[str, bytes]) -> Revealed:
        """The shares that undo what is left of the masks, once and never again. Raises Deceived: too few were told the same."""
        with self._saying(Step.REVEALED, after=Step.SURVIVORS):
            holders = [one for one in self._roster.holders(self._client) if one in self._survivors]
            told = [one for one in holders if one in signatures and self._was_told(one, signatures[one])]
            if len(told) < self._roster.shape.threshold:
                raise Deceived(
                    f"only {len(told)} of {len(holders)} who survive were told the same as this client, where "
                    f"{self._roster.shape.threshold} must be: the coordinator tells clients different things"
                )
            self._spend(self._terms)
            held, self._held = self._held, {}
            return Revealed(
                {one: share.mask_seed for one, share in held.items() if one in self._survivors},
                {one: share.key_seed for one, share in held.items() if one not in self._survivors},
            )

    def end(self) -> None:
        """Forget the secrets: nothing more is said in this round."""
        self._step = Step.OVER
        self._secrets = None
        self._held.clear()

    @property
    def _neighbours(self) -> tuple[str, ...]:
        return self._roster.neighbours(self._client)

    @property
    def _mine(self) -> Secrets:
        assert self._secrets is not None, "made with the advert, and forgotten at the end"
        return self._secrets

    @contextmanager
    def _saying(self, what: Step, after: Step) -> Iterator[None]:
        """Each step is taken once, in their order. Raises Deceived, as what is done inside may: then it is over."""
        try:
            if self._step is not after:
                raise Deceived(f"asked for {what.value} after {self._step.value}: it is said once, and after {after.value}")
            yield
        except BaseException as error:
            self.end()
            if isinstance(error, ChoralError) and not isinstance(error, Deceived):
                raise Deceived(str(error)) from error
            raise
        self._step = what

    def _mask(self, secrets: Secrets, others: Iterable[str]) -> Mask:
        """What hides this client's update: of two who share a mask the one with the lower number adds it."""
        roster, mine = self._roster, self._roster.numbers[self._client]
        plus, minus = [keys.self_mask(secrets.mask_seed, roster.session)], list[bytes]()
        for other in others:
            theirs, pair = roster.shown(other).mask_key, roster.pair(self._client, other)
            key = keys.pair_mask(secrets.mask_key, theirs, roster.session, pair)
            (plus if mine < roster.numbers[other] else minus).append(key)
        return Mask(plus, minus)

    def _check_roster(self, roster: Roster, secrets: Secrets) -> None:
        names = [one.client for one in roster.adverts]
        if len(set(names)) != len(names):
            raise Deceived("the roster names a client twice")
        if roster.terms != self._terms:
            raise Deceived("the roster is of another round, model or plan than the one that this client was asked for")
        if self._client not in names or roster.shown(self._client) != secrets.shown():
            raise Deceived("the roster does not have this client with the keys that it has shown")
        if len(names) < self._floor.least_clients:
            raise Deceived(f"{len(names)} clients take part; {self._floor.told}")
        if (shape := roster.shape).threshold < self._floor.least_share * shape.holders:
            raise Deceived(
                f"{shape.threshold} of {shape.holders} shares give a secret back; this device asks for a share of "
                f"{self._floor.least_share:g} (min_threshold in its guard)"
            )
        if (same := shared_keys(roster.adverts)) is not None:
            raise Deceived(f"{' and '.join(same)} show the same key")
        for one in roster.adverts:
            check_advert(self._terms, one, self._vouch)

    def _must_be_enough(self, count: int, what: str) -> None:
        least = self._roster.shape.threshold
        if count < least:
            raise Deceived(f"{count} of this client's {self._roster.shape.holders} holders {what}; {least} are needed")

    def _was_told(self, client: str, signature: bytes) -> bool:
        return has_signed_survivors(self._roster, self._survivors, client, signature)

    def _seal(self, secrets: Secrets, holder: str, shares: Shares) -> bytes:
        theirs = self._roster.shown(holder).share_key
        return keys.seal(shares, secrets.share_key, theirs, self._roster.session, self._client, holder)

    def _unseal(self, secrets: Secrets, sender: str, sealed: bytes) -> None:
        """Hold what a neighbour has sealed. If it is nothing, others may hold enough: it must not stop the round for all."""
        theirs = self._roster.shown(sender).share_key
        try:
            self._held[sender] = keys.unseal(sealed, secrets.share_key, theirs, self._roster.session, sender, self._client)
        except InvalidMessage as error:
            log.warning("no shares", sender=sender, reason=str(error))
            self._unread.add(sender)


def _named(clients: Iterable[str]) -> str:
    return ", ".join(sorted(clients))
