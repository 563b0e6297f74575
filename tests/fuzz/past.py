"""What is told of the past: the coordinator's history, the heads of it that clients keep; and the files of a device's owner."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import ipaddress
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from choral import config
from choral.errors import ChoralError, ConfigError, Declined, HistoryBroken
from choral.heads import Head, from_line, signed_part, to_line
from choral.messages import VersionRef
from choral.plan import Kind, Plan, Training
from choral.v1 import federation_pb2 as pb
from choral.wire import head_from_pb
from choral_client.day_book import DayBook
from choral_client.guard_file import GuardFile
from choral_client.heads import Heads
from choral_deploy import audit_commands
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.facts import VERSION, in_words
from choral_server.history import Entry, differing, digest_of, verify
from choral_server.lease import Lease
from choral_server.records import EventRecord, Origin, RunRecord, VersionRecord
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.store import Store
from choral_server.troubles import Troubles
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fuzz.files import YAML
from fuzz.house import CONFIG, NOON, SIGNS
from fuzz.target import Decode, Make, Target, in_memory
from google.protobuf.message import DecodeError

PUBLIC = SIGNS.public_key().public_bytes_raw()
COLUMNS = ("sequence", "at", "what", "facts", "before", "digest", "signature")
JSON_HOSTILE = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'"x"',
    b"9" * 5000,
    b"\xff",
    b'{"a": 1e999}',
    b"NaN",
]


# Heads


def head(sequence: int, key: Ed25519PrivateKey = SIGNS) -> Head:
    """One that its owner has signed."""
    digest = hashlib.sha256(str(sequence).encode()).digest()
    return Head(sequence, digest, key.sign(signed_part(sequence, digest)), key.public_key().public_bytes_raw())


@contextmanager
def heads(folder: Path) -> Iterator[Decode]:
    """The file of a client, which then is handed a head; and which an operator is given."""

    def decode(data: bytes) -> None:
        path = folder / "heads.jsonl"
        path.write_bytes(data)
        kept = Heads(folder, 4)
        for handed in (None, head(9), head(2), head(2**63 - 1)):
            kept.take(handed)
        assert all(isinstance(one, Head) for one in kept._read())
        path.write_bytes(data)
        audit_commands._heads(path)

    yield decode


def heads_seeds() -> list[bytes]:
    return ["".join(map(to_line, map(head, range(1, 5)))).encode(), to_line(head(7)).encode()]


def heads_hostile() -> list[bytes]:
    good = json.loads(to_line(head(7)))
    changes: list[dict[str, Any]] = [
        *({"sequence": number} for number in (0, -1, 2**63, 10**4000, True, 1.0, "7", None, [])),
        *({"digest": digest} for digest in ("", "zz", 5, "00" * 33, None)),
        {"key": "00" * 32},
        {"key": "ff" * 32},
    ]
    lines = [json.dumps(good | change).encode() for change in changes]
    return [
        *lines,
        *JSON_HOSTILE,
        b"\n".join([*JSON_HOSTILE, to_line(head(7)).encode()]),
        to_line(head(7)).encode()[:-9],
        b"\n" * 1000,
    ]


@contextmanager
def handed(folder: Path) -> Iterator[Decode]:
    """A head in a message, at a client that has one, and at the coordinator."""
    kept = Heads(folder)
    kept.take(head(7))

    def decode(data: bytes) -> None:
        read = head_from_pb(pb.Welcome(history=pb.Head.FromString(data)))
        assert read is not None
        assert from_line(to_line(read)) == read
        kept.take(read)
        assert kept.newest is not None
        assert kept.newest.key == PUBLIC
        differing(read, head(7))

    yield decode


# The history


@contextmanager
def chain(folder: Path) -> Iterator[Decode]:
    """Entries as they were stored, and as whoever has a key can sign them; without a database."""

    def decode(data: bytes) -> None:
        entries = _entries(data)
        for given in (entries, _resigned(entries)):
            for key in (b"", PUBLIC):
                found = verify(given, key)
                assert all(len(public) == 32 for public in found.keys)
                assert all(fault.found for fault in found.faults)
                assert given or found.faults

    yield decode


def _entries(data: bytes) -> list[Entry]:
    """Of the rows those of which a database of types could be."""
    entries = []
    for row in _rows(data):
        read = dict(zip(COLUMNS, row, strict=True))
        with contextlib.suppress(ValueError, TypeError):
            read["at"] = datetime.fromisoformat(read["at"]).replace(tzinfo=UTC)
        kinds = (int, datetime, str, str, bytes, bytes, bytes)
        if all(type(value) is kind for value, kind in zip(read.values(), kinds, strict=True)) and abs(read["sequence"]) < 2**63:
            entries.append(Entry(**read))
    return sorted(entries, key=lambda entry: entry.sequence)


def _rows(data: bytes) -> list[list[Any]]:
    """Lines of JSON as rows: numbers and texts as they are, a list with a text is bytes in hexadecimal."""
    rows = []
    for line in data.splitlines()[:50]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, list):
            rows.append([_value(one) for one in [*row, *COLUMNS][: len(COLUMNS)]])
    return rows


def _value(value: Any) -> Any:
    if isinstance(value, list):
        with contextlib.suppress(ValueError, TypeError, IndexError):
            return bytes.fromhex(value[0])
    if isinstance(value, int) and abs(value) >= 2**63:
        return None
    return (
        value.encode("utf-8", "replace").decode() if isinstance(value, str) else value if isinstance(value, int | float) else None
    )


def _resigned(entries: list[Entry]) -> list[Entry]:
    """A chain of these, without a fault in it: whoever has a key can tell what they like."""
    chained: list[Entry] = []
    for entry in entries:
        before = chained[-1].digest if chained else bytes(32)
        unsigned = replace(entry, sequence=len(chained) + 1, before=before)
        try:
            digest = digest_of(unsigned)
        except (ValueError, TypeError, AttributeError, OverflowError):
            continue
        chained.append(replace(unsigned, digest=digest, signature=SIGNS.sign(signed_part(unsigned.sequence, digest))))
    return chained


def _lines(entries: list[Entry]) -> bytes:
    rows = [
        [
            e.sequence,
            e.at.replace(tzinfo=None).isoformat(" "),
            e.what,
            e.facts,
            [e.before.hex()],
            [e.digest.hex()],
            [e.signature.hex()],
        ]
        for e in entries
    ]
    return b"\n".join(json.dumps(row).encode() for row in rows)


def history(folder: Path, sign: bool) -> Iterator[Decode]:
    """The rows in a database of a coordinator that has no key any more, and all that `choral audit` does with them."""
    settings = _settings(folder)
    (folder / "choral.db").write_bytes(_database())
    path, checkpoint = folder / "choral.yaml", folder / "checkpoint"
    path.write_text(yaml.safe_dump(CONFIG | {"state": str(folder), "database": settings.database_url}))
    checkpoint.write_bytes(CHECKPOINT)

    def decode(data: bytes) -> None:
        rows = _rows(data)
        if sign:
            rows = [list(row.values()) for row in map(_as_row, _resigned(_entries(data)))]
        with contextlib.closing(sqlite3.connect(folder / "choral.db")) as database, database:
            database.execute("DELETE FROM history")
            for row in rows:
                with contextlib.suppress(sqlite3.Error):
                    database.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        refused = []
        for look in _LOOKS:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    look(path, checkpoint)
            except HistoryBroken as error:
                refused.append(error)
        if refused:
            raise refused[0]

    yield decode


_LOOKS: list[Callable[[Path, Path], None]] = [
    lambda path, checkpoint: audit_commands.verify(path, None, json=True),
    lambda path, checkpoint: audit_commands.show(path, 20, json=False),
    lambda path, checkpoint: audit_commands.lineage(checkpoint, path, json=False),
]


def _as_row(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in COLUMNS} | {"at": entry.at.replace(tzinfo=None).isoformat(" ")}


def _settings(folder: Path) -> ServerConfig:
    at = {"state": str(folder), "database": f"sqlite:///{folder / 'choral.db'}"}
    return config.parse({**CONFIG, **at}, ServerConfig, "server.yaml")


CHECKPOINT = b"the second version"


@cache
def _database() -> bytes:
    """One with a run, two versions and a round."""

    async def fill(folder: Path) -> None:
        database = await Database.open(_settings(folder).database_url, Troubles())
        store = await Store.open(database, await Lease.take(database, "here", 60.0), SIGNS, lambda: NOON)
        part = Part("run/0/alice/0", "alice", PartState.ACCEPTED, examples=10, digest=bytes(32))
        run = RunRecord("run", "small", "1", 5, NOON)
        first, second = (hashlib.sha256(content).digest() for content in (b"the first version", CHECKPOINT))
        await store.commit(run, VersionRecord("run", VersionRef(0, first, 17), "0.safetensors", NOON))
        ended = Round("run", 0, Kind.TRAINING, 0, 1, 1, {part.assignment: part}, NOON, RoundState.DONE, "", 1.5, bytes(32), second)
        child = VersionRecord("run", VersionRef(1, second, 18), "1.safetensors", NOON, parent=Origin("run", 0, first))
        await store.commit(replace(run, latest=1, next_round=1), ended, child, EventRecord(NOON, "something", "happened", "run"))
        await database.close()

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        asyncio.run(fill(Path(folder)))
        return (Path(folder) / "choral.db").read_bytes()


@cache
def history_entries() -> list[Entry]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder) / "choral.db"
        path.write_bytes(_database())
        with contextlib.closing(sqlite3.connect(path)) as database:
            rows = database.execute(
                "SELECT sequence, at, what, facts, before, digest, signature FROM history ORDER BY sequence"
            ).fetchall()
    return [Entry(row[0], datetime.fromisoformat(row[1]).replace(tzinfo=NOON.tzinfo), *row[2:]) for row in rows]


def history_hostile() -> list[bytes]:
    """Entries without facts, with other facts, of other types; a version that is its own parent; a key that is none."""
    entries = history_entries()
    hostile = [_lines([*entries[:place], *entries[place + 1 :]]) for place in range(len(entries))]
    for place, entry in enumerate(entries):
        facts = json.loads(entry.facts)
        told: list[Any] = [
            *({name: value for name, value in facts.items() if name != gone} for gone in facts),
            *(facts | {name: value} for name in facts for value in (None, [], {}, 7, "x", 10**40, "\ud800", [[1]], {"x": "y"})),
            *([], None, 7, {"found": {"runs": []}, "key": "00"}),
        ]
        texts = [*(json.dumps(one) for one in told), *(one.decode("latin-1") for one in JSON_HOSTILE)]
        hostile += [_lines([*entries[:place], replace(entry, facts=text), *entries[place + 1 :]]) for text in texts]
    return [*_circles(entries), *hostile, b"", b"[]", *(line.replace(b"[1,", b'["x",') for line in [_lines(entries)])]


def _circles(entries: list[Entry]) -> list[bytes]:
    """A version that descends from itself, at once and by way of another."""
    versions = [place for place, entry in enumerate(entries) if entry.what == VERSION]
    circles = []
    for place in versions:
        facts = json.loads(entries[place].facts)
        own = {"digest": facts["digest"], "number": facts["number"], "run": facts["run"]}
        circle = replace(entries[place], facts=json.dumps(facts | {"parent": own}))
        circles.append(_lines([*entries[:place], circle, *entries[place + 1 :]]))
    return circles


def history_of(sign: bool) -> Make:
    return contextmanager(lambda folder: history(folder, sign))


def history_content(data: bytes) -> None:
    """What is told to people of an entry."""
    what, _, facts = data.decode("utf-8", "replace").partition("\n")
    entry = Entry(1, NOON, what, facts, bytes(32), bytes(32), bytes(64))
    assert isinstance(in_words(what, audit_commands._facts(entry)), str)


# The owner's files

_GUARD = """\
tasks: {small: ["1"]}
max_epochs: 5
max_work_s: 60.0
max_work_s_per_day: 600.0
min_cohort: 1
hours: ["22:00-06:00", "06:00-22:00"]
networks: [192.168.1.0/24, "fd00::/8"]
"""
_PLAN = Plan(Kind.TRAINING, "small", "1", Training(), 7, True, cohort=3)


@contextmanager
def guard(folder: Path) -> Iterator[Decode]:
    def decode(data: bytes) -> None:
        (folder / "guard.yaml").write_bytes(data)
        file = GuardFile(folder)
        read = file.current()
        assert read.max_work_s is None or read.max_work_s > 0
        for place in (ipaddress.ip_address("192.168.1.7"), ipaddress.ip_address("fd00::1"), None):
            with contextlib.suppress(Declined):
                read.check(_PLAN, NOON, place)
        read.check(_PLAN, NOON, ipaddress.ip_address("192.168.1.7"))

    yield decode


GUARD_HOSTILE = [
    *(
        b"hours: [" + one + b"]"
        for one in (b"22:00-06:00", b'"24:00-24:00"', b'"99:99-99:99"', b'"\xd9\xa1\xd9\xa1:00-12:00"', b"1")
    ),
    *(
        b"networks: [" + one + b"]"
        for one in (b"1", b'"::/129"', b'"1.2.3.4/24"', b'"' + b"1" * 5000 + b'"', b'"fe80::1%eth0/64"', b"{}")
    ),
    b"max_epochs: -1",
    b"max_work_s: .inf",
    b"max_epsilon: .nan",
    b"tasks: {a: [1]}",
    b"secure_aggregation: 'no'",
    b"max_work_s_per_day: 1e9",
    b"[" * 30_000,
    b"",
]


@contextmanager
def day_book(folder: Path) -> Iterator[Decode]:
    """How long a device has worked today, and a second more."""
    today = date(2025, 6, 1)

    def decode(data: bytes) -> None:
        (folder / "work.json").write_bytes(data)
        book = DayBook(folder)
        before = book.worked_s(today)
        assert 0 <= before < float("inf")
        book.add(today, 1.0)
        assert book.worked_s(today) >= before

    yield decode


def _worked(value: bytes) -> bytes:
    return b'{"day": "2025-06-01", "worked_s": ' + value + b"}"


DAY_HOSTILE = [*JSON_HOSTILE, *map(_worked, (b"9" * 400, b"1e308", b"-1", b"true", b"null", b"Infinity", b'"x"', b"[" * 5000))]
TARGETS = [
    Target("heads of a client", heads, heads_seeds, (ConfigError,), (b'"sequence":', b'"key":"'), hostile=heads_hostile),
    Target(
        "head that is handed out",
        handed,
        lambda: [pb.Head(sequence=9, digest=head(9).digest, signature=head(9).signature, key=PUBLIC).SerializeToString()],
        (ChoralError, DecodeError),
    ),
    Target("entries of the history", chain, lambda: [_lines(history_entries())], (), hostile=history_hostile),
    *(
        Target(
            name,
            history_of(sign),
            lambda: [_lines(history_entries())],
            (HistoryBroken,),
            examples=15,
            hostile=lambda: history_hostile()[::20],
        )
        for name, sign in (("history in a database", False), ("history that is signed anew", True))
    ),
    Target(
        "facts of an entry",
        in_memory(history_content),
        lambda: [f"{entry.what}\n{entry.facts}".encode() for entry in history_entries()],
        (),
        hostile=lambda: [entry.what.encode() + b"\n" + one for entry in history_entries() for one in JSON_HOSTILE],
    ),
    Target("guard of a device", guard, lambda: [_GUARD.encode()], (ConfigError, Declined), YAML, hostile=lambda: GUARD_HOSTILE),
    Target("work of a day", day_book, lambda: [_worked(b"7.5")], (Declined,), (b"2025-06-01",), hostile=lambda: DAY_HOSTILE),
]
