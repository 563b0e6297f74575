"""The chain, with nothing around it: what is appended is whole, and each way to tamper with it is found and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from choral.heads import is_genuine
from choral_server.history import BEGUN, NOTHING, Entry, History, digest_of, verify
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as some

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
PUBLIC, OTHERS = (key.public_key().public_bytes_raw() for key in (KEY, OTHER))
NOON = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
WORDS = some.text(some.characters(), max_size=20)
Entries = list[Entry]


def written(count: int, history: History | None = None) -> Entries:
    """So many entries, of two commits."""
    history = history or History(KEY)
    entries = []
    for told in (1, count - 2):
        commit = history.next(NOON, [("event", {"told": f"thing {number}"}) for number in range(told)])
        history.appended(commit)
        entries += commit
    return entries


def resigned(entry: Entry, key: Ed25519PrivateKey = KEY, **changes: object) -> Entry:
    """What an attacker writes who can compute digests, and has a key."""
    changed = replace(entry, **changes)  # type: ignore[arg-type]
    return History(key)._entry(changed.sequence, changed.at, changed.what, {"told": "forged"}, changed.before)


def found(entries: Entries, key: bytes = b"") -> list[tuple[int | None, str]]:
    return [(fault.entry, fault.found) for fault in verify(entries, key).faults]


def test_entries_follow_on_each_other_and_are_signed() -> None:
    entries = written(5)
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5]
    assert [entry.before for entry in entries] == [NOTHING, *(entry.digest for entry in entries[:-1])]
    assert (entries[0].what, entries[0].content) == (BEGUN, {"key": PUBLIC.hex(), "found": {}})
    assert all(is_genuine(entry.head(PUBLIC)) for entry in entries)
    chain = verify(entries)
    assert (chain.faults, chain.last, chain.keys, chain.key) == ([], 5, {PUBLIC: 1}, PUBLIC)
    assert chain.holds(3, entries[2].digest)
    assert not chain.holds(4, entries[2].digest)


def test_a_head_moves_only_with_what_is_stored() -> None:
    history = History(KEY)
    once, again = (history.next(NOON, [("event", {})]) for _ in range(2))
    assert once == again
    assert history.head is None
    history.appended(once)
    assert history.head == once[-1].head(PUBLIC)
    assert history.next(NOON, []) == []
    assert [entry.sequence for entry in History(KEY, history.head).next(NOON, [("event", {})])] == [3]


def test_a_digest_is_the_same_in_every_release() -> None:
    entry = Entry(7, NOON, "event", '{"a":1}', bytes(range(32)), b"", b"")
    assert digest_of(entry).hex() == "f0de94cd631a81a24cc183021604ca8ec55b168ce836bed368fd9a42ef004e6a"


CASES: dict[str, tuple[Callable[[Entries], Entries], list[tuple[int | None, str]]]] = {
    "content flipped": (
        lambda e: [*e[:2], replace(e[2], facts=e[2].facts.replace("0", "1")), *e[3:]],
        [(3, "entry 3 was changed: its content is not what its digest says")],
    ),
    "time moved": (
        lambda e: [*e[:2], replace(e[2], at=NOON + timedelta(microseconds=1)), *e[3:]],
        [(3, "entry 3 was changed: its content is not what its digest says")],
    ),
    "signature flipped": (
        lambda e: [*e[:2], replace(e[2], signature=bytes(64)), *e[3:]],
        [(3, f"entry 3 was not signed with the history's key ({PUBLIC.hex()[:16]})")],
    ),
    "another kind of value": (
        lambda e: [*e[:2], replace(e[2], before="text"), *e[3:]],  # type: ignore[arg-type]
        [(3, "entry 3 was changed: its content is not what its digest says")],
    ),
    "dropped": (lambda e: [*e[:2], *e[3:]], [(3, "entry 3 is missing")]),
    "several dropped": (lambda e: [e[0], *e[3:]], [(2, "entries 2 to 3 are missing")]),
    "dropped and renumbered": (
        lambda e: [*e[:2], *(replace(entry, sequence=entry.sequence - 1) for entry in e[3:])],
        [
            (3, "entry 3 is entry 4, moved here: the order was changed, or entries before it removed"),
            (4, "entry 4 is entry 5, moved here: the order was changed, or entries before it removed"),
        ],
    ),
    "reordered": (
        lambda e: [*e[:2], replace(e[3], sequence=3), replace(e[2], sequence=4), e[4]],
        [
            (3, "entry 3 is entry 4, moved here: the order was changed, or entries before it removed"),
            (4, "entry 4 is entry 3, moved here: the order was changed, or entries before it removed"),
            (5, "entry 5 does not follow on the entry before it: one of the two was replaced"),
        ],
    ),
    "forged with another key": (
        lambda e: [*e[:4], resigned(e[4], OTHER)],
        [(5, f"entry 5 was not signed with the history's key ({PUBLIC.hex()[:16]})")],
    ),
    "replaced by the owner of the key": (
        lambda e: [*e[:3], resigned(e[3]), e[4]],
        [(5, "entry 5 does not follow on the entry before it: one of the two was replaced")],
    ),
    "first gone": (lambda e: e[1:], [(1, "entry 1 is missing")]),
    "all gone": (lambda e: [], [(None, "there is no entry: the history is missing")]),
    "all but the first": (lambda e: e[:1], []),  # which only the records or a client's head show
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_done_to_it_is_found_and_named(case: str) -> None:
    tamper, expected = CASES[case]
    assert found(tamper(written(5)), PUBLIC) == expected


def test_without_the_key_that_is_said() -> None:
    assert (None, "no entry tells the key, and history.key is not there: no signature was checked") in found(written(5)[1:])


def test_a_new_key_is_an_entry() -> None:
    entries = written(3)
    history = History(OTHER, entries[-1].head(OTHERS))
    entries += history.next(NOON, [history.new_key, ("event", {})])
    chain = verify(entries)
    assert (chain.faults, chain.keys, chain.key) == ([], {PUBLIC: 1, OTHERS: 4}, OTHERS)
    silent = History(OTHER, written(3)[-1].head(OTHERS)).next(NOON, [("event", {})])
    assert found([*written(3), *silent]) == [(4, f"entry 4 was not signed with the history's key ({PUBLIC.hex()[:16]})")]


@given(some.dictionaries(WORDS, WORDS | some.none() | some.integers(), max_size=3), some.integers(1, 4), some.data())
def test_any_bit_that_changes_is_found(facts: dict[str, object], place: int, data: some.DataObject) -> None:
    entries = written(5)
    entries[place] = History(KEY, entries[place - 1].head(PUBLIC)).next(NOON, [("event", facts)])[0]
    entries = entries[: place + 1]
    assert found(entries) == []
    assert entries[place].content == facts
    raw = bytearray(entries[place].facts.encode())
    raw[data.draw(some.integers(0, len(raw) - 1))] ^= 1 << data.draw(some.integers(0, 6))
    entries[place] = replace(entries[place], facts=raw.decode())
    assert [entry for entry, _ in found(entries)] == [place + 1]
