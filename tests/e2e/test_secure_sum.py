"""The secure sum, both sides of it: whoever goes away at whatever step, it is the survivors' sum, or nothing is revealed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, count, product

import numpy as np
import pytest
from choral.errors import Deceived, UpdateRefused
from choral.secagg import keys, roster
from choral.secagg.graph import complete
from choral.secagg.roster import advert
from choral_client.masking import Revealed
from choral_server.unmasking import TooFew
from e2e.secure_sum import TERMS, People, SecureSum, Vector, lead, vectors_of
from hypothesis import given, settings
from hypothesis import strategies as st

STEPS = (1, 2, 3, 4)  # before which a client may go away: shares, update, signature, revealing
SENDS = 3


def names_of(clients: int) -> list[str]:
    return [f"client-{number:03}" for number in range(clients)]


def total_of(vectors: dict[str, Vector], names: list[str]) -> Vector:
    return sum((vectors[name] for name in names), np.zeros(5, dtype=np.uint32))


@pytest.fixture(scope="module", autouse=True)
def remembered() -> Iterator[None]:
    """Clients have the same secrets in every pattern, so that what is a function of them need not be computed anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_agreed", lru_cache(None)(keys._agreed))
        patch.setattr(keys, "_derived", lru_cache(None)(keys._derived))
        patch.setattr(roster, "_is_signed", lru_cache(None)(roster._is_signed))
        yield


def patterns(clients: int) -> Iterator[dict[str, int]]:
    """Who goes away, and when: whoever of at most ⌈n/3⌉-1, each before whatever step.

    Of three who go, four of the 64 ways in turn, unless CHORAL_EVERY_PATTERN is set: they would take minutes.
    """
    names, turn, few = names_of(clients), count(), 64 if os.environ.get("CHORAL_EVERY_PATTERN") else 4
    for going in range(complete(clients).dropouts + 1):
        for who in combinations(names, going):
            steps = list(product(STEPS, repeat=going))
            if going == 3:
                steps = [steps[7 * next(turn) % len(steps)] for _ in range(few)]
            yield from (dict(zip(who, when, strict=True)) for when in steps)


@pytest.mark.parametrize("clients", range(3, 11))
def test_whoever_goes_away_the_rest_is_summed(clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of(clients)
    people, vectors = People.named(names), vectors_of(names)
    secrets = [keys.fresh() for _ in names]
    patterns_seen = 0
    for leaves in patterns(clients):
        each = iter(secrets)
        monkeypatch.setattr(keys, "fresh", lambda each=each: next(each))
        _, total = lead(people, leaves, vectors)
        assert np.array_equal(total, total_of(vectors, [name for name in names if leaves.get(name, 5) >= SENDS])), leaves
        patterns_seen += 1
    assert patterns_seen >= 1 + 4 * clients * (complete(clients).dropouts > 0)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_the_same_with_more_clients(data: st.DataObject) -> None:
    clients = data.draw(st.integers(11, 30))
    names = names_of(clients)
    who = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=complete(clients).dropouts))
    leaves = {name: data.draw(st.sampled_from(STEPS)) for name in who}
    vectors = vectors_of(names)
    _, total = lead(People.named(names), leaves, vectors)
    assert np.array_equal(total, total_of(vectors, [name for name in names if leaves.get(name, 5) >= SENDS]))


@pytest.mark.parametrize("step", STEPS[:3])
@pytest.mark.parametrize("clients", [3, 4, 7, 10])
def test_if_one_more_goes_away_nothing_is_revealed(clients: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names, asked = names_of(clients), list[str]()
    monkeypatch.setattr(SecureSum, "reveal", lambda sum_, names: asked.extend(names))
    leaves = dict.fromkeys(names[: complete(clients).dropouts + 1], step)
    with pytest.raises(TooFew if step > 1 else Deceived, match="are needed"):  # clients do not send what is not safe
        lead(People.named(names), leaves, vectors_of(names))
    assert not asked


@pytest.mark.parametrize("clients", [3, 4, 7, 10])
def test_if_one_more_goes_away_before_it_reveals_there_is_no_sum(clients: int) -> None:
    names = names_of(clients)
    leaves = dict.fromkeys(names[: complete(clients).dropouts + 1], 4)
    with pytest.raises(TooFew, match=r"do not give it back, where .* that are right would"):
        lead(People.named(names), leaves, vectors_of(names))


def test_on_a_sparse_graph_the_rest_is_summed_as_well() -> None:
    names = names_of(120)
    leaves = {names[3 * number]: 1 + number % 4 for number in range(8)}
    vectors = vectors_of(names)
    sum_, total = lead(People.named(names), leaves, vectors)
    assert not sum_.coordinator.roster.shape.complete
    assert np.array_equal(total, total_of(vectors, [name for name in names if leaves.get(name, 5) >= SENDS]))


def test_what_is_sent_is_not_what_was_meant() -> None:
    names = names_of(3)
    vectors = {name: np.zeros(10_000, dtype=np.uint32) for name in names}
    sum_, total = lead(People.named(names), {}, vectors)
    assert not total.any()
    for sent in sum_.sent.values():
        assert (sent == 0).mean() < 0.01
        assert len(np.unique(sent)) > 9_900


@pytest.mark.parametrize(("clients", "liars"), [(7, 1), (15, 2), (20, 3)])
def test_shares_that_are_made_up_are_found_and_left_out(clients: int, liars: int) -> None:
    names = names_of(clients)
    vectors = vectors_of(names)
    sum_ = SecureSum(People.named(names))
    sum_.advertise(names)
    sum_.share(names)
    sum_.send(names, vectors)
    sum_.coordinator.close(names)
    sum_.sign(names)
    sum_.reveal(names[:liars], lambda said: Revealed({one: 5 + place for place, one in enumerate(said.mask_seeds)}, {}))
    sum_.reveal(names[liars:])
    assert np.array_equal(sum_.unmasked(), total_of(vectors, names))


def test_one_client_whose_shares_are_nothing_does_not_stop_the_others() -> None:
    """Neither if it seals nonsense for some, nor if it goes away then."""
    names = names_of(7)
    vectors = vectors_of(names)
    for goes_away in (False, True):
        sum_ = SecureSum(People.named(names))
        roster = sum_.advertise(names)
        sealed = sum_.clients[names[0]].take_roster(roster)
        sum_.coordinator.take_shares(names[0], sealed | {names[1]: bytes(80), names[2]: bytes(80)})
        sum_.share(names[1:])
        there = names[1:] if goes_away else names
        sum_.send(there, vectors)
        sum_.coordinator.close(there)
        sum_.sign(there)
        if goes_away:
            sum_.reveal(there)
            with pytest.raises(TooFew, match="4 shares of a secret of client-000 do not give it back, where 5"):
                sum_.unmasked()
        else:
            sum_.reveal(there)
            assert np.array_equal(sum_.unmasked(), total_of(vectors, there))


def test_enough_is_enough() -> None:
    names = names_of(4)
    vectors = vectors_of(names)
    sum_ = SecureSum(People.named(names))
    sum_.advertise(names)
    sum_.share(names)
    sum_.send(names, vectors)
    sum_.coordinator.close(sum_.sent)
    sum_.sign(names)
    sum_.reveal(names[:2])
    assert not sum_.coordinator.complete
    sum_.reveal(names[2:3])
    assert sum_.coordinator.complete
    assert np.array_equal(sum_.unmasked(), total_of(vectors, names))


def test_the_coordinator_begins_with_no_fewer_than_it_must() -> None:
    sum_ = SecureSum(People.named(names_of(4)), least=4)
    with pytest.raises(TooFew, match="3 clients take part in the secure sum; 4 must"):
        sum_.advertise(names_of(3))


def test_a_client_cannot_say_what_is_not_its_turn_to_say() -> None:
    names = names_of(4)
    sum_ = SecureSum(People.named(names))
    again = sum_.clients[names[0]].advertise()
    sum_.coordinator.take_advert(again)
    with pytest.raises(UpdateRefused, match="shows keys for the secure sum again"):
        sum_.coordinator.take_advert(again)
    sum_.advertise(names[1:])
    with pytest.raises(UpdateRefused, match="sends shares for 0 of its 3 neighbours"):
        sum_.coordinator.take_shares(names[0], {})
    with pytest.raises(UpdateRefused, match="has not signed who has sent"):
        sum_.coordinator.take_signature(names[0], bytes(64))
    with pytest.raises(UpdateRefused, match="reveals shares again, or without having signed"):
        sum_.coordinator.take_revealed(names[0], {}, {})


def test_shares_must_come_after_the_roster_and_be_as_long_as_they_are(rig: SecureSum) -> None:
    first, *others = names_of(4)
    with pytest.raises(UpdateRefused, match="it is not known yet who takes part"):
        rig.coordinator.take_shares(first, {})
    rig.advertise([first, *others])
    with pytest.raises(UpdateRefused, match="sends shares that are not of 80 bytes"):
        rig.coordinator.take_shares(first, dict.fromkeys(others, bytes(1 << 20)))


def test_strangers_have_no_part(rig: SecureSum) -> None:
    rig.advertise(names_of(4))
    for ask in (
        lambda: rig.coordinator.take_shares("stranger", {}),
        lambda: rig.coordinator.shares_for("stranger"),
        lambda: rig.coordinator.take_revealed("stranger", {}, {}),
    ):
        with pytest.raises(UpdateRefused, match="stranger takes no part in this secure sum"):
            ask()
    with pytest.raises(UpdateRefused, match="stranger has not signed"):
        rig.coordinator.take_signature("stranger", bytes(64))


def test_a_client_reveals_what_it_was_asked_for_once_and_nothing_that_is_no_share(rig: SecureSum) -> None:
    names = names_of(4)
    rig.advertise(names)
    rig.share(names)
    rig.send(names, vectors_of(names))
    rig.coordinator.close(names)
    rig.sign(names)
    said = rig.clients[names[0]].reveal(rig.coordinator.signatures_for(names[0]))
    with pytest.raises(UpdateRefused, match="reveals shares of others than it was asked for"):
        rig.coordinator.take_revealed(names[0], {}, said.mask_seeds)
    with pytest.raises(UpdateRefused, match="reveals what are no shares"):
        rig.coordinator.take_revealed(names[0], dict.fromkeys(said.mask_seeds, -1), {})
    rig.coordinator.take_revealed(names[0], said.mask_seeds, said.key_seeds)
    with pytest.raises(UpdateRefused, match="reveals shares again"):
        rig.coordinator.take_revealed(names[0], said.mask_seeds, said.key_seeds)


@pytest.mark.parametrize("which", ["mask_key", "share_key"])
def test_a_member_that_shows_what_is_no_key_is_refused_and_stops_nobody(rig: SecureSum, which: str) -> None:
    names, people = names_of(4), rig.people
    for key, told in ((bytes(32), "shows what is no key"), (b"", "of another length")):
        said = advert(TERMS, names[0], replace(keys.fresh().shown(), **{which: key}), people.signer(names[0]))
        with pytest.raises(UpdateRefused, match=told):
            rig.coordinator.take_advert(said)
    copied = rig.clients[names[1]].advertise()
    rig.coordinator.take_advert(copied)
    with pytest.raises(UpdateRefused, match="client-000 shows a key that another client has shown"):
        rig.coordinator.take_advert(advert(TERMS, names[0], copied.shown, people.signer(names[0])))
    with pytest.raises(UpdateRefused, match="client-000 has not signed the keys"):
        rig.coordinator.take_advert(replace(copied, client=names[0], key=people.key_of(names[0]), shown=keys.fresh().shown()))


@pytest.fixture
def rig() -> SecureSum:
    return SecureSum(People.named(names_of(4)))
