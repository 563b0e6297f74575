"""A coordinator that lies, or people who do through it: each attempt ends in an error with a name, and silence from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from choral.errors import ConfigError, Deceived
from choral.secagg import keys
from choral.secagg.roster import Roster, Terms, advert, sign_survivors
from choral_client.masking import Floor, Masking, Revealed
from e2e.secure_sum import TERMS, People, SecureSum, Spent, vectors_of

NAMES = [f"client-{number}" for number in range(7)]
VICTIM, OTHERS = NAMES[0], NAMES[1:]
Change = Callable[[Any], Any]


@pytest.fixture
def people() -> People:
    return People.named(NAMES)


@pytest.fixture
def rig(people: People) -> SecureSum:
    return SecureSum(people)


def says_nothing_more(client: Masking, roster: Roster) -> None:
    for ask in (
        client.advertise,
        lambda: client.take_roster(roster),
        lambda: client.take_shares({}),
        lambda: client.take_survivors(NAMES),
        lambda: client.reveal({}),
    ):
        with pytest.raises(Deceived, match=r"asked for .* after its last word"):
            ask()


# The roster


def forged(roster: Roster) -> Roster:
    """Keys of the coordinator's own in place of another client's."""
    one = roster.adverts[3]
    return Roster.of(TERMS, [*(a for a in roster.adverts if a != one), replace(one, shown=keys.fresh().shown())])


def swapped(roster: Roster) -> Roster:
    one, other = roster.adverts[3], roster.adverts[4]
    rest = [a for a in roster.adverts if a not in (one, other)]
    return Roster.of(TERMS, [*rest, replace(one, shown=other.shown), replace(other, shown=one.shown)])


def unsigned(roster: Roster) -> Roster:
    return Roster.of(TERMS, [*roster.adverts[:-1], replace(roster.adverts[-1], signature=bytes(64))])


def with_a_malformed_signature(roster: Roster) -> Roster:
    return Roster.of(TERMS, [*roster.adverts[:-1], replace(roster.adverts[-1], signature=b"?")])


def with_another_commitment(roster: Roster) -> Roster:
    one = roster.adverts[2]
    shown = replace(one.shown, commitment=bytes(32))
    return Roster.of(TERMS, [*(a for a in roster.adverts if a != one), replace(one, shown=shown)])


def with_one_twice(roster: Roster) -> Roster:
    return Roster.of(TERMS, [*roster.adverts, roster.adverts[3]])


def without_us(roster: Roster) -> Roster:
    return Roster.of(TERMS, [one for one in roster.adverts if one.client != VICTIM])


def with_other_keys_of_ours(roster: Roster) -> Roster:
    return Roster.of(TERMS, [replace(roster.adverts[0], shown=keys.fresh().shown()), *roster.adverts[1:]])


def of_a_stranger(roster: Roster) -> Roster:
    stranger = People.named(["stranger"])
    return Roster.of(TERMS, [*roster.adverts, advert(TERMS, "stranger", keys.fresh().shown(), stranger.signer("stranger"))])


def of_another_round(roster: Roster) -> Roster:
    return Roster.of(replace(TERMS, round=TERMS.round + 1), roster.adverts)


def of_too_few(roster: Roster) -> Roster:
    return Roster.of(TERMS, roster.adverts[:2])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (forged, "client-3 has not signed the keys"),
        (swapped, "client-3 has not signed the keys"),
        (unsigned, "client-6 has not signed the keys"),
        (with_a_malformed_signature, "client-6 has not signed the keys"),
        (with_another_commitment, "client-2 has not signed the keys"),
        (with_one_twice, "the roster names a client twice"),
        (without_us, "the roster does not have this client with the keys that it has shown"),
        (with_other_keys_of_ours, "the roster does not have this client with the keys that it has shown"),
        (of_a_stranger, "stranger is not known here"),
        (of_another_round, "the roster is of another round, model or plan"),
        (of_too_few, "2 clients take part; this device asks for 5 in a secure sum at least"),
    ],
)
def test_a_roster_that_is_not_what_it_should_be(people: People, change: Change, told: str) -> None:
    rig = SecureSum(people)
    rig.clients[VICTIM] = people.masking(VICTIM, least=5)
    roster = rig.advertise(NAMES)
    with pytest.raises(Deceived, match=told):
        rig.clients[VICTIM].take_roster(change(roster))
    says_nothing_more(rig.clients[VICTIM], roster)


@pytest.mark.parametrize("what", ["version", "plan", "run", "round"])
def test_others_were_told_of_another_model_plan_or_round(people: People, rig: SecureSum, what: str) -> None:
    """The victim alone gets a model made for it; what the others signed is of the one that they were given."""
    others = rig.advertise(NAMES)
    told: dict[str, Any] = {"version": bytes(32), "plan": bytes(32), "run": "other", "round": 9}
    forked: Terms = replace(TERMS, **{what: told[what]})
    victim = people.masking(VICTIM, terms=forked)
    mine = victim.advertise()
    with pytest.raises(Deceived, match=r"client-1 has not signed the keys .* or was told of another model or another plan"):
        victim.take_roster(Roster.of(forked, [mine, *others.adverts[1:]]))


def test_an_advert_of_an_earlier_round_is_of_no_use(people: People, rig: SecureSum) -> None:
    earlier = SecureSum(people)
    old = replace(TERMS, round=TERMS.round - 1)
    earlier.clients = {name: people.masking(name, terms=old) for name in NAMES}
    adverts = [client.advertise() for client in earlier.clients.values()]
    roster = rig.advertise(NAMES)
    replayed = Roster.of(TERMS, [roster.adverts[0], *adverts[1:]])
    with pytest.raises(Deceived, match="client-1 has not signed the keys"):
        rig.clients[VICTIM].take_roster(replayed)


def test_two_clients_with_the_same_keys(people: People) -> None:
    """As a corrupt client would show that repeats another's, to learn in which masks the two agree."""
    rig = SecureSum(people)
    roster = rig.advertise(NAMES)
    copied = advert(TERMS, NAMES[2], roster.adverts[1].shown, people.signer(NAMES[2]))
    with pytest.raises(Deceived, match="client-1 and client-2 show the same key"):
        rig.clients[VICTIM].take_roster(Roster.of(TERMS, [*roster.adverts[:2], copied, *roster.adverts[3:]]))


# Shares


def shared(rig: SecureSum) -> dict[str, bytes]:
    rig.advertise(NAMES)
    rig.share(NAMES)
    return rig.coordinator.shares_for(VICTIM)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s | {"stranger": s[NAMES[2]]}, "shares come from stranger"),
        (lambda s: s | {VICTIM: s[NAMES[2]]}, "shares come from client-0"),
        (lambda s: {NAMES[2]: s[NAMES[2]]}, "2 of this client's 7 holders have sent shares; 5 are needed"),
        (lambda s: {}, "1 of this client's 7 holders have sent shares; 5 are needed"),
    ],
)
def test_shares_that_are_not_what_they_should_be(rig: SecureSum, change: Change, told: str) -> None:
    sealed = shared(rig)
    with pytest.raises(Deceived, match=told):
        rig.clients[VICTIM].take_shares(change(sealed))
    says_nothing_more(rig.clients[VICTIM], rig.coordinator.roster)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {NAMES[2]: s[NAMES[2]][:-1] + bytes([s[NAMES[2]][-1] ^ 1])},
        lambda s: s | {NAMES[2]: s[NAMES[3]]},
        lambda s: s | {NAMES[2]: b""},
    ],
)
def test_shares_that_were_tampered_with_are_not_held(rig: SecureSum, change: Change) -> None:
    """They stop nobody, and what is revealed later has none of them."""
    sealed = shared(rig)
    rig.clients[VICTIM].take_shares(change(sealed))
    rig.send(OTHERS, vectors_of(NAMES))
    rig.coordinator.close(NAMES)
    rig.coordinator.take_signature(VICTIM, rig.clients[VICTIM].take_survivors(NAMES))
    rig.sign(OTHERS)
    said = rig.clients[VICTIM].reveal(rig.coordinator.signatures_for(VICTIM))
    assert set(said.mask_seeds) == set(NAMES) - {NAMES[2]}


def test_shares_of_another_round_are_of_no_use(people: People, rig: SecureSum) -> None:
    earlier = SecureSum(people)
    sealed = shared(earlier)
    masked(rig, but=VICTIM)
    rig.clients[VICTIM].take_shares(sealed)
    rig.clients[VICTIM].take_survivors(NAMES)
    rig.sign(OTHERS)
    said = rig.clients[VICTIM].reveal(rig.coordinator.signatures_for(NAMES[1]))
    assert set(said.mask_seeds) == {VICTIM}


# Other clients' masks


def with_the_high_bit(key: bytes) -> bytes:
    return key[:-1] + bytes([key[-1] ^ 0x80])


def with_a_point_of_order_two(key: bytes) -> bytes:
    """The sum with the point (0, 0), which has the coordinate 1/u: agreement, for which 8 divides the secret, gives the same."""
    prime = 2**255 - 19
    return pow(int.from_bytes(key, "little") & (2**255 - 1), -1, prime).to_bytes(32, "little")


def test_the_alias_of_a_key_agrees_on_the_same_secret() -> None:
    """Or the next tests would show nothing."""
    mine, theirs = keys.fresh(), keys.fresh().shown()
    agreed = keys._agreed(mine.mask_key, theirs.mask_key)
    assert keys._agreed(mine.mask_key, with_the_high_bit(theirs.mask_key)) == agreed
    assert keys._agreed(mine.mask_key, with_a_point_of_order_two(theirs.mask_key)) == agreed


@pytest.mark.parametrize("alias", [with_the_high_bit, with_a_point_of_order_two])
def test_a_corrupt_client_that_shows_an_honest_ones_key_does_not_have_its_masks(people: People, alias: Change) -> None:
    """client-0 would subtract what it has added for client-2, or the other way round, and be masked by nothing but its own."""
    rig = SecureSum(people)
    honest, corrupt = NAMES[2], NAMES[1]
    real = {name: rig.clients[name].advertise() for name in NAMES if name != corrupt}
    shown = replace(keys.fresh().shown(), mask_key=alias(real[honest].shown.mask_key))
    roster = Roster.of(TERMS, [*real.values(), advert(TERMS, corrupt, shown, people.signer(corrupt))])
    if alias is with_the_high_bit:
        with pytest.raises(Deceived, match="client-1 and client-2 show the same key"):
            rig.clients[VICTIM].take_roster(roster)
        return
    rig.clients[VICTIM].take_roster(roster)
    session, secrets = roster.session, keys.fresh()
    pairs = [
        keys.pair_mask(secrets.mask_key, roster.shown(other).mask_key, session, roster.pair(VICTIM, other))
        for other in (honest, corrupt)
    ]
    assert pairs[0] != pairs[1]


def test_two_attempts_at_a_round_are_not_both_revealed(people: People) -> None:
    """The second, without one of the first, would give that one away."""
    spent = {name: Spent() for name in NAMES}
    for attempt in range(2):
        rig = SecureSum(people)
        rig.clients = {name: Masking(TERMS, name, people.signer(name), people.vouch, Floor(2), spent[name]) for name in NAMES}
        masked(rig)
        rig.sign(NAMES)
        if attempt == 0:
            rig.reveal(NAMES)
            continue
        for name in NAMES:
            with pytest.raises(Deceived, match="has revealed what it holds of round 3 of run run before"):
                rig.clients[name].reveal(rig.coordinator.signatures_for(name))
            says_nothing_more(rig.clients[name], rig.coordinator.roster)


# Who survives


def masked(rig: SecureSum, but: str = "") -> None:
    shared(rig)
    rig.send([name for name in NAMES if name != but], vectors_of(NAMES))
    rig.coordinator.close(NAMES)


def test_fewer_survive_than_the_device_asks_for(people: People, rig: SecureSum) -> None:
    rig.clients[VICTIM] = people.masking(VICTIM, least=7)
    masked(rig)
    with pytest.raises(Deceived, match="6 clients survive; this device asks for 7 in a secure sum at least"):
        rig.clients[VICTIM].take_survivors(NAMES[:6])


@pytest.mark.parametrize("least", [-1, 0, 1])
def test_no_device_can_ask_for_less_than_two(least: int) -> None:
    with pytest.raises(ConfigError, match=f"a device's floor of {least} clients"):
        Floor(least)


@pytest.mark.parametrize(
    ("survivors", "told"),
    [
        (OTHERS, "this client is said to have dropped out: its own mask would be taken off what it has sent"),
        ([*NAMES, "stranger"], "stranger are said to survive, who are not in the roster"),
        (NAMES[:3], "3 of this client's 7 holders survive; 5 are needed"),
        ([], "this client is said to have dropped out"),
    ],
)
def test_survivors_who_cannot_be(rig: SecureSum, survivors: list[str], told: str) -> None:
    masked(rig)
    with pytest.raises(Deceived, match=told):
        rig.clients[VICTIM].take_survivors(survivors)
    says_nothing_more(rig.clients[VICTIM], rig.coordinator.roster)


def test_one_survives_whose_shares_never_came(rig: SecureSum) -> None:
    sealed = shared(rig)
    rig.clients[VICTIM].take_shares({name: content for name, content in sealed.items() if name != NAMES[3]})
    with pytest.raises(Deceived, match="client-3 are said to survive, whose shares never came here"):
        rig.clients[VICTIM].take_survivors(NAMES)


def test_a_live_client_is_called_dead_to_some(rig: SecureSum) -> None:
    """The attack on Flower's: half are told that the victim survives, half that it does not, and both its secrets are shared out.

    Each half sees that fewer than the threshold were told the same.
    """
    masked(rig)
    halves = {name: (NAMES if number < 4 else [one for one in NAMES if one != NAMES[0]]) for number, name in enumerate(NAMES)}
    signatures = {name: rig.clients[name].take_survivors(halves[name]) for name in NAMES}
    for name in NAMES:
        told = sum(halves[one] == halves[name] for one in NAMES if one in halves[name])
        with pytest.raises(Deceived, match=f"only {told} of .* were told the same as this client, where 5 must be"):
            rig.clients[name].reveal(signatures)


def test_corrupt_clients_sign_both_lists_and_still_fewer_than_the_threshold_believe_either(people: People, rig: SecureSum) -> None:
    """With ⌈n/3⌉-1 = 2 corrupt of 7: the five who are honest are split, and neither part with both corrupt ones makes 5."""
    masked(rig)
    corrupt, honest = NAMES[5:], NAMES[:5]
    lists = {True: NAMES, False: [one for one in NAMES if one != VICTIM]}
    believes_alive = {name: number < 3 for number, name in enumerate(honest)}
    signatures: dict[bool, dict[str, bytes]] = {True: {}, False: {}}
    for name in honest:
        answer = believes_alive[name]
        signatures[answer][name] = rig.clients[name].take_survivors(lists[answer])
    for answer, survivors in lists.items():
        for name in corrupt:
            signatures[answer][name] = sign_survivors(rig.coordinator.roster, survivors, people.signer(name).sign)
    revealed = []
    for name in honest:
        try:
            revealed.append((believes_alive[name], rig.clients[name].reveal(signatures[believes_alive[name]])))
        except Deceived:
            continue
    assert [alive for alive, _ in revealed] == [True] * 3  # of the two secrets, only one can ever be had
    assert not any(VICTIM in said.key_seeds for _, said in revealed)


@pytest.mark.parametrize(
    "change",
    [
        lambda signatures, rig: {},
        lambda signatures, rig: dict.fromkeys(signatures, bytes(64)),
        lambda signatures, rig: dict.fromkeys(signatures, b""),
        lambda signatures, rig: dict.fromkeys(signatures, next(iter(signatures.values()))),
        lambda signatures, rig: dict(list(signatures.items())[:4]),
    ],
)
def test_signatures_that_are_none(rig: SecureSum, change: Callable[[dict[str, bytes], SecureSum], dict[str, bytes]]) -> None:
    masked(rig)
    rig.sign(NAMES)
    signatures = rig.coordinator.signatures_for(VICTIM)
    with pytest.raises(Deceived, match="were told the same as this client, where 5 must be"):
        rig.clients[VICTIM].reveal(change(signatures, rig))
    says_nothing_more(rig.clients[VICTIM], rig.coordinator.roster)


def test_a_client_reveals_once(rig: SecureSum) -> None:
    masked(rig)
    rig.sign(NAMES)
    signatures = rig.coordinator.signatures_for(VICTIM)
    said = rig.clients[VICTIM].reveal(signatures)
    assert set(said.mask_seeds) == set(NAMES)
    assert not said.key_seeds
    with pytest.raises(Deceived, match="asked for shares of others' secrets after shares of others' secrets: it is said once"):
        rig.clients[VICTIM].reveal(signatures)


def test_nobody_is_in_both_lists(rig: SecureSum) -> None:
    """Of each other, a client reveals one of two secrets, whoever survives."""
    shared(rig)
    rig.send(OTHERS, vectors_of(NAMES))
    rig.coordinator.close(OTHERS)
    rig.sign(OTHERS)
    for name in OTHERS:
        said = rig.clients[name].reveal(rig.coordinator.signatures_for(name))
        assert set(said.mask_seeds) == set(OTHERS)
        assert set(said.key_seeds) == {VICTIM}


@pytest.mark.parametrize("order", ["take_shares", "take_survivors", "reveal"])
def test_steps_cannot_be_left_out(rig: SecureSum, order: str) -> None:
    rig.advertise(NAMES)
    ask: dict[str, Callable[[], object]] = {
        "take_shares": lambda: rig.clients[VICTIM].take_shares({}),
        "take_survivors": lambda: rig.clients[VICTIM].take_survivors(NAMES),
        "reveal": lambda: rig.clients[VICTIM].reveal({}),
    }
    with pytest.raises(Deceived, match="after its keys: it is said once, and after"):
        ask[order]()
    says_nothing_more(rig.clients[VICTIM], rig.coordinator.roster)


@pytest.mark.parametrize("liar", [0, 1, 2, 3])
def test_of_four_one_reveals_wrong_shares_and_the_sum_is_right_whoever_it_is(liar: int) -> None:
    names = ["alice", "bob", "carol", "dave"]
    people, vectors = People.named(names), vectors_of(names)
    rig = SecureSum(people)
    rig.advertise(names)
    rig.share(names)
    rig.send(names, vectors)
    rig.coordinator.close(rig.sent)
    rig.sign(names)
    rig.coordinator.close_signatures()
    rig.reveal(names[:liar] + names[liar + 1 :])
    rig.reveal([names[liar]], lambda revealed: Revealed({one: share ^ 1 for one, share in revealed.mask_seeds.items()}, {}))
    assert rig.unmasked().tolist() == sum(vectors.values(), np.zeros(5, np.uint32)).tolist()
