"""A coordinator that lies in a secure sum, to real clients over gRPC: what they say to it, what they keep, what operators see.

Of each lie one client is the victim. It declines with a reason that names the lie, and of its secrets nothing is told from then on;
the others sum without it. Here are lies about who takes part and what is to be done, in test_secure_attacks_later those that come
after; the same at the level of values are in test_secure_sum_attacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from choral import wire
from choral.plan import digest_of
from choral.secagg import keys
from choral.secagg.keys import Shown
from choral.secagg.roster import Signer, Terms, advert
from choral.v1 import federation_pb2 as pb
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from e2e.liar import Lie, Told
from e2e.secure_stage import NAMES, OTHERS, VICTIM, Change, Instead, Stage
from safetensors.numpy import save

ALICE, BOB, CAROL, DAVE = NAMES


def test_nobody_lies(stage: Stage) -> None:
    """Or the tests below would show nothing."""
    played = stage.play()
    played.sums(NAMES)
    assert played.sent == set(NAMES)
    assert sorted(played.said("sum_revealed")) == sorted(NAMES)


# Who takes part


def of(roster: pb.SumRoster, client: str) -> pb.SumAdvert:
    return next(one for one in roster.adverts if one.client == client)


def show(one: pb.SumAdvert, shown: Shown) -> None:
    one.mask_key, one.share_key, one.commitment = shown.mask_key, shown.share_key, shown.commitment


def made_up(terms: Terms, client: str, voucher: bytes = b"") -> pb.SumAdvert:
    """With a signing key of the coordinator's own."""
    key = Ed25519PrivateKey.generate()
    said = advert(terms, client, keys.fresh().shown(), Signer(key.sign, key.public_key().public_bytes_raw(), voucher))
    made = pb.SumAdvert(client=client, signing_key=said.key, signature=said.signature, voucher=voucher)
    show(made, said.shown)
    return made


def terms_of(lie: Lie) -> Terms:
    """Of the round, as the victim was told."""
    asked = [one for client, one in lie.liar.spoken("assignment") if client == VICTIM][-1]
    plan = wire.plan_from_pb(asked.plan)
    assert plan.secure is not None
    return Terms(plan.secure.run, asked.round, asked.version.digest, digest_of(plan), plan.secure.threshold)


def forged(roster: pb.SumRoster, lie: Lie) -> None:
    show(of(roster, BOB), keys.fresh().shown())


def swapped(roster: pb.SumRoster, lie: Lie) -> None:
    bob, carol = of(roster, BOB), of(roster, CAROL)
    shown = Shown(bob.mask_key, bob.share_key, bob.commitment)
    show(bob, Shown(carol.mask_key, carol.share_key, carol.commitment))
    show(carol, shown)


def signed_by_another(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).CopyFrom(made_up(terms_of(lie), BOB, of(roster, BOB).voucher))


def without_a_voucher(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).voucher = b""


def with_the_voucher_of_another(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).voucher = of(roster, CAROL).voucher


def unsigned(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).signature = bytes(64)


def with_a_malformed_signature(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).signature = b"?"


def with_another_commitment(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).commitment = bytes(32)


def of_an_earlier_round(roster: pb.SumRoster, lie: Lie) -> None:
    earlier = next(one for client, one in lie.liar.heard("sum_advert") if client == BOB)
    of(roster, BOB).CopyFrom(earlier)


def of_keys_that_are_too_short(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).mask_key = b"short"


def of_a_key_that_is_none(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).mask_key = bytes(32)


def of_one_key_for_two_purposes(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, BOB).mask_key = of(roster, BOB).share_key


def of_one_key_for_two_clients(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, CAROL).mask_key = of(roster, BOB).mask_key


def with_one_twice(roster: pb.SumRoster, lie: Lie) -> None:
    roster.adverts.append(of(roster, BOB))


def with_nobody(roster: pb.SumRoster, lie: Lie) -> None:
    del roster.adverts[:]


def without_us(roster: pb.SumRoster, lie: Lie) -> None:
    roster.adverts.remove(of(roster, VICTIM))


def with_other_keys_of_ours(roster: pb.SumRoster, lie: Lie) -> None:
    show(of(roster, VICTIM), keys.fresh().shown())


def with_another_signing_key_of_ours(roster: pb.SumRoster, lie: Lie) -> None:
    of(roster, VICTIM).signing_key = of(roster, BOB).signing_key


def with_a_stranger(roster: pb.SumRoster, lie: Lie) -> None:
    roster.adverts.append(made_up(terms_of(lie), "stranger"))


def of_too_few(roster: pb.SumRoster, lie: Lie) -> None:
    del roster.adverts[2:]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (forged, "bob has not signed the keys"),
        (swapped, "bob has not signed the keys"),
        (unsigned, "bob has not signed the keys"),
        (with_a_malformed_signature, "bob has not signed the keys"),
        (with_another_commitment, "bob has not signed the keys"),
        (of_an_earlier_round, "bob has not signed the keys"),
        (signed_by_another, "is not certified by an authority that this device trusts"),
        (with_the_voucher_of_another, "is not certified by an authority that this device trusts"),
        (without_a_voucher, "nobody certifies the signing key of bob"),
        (with_a_stranger, "nobody certifies the signing key of stranger"),
        (of_keys_that_are_too_short, "bob shows keys of another length"),
        (of_a_key_that_is_none, "bob shows what is no key"),
        (of_one_key_for_two_purposes, "bob shows one key for two purposes"),
        (of_one_key_for_two_clients, "bob and carol show the same key"),
        (with_one_twice, "the roster names a client twice"),
        (with_nobody, "the roster does not have this client"),
        (without_us, "the roster does not have this client"),
        (with_other_keys_of_ours, "the roster does not have this client with the keys that it has shown"),
        (with_another_signing_key_of_ours, "a signing key as that of this client, alice, which is another's"),
        (of_too_few, "2 clients take part; this device asks for 3 in a secure sum at least (min_cohort in its guard)"),
    ],
)
def test_a_roster(stage: Stage, change: Change, told: str) -> None:
    played = stage.play(Instead("sum_roster", lambda roster, lie: change(roster, lie)))
    assert told in played.deceived(VICTIM)
    assert told in played.event("client declined", VICTIM)
    assert VICTIM not in played.said("sum_shares")
    assert VICTIM not in played.sent
    assert sorted(played.said("sum_revealed")) == sorted(OTHERS)
    played.sums(OTHERS)


# What is to be done: another model, another plan or another round than the others were told


class Fork(Lie):
    """The victim alone is asked for something else. What it signs then, the coordinator cannot use, and hides that."""

    def __init__(self, change: Callable[[pb.Assignment], None], model: bytes | None = None) -> None:
        super().__init__()
        self.change = change
        if model is not None:
            self.models[VICTIM] = model
        self.shown: pb.SumAdvert | None = None

    def told(self, client: str, message: pb.AttendResponse) -> Iterable[Told]:
        match message.WhichOneof("message"):
            case "assignment" if client == VICTIM:
                self.change(message.assignment)
            case "cancel" if client == VICTIM:
                return ()
            case "sum_roster" if client == OTHERS[0]:
                assert self.shown is not None, "it is begun with the others when the victim was refused"
                roster = pb.SumRoster(assignment=self.shown.assignment, adverts=[self.shown, *message.sum_roster.adverts])
                self.liar.tell(VICTIM, pb.AttendResponse(sum_roster=roster))
        return (message,)

    def said(self, client: str, message: pb.AttendRequest) -> Iterable[pb.AttendRequest]:
        if client == VICTIM and message.WhichOneof("message") == "sum_advert":
            self.shown = message.sum_advert
        return (message,)


MADE = save({"weight": np.full((1, 2), 7, np.float32), "bias": np.full(1, 7, np.float32)})
"""A model that was made for one."""


def another_model(asked: pb.Assignment) -> None:
    asked.version.digest, asked.version.size_bytes = hashlib.sha256(MADE).digest(), len(MADE)


def another_learning_rate(asked: pb.Assignment) -> None:
    asked.plan.learning_rate = 1e-9


def another_cohort(asked: pb.Assignment) -> None:
    asked.plan.cohort = 100


def another_run(asked: pb.Assignment) -> None:
    asked.plan.secure.run = "another"


def another_round(asked: pb.Assignment) -> None:
    asked.round += 1000


def another_clip(asked: pb.Assignment) -> None:
    asked.plan.secure.clip = 4.0


def another_threshold(asked: pb.Assignment) -> None:
    asked.plan.secure.threshold = 0.01


@pytest.mark.parametrize(
    "change",
    [another_model, another_learning_rate, another_cohort, another_run, another_round, another_clip, another_threshold],
)
def test_a_fork(stage: Stage, change: Callable[[pb.Assignment], None]) -> None:
    lie = Fork(change, MADE if change is another_model else None)
    played = stage.play(lie)
    told = "bob has not signed the keys that are said to be its own for round"
    declined = stage.clients[VICTIM].saw("declined", error="Deceived", round=played.number + 1000 * (change is another_round))
    assert told in declined["reason"]
    assert "was told of another model or another plan" in declined["reason"]
    assert "alice has not signed the keys" in played.event("result refused", VICTIM)
    assert VICTIM not in played.said("sum_shares")
    assert VICTIM not in played.sent
    played.sums(OTHERS)
