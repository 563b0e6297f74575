"""The history: a hash chain of what happened, signed by the coordinator. Pure: no database, no files, no clock.

An entry holds the digest of the one before it, and the signature is over its number and its own digest. So whoever has one entry,
or only its head, can tell whether all that came before is as it was (Haber & Stornetta 1991, J. Cryptology; Crosby & Wallach 2009,
USENIX Security). Entry 1 says which key signs; an entry "key replaced", signed with a new key, that this one does from there on.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from choral.canonical import canonical
from choral.heads import KEY_BYTES, Head, fingerprint, is_genuine, signed_part
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

BEGUN, KEY_REPLACED = "history begun", "key replaced"
KEY = "key"
"""the fact, in entries of these two, that is the public key"""
NOTHING = bytes(32)
_DOMAIN = b"choral history entry 1"
_SHIFTS = [sign * by for by in range(1, 129) for sign in (1, -1)]  # how far an entry that was moved is looked for
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
Facts = Mapping[str, Any]
Telling = tuple[str, Facts]
"""what happened, and its facts"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened: `facts` is canonical JSON, `before` the digest of the entry before it (32 zero bytes: none is)."""

    sequence: int
    at: datetime
    what: str
    facts: str
    before: bytes
    digest: bytes
    signature: bytes

    def head(self, key: bytes) -> Head:
        """As it is handed out; `key` is the public key that it was signed with."""
        return Head(self.sequence, self.digest, self.signature, key)

    @property
    def content(self) -> dict[str, Any]:
        """The facts. Raises ValueError: they are not what was written."""
        try:
            content = json.loads(self.facts)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"entry {self.sequence} has no facts ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"entry {self.sequence} has no facts")
        return content


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the history: at which entry, and what to do about it."""

    entry: int | None
    found: str
    cure: str = "find out who could write to the database; restore a backup from before that"


def digest_of(entry: Entry) -> bytes:
    """SHA-256 of all of an entry but its digest and signature; what has no length of its own has it in front."""
    what, facts = entry.what.encode(), entry.facts.encode()
    moment = (entry.at - _EPOCH) // _MICROSECOND
    head = struct.pack(">qq32sqq", entry.sequence, moment, entry.before, len(what), len(facts))
    return hashlib.sha256(_DOMAIN + head + what + facts).digest()


def _is_whole(entry: Entry) -> bool:
    """Whether the digest is that of the content. What was written over with another kind of value has none."""
    try:
        return digest_of(entry) == entry.digest
    except (struct.error, TypeError, AttributeError, ValueError, OverflowError):
        return False


class History:
    """Where the history stands, and who goes on with it: `head` is the newest entry's; None: there is no entry yet.

    `found` are the facts of what there was before the first entry.
    """

    def __init__(self, key: Ed25519PrivateKey, head: Head | None = None, found: Facts | None = None) -> None:
        self.head = head
        self.key = key
        self._public = key.public_key().public_bytes_raw()
        self._found = found or {}

    def next(self, at: datetime, tellings: Iterable[Telling]) -> list[Entry]:
        """The entries that tell of these, to be appended; `head` stays until `appended`.

        The first ones of all are preceded by one that tells the key, and what was found.
        """
        told = list(tellings)
        if told and self.head is None:
            told.insert(0, (BEGUN, {KEY: self._public.hex(), "found": self._found}))
        sequence, before = (self.head.sequence, self.head.digest) if self.head is not None else (0, NOTHING)
        entries: list[Entry] = []
        for number, (what, facts) in enumerate(told, sequence + 1):
            entries.append(self._entry(number, at, what, facts, before))
            before = entries[-1].digest
        return entries

    def appended(self, entries: Iterable[Entry]) -> None:
        """These are stored."""
        for entry in entries:
            self.head = entry.head(self._public)

    @property
    def new_key(self) -> Telling:
        """What tells that from here on this key signs."""
        return KEY_REPLACED, {KEY: self._public.hex()}

    def _entry(self, sequence: int, at: datetime, what: str, facts: Facts, before: bytes) -> Entry:
        unsigned = Entry(sequence, at, what, canonical(facts), before, b"", b"")
        digest = digest_of(unsigned)
        return replace(unsigned, digest=digest, signature=self.key.sign(signed_part(sequence, digest)))


class Chain:
    """Verifies entries in the order of their numbers, one after the other; `faults` tells them all once `end` was called.

    `key` is the public key that signs, if it is known from elsewhere: the first entry tells it, but that may be gone.
    """

    def __init__(self, key: bytes = b"") -> None:
        self.faults: list[Fault] = []
        self.keys: dict[bytes, int] = {}
        """the public keys, by the entry that tells each"""
        self.key = key
        """the one in force"""
        self.last = 0
        self._digest = NOTHING
        self._places: dict[bytes, int] = {NOTHING: 0}
        self._changed: list[Entry] = []

    def add(self, entry: Entry) -> bool:
        """Take in the next entry; whether it is as it was written."""
        self._expect(entry)
        whole = _is_whole(entry)
        if not whole:
            self._changed.append(entry)
        elif entry.before != self._digest and entry.sequence == self.last + 1:
            self._fault(entry, "does not follow on the entry before it: one of the two was replaced")
        if whole and entry.what in (BEGUN, KEY_REPLACED):
            self._take_key(entry)
        genuine = not self.key or is_genuine(entry.head(self.key))
        if whole and not genuine:
            self._fault(entry, f"was not signed with the history's key ({fingerprint(self.key)})")
        self.last, self._digest = entry.sequence, entry.digest
        self._places[entry.digest] = entry.sequence
        return whole and genuine

    def end(self) -> None:
        """All entries were given: say of those that were changed whether they were only moved."""
        shift = 0
        for entry in self._changed:
            moved = next((by for by in (shift, *_SHIFTS) if _is_whole(replace(entry, sequence=entry.sequence + by))), None)
            if moved is not None:
                shift = moved  # those behind it may have been moved as far
                place = entry.sequence + moved
                self._fault(entry, f"is entry {place}, moved here: the order was changed, or entries before it removed")
            else:
                self._fault(entry, "was changed: its content is not what its digest says")
        self._changed.clear()
        if self.last == 0:
            self.faults.append(Fault(None, "there is no entry: the history is missing", _START))
        elif not self.key:
            self.faults.append(Fault(None, "no entry tells the key, and history.key is not there: no signature was checked"))
        self.faults.sort(key=lambda fault: fault.entry or 0)

    def holds(self, sequence: int, digest: bytes) -> bool:
        """Whether the entry of that number has that digest."""
        return self._places.get(digest) == sequence

    def _expect(self, entry: Entry) -> None:
        expected = self.last + 1
        if entry.sequence > expected:
            gone = f"entry {expected} is" if entry.sequence == expected + 1 else f"entries {expected} to {entry.sequence - 1} are"
            self.faults.append(Fault(expected, f"{gone} missing"))
        if self.last == 0 and entry.sequence == 1 and (entry.what != BEGUN or entry.before != NOTHING):
            self._fault(entry, "does not begin the history: what was the first entry is gone")

    def _take_key(self, entry: Entry) -> None:
        """From here on the key that it tells signs; the signature of this very entry shows that its owner wrote it."""
        try:
            key = bytes.fromhex(entry.content[KEY])
        except (ValueError, KeyError, TypeError):
            key = b""
        if len(key) != KEY_BYTES:
            self._fault(entry, "tells a key that is none")
        elif entry.what == BEGUN and self.keys:
            self._fault(entry, "begins the history a second time")
        else:
            self.key = key
            self.keys.setdefault(key, entry.sequence)

    def _fault(self, entry: Entry, found: str) -> None:
        self.faults.append(Fault(entry.sequence, f"entry {entry.sequence} {found}"))


def differing(handed: Head, newest: Head | None) -> str:
    """Why a head that was handed out once is not in the history."""
    if newest is None or handed.key != newest.key:
        return (
            f"it was handed entry {handed.sequence} of a history with another key ({fingerprint(handed.key)}): "
            "another coordinator, or one that was begun anew"
        )
    held = f"{handed.digest.hex()[:16]} as entry {handed.sequence}"
    if handed.sequence > newest.sequence:
        return f"it was handed {held}, and the history ends at {newest.sequence}: it was cut off, or restored from a backup"
    return f"it was handed {held}, and the history has another there: it was cut off and written anew, or restored from a backup"


_START = "restore a backup; a database that never had one gets it at the next start of `choral server`"


def verify(entries: Iterable[Entry], key: bytes = b"") -> Chain:
    """All of a history, verified."""
    chain = Chain(key)
    for entry in entries:
        chain.add(entry)
    chain.end()
    return chain
