"""The history in a real database of either kind: written with what it tells of, and held against it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from choral.config import parse
from choral.errors import ConfigError, HistoryBroken, LeaseLost, TrustError, WrongState
from choral.heads import Head, is_genuine, signed_part
from choral.messages import VersionRef
from choral.metrics import Metric
from choral.plan import Kind
from choral_server import history_key
from choral_server.audit import Audit, audit, lineage, newest
from choral_server.backups.restoring import restore
from choral_server.backups.taking import back_up
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.facts import ROUND, VERSION, configuration, in_words
from choral_server.lease import Lease
from choral_server.records import EventRecord, Origin, Record, RunRecord, VersionRecord
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.store import Store
from choral_server.troubles import Troubles
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NOON = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
STRANGE = "a\0b \ud800 'é' \\ 🎼"
RUN = RunRecord("run", "small", "1", 5, NOON)


def digest(number: int) -> bytes:
    return bytes([number]) * 32


def version(number: int, run: str = "run", parent: Origin | None = None) -> VersionRecord:
    if parent is None and number > 0:
        parent = Origin(run, number - 1, digest(number - 1))
    return VersionRecord(run, VersionRef(number, digest(number), 100 + number), f"{number}.safetensors", NOON, parent=parent)


def ended(number: int, state: RoundState = RoundState.DONE) -> Round:
    parts = [
        Part(f"run/{number}/alice", "alice", PartState.ACCEPTED, "", 10),
        Part(f"run/{number}/bob", "bob", PartState.REFUSED, STRANGE),
    ]
    by_name = {part.assignment: part for part in parts}
    return Round("run", number, Kind.TRAINING, number, 2, 1, by_name, NOON, state, STRANGE, 1.5, digest(200), digest(number))


@pytest.fixture
def config(database_url: str, tmp_path: Path) -> ServerConfig:
    return configured(tmp_path / "state", database_url)


def configured(state: Path, database: str) -> ServerConfig:
    state.mkdir()
    least = {"listen": "127.0.0.1:0", "plaintext": True, "state": str(state), "task": "small:task", "database": database}
    return parse({**least, "run": {"rounds": 3, "cohort_size": 2}}, ServerConfig, "choral.yaml")


@contextlib.asynccontextmanager
async def opened(config: ServerConfig) -> AsyncIterator[Store]:
    """As a coordinator has it open."""
    database = await Database.open(config.database_url, Troubles())
    try:
        lease = await Lease.take(database, "coordinator", 3600.0)
        try:
            yield await Store.open(database, lease, await history_key.key_for(config.state, database), lambda: NOON)
        finally:
            await lease.give_up()
    finally:
        await database.close()


async def fill(config: ServerConfig, rounds: int = 3) -> list[Head]:
    """A run with so many rounds, each with a version, and an event; the heads after each commit."""
    heads = []
    async with opened(config) as store:
        await store.commit(RUN, version(0))
        for number in range(rounds):
            event = EventRecord(NOON, "result refused", STRANGE, "run", number, "bob")
            run = replace(RUN, latest=number + 1, next_round=number + 1)
            await store.commit(run, ended(number), version(number + 1), event)
            await store.commit(replace(version(number + 1), test=(Metric("loss", 0.5, 1),)), run)  # measured: no news
            assert store.head is not None
            heads.append(store.head)
    return heads


async def tamper(config: ServerConfig, *statements: str) -> None:
    """What somebody does who can write to the database."""
    database = await Database.open(config.database_url, Troubles())

    async def work(connection: Any) -> None:
        for statement in statements:
            await connection.exec_driver_sql(statement)

    try:
        await database.write(work)
    finally:
        await database.close()


def told(found: Audit) -> list[str]:
    return [fault.found for fault in found.faults]


# What is written


async def test_what_is_committed_is_told_in_the_order_of_events(config: ServerConfig) -> None:
    heads = await fill(config, rounds=1)
    found = await audit(config, {"alice": heads})
    assert (found.faults, found.entries, found.heads) == ([], 5, 1)
    entries = [(entry.what, entry.content) for entry in reversed(await newest(config, 99))]
    assert [what for what, _ in entries] == ["history begun", "version published", "event", "round ended", "version published"]
    assert entries[0][1]["found"] == {}
    assert entries[1][1] == {"run": "run", "number": 0, "digest": digest(0).hex(), "bytes": 100, "round": None, "parent": None}
    assert entries[2][1].items() >= {"what": "result refused", "round": 0, "client": "bob", "run": "run"}.items()
    stored = "a\ufffdb ? 'é' \\ 🎼"
    assert entries[3][1] == {
        "run": "run",
        "round": 0,
        "kind": "training",
        "outcome": "done",
        "reason": stored,
        "plan": digest(200).hex(),
        "goal": 2,
        "quorum": 1,
        "asked": 2,
        "accepted": 1,
        "refused": [{"client": "bob", "reason": stored}],
        "parent": {"number": 0, "digest": digest(0).hex()},
        "child": {"number": 1, "digest": digest(1).hex()},
    }
    assert entries[4][1]["parent"] == {"run": "run", "number": 0, "digest": digest(0).hex()}
    assert entries[4][1]["round"] == 0
    words = [in_words(what, facts) for what, facts in entries]
    assert words[3] == (
        f"run run: training round 0 done ({stored}): 1 accepted of 2 asked, from version 0, made version 1, plan c8c8c8c8c8c8c8c8; "
        f"bob refused: {stored}"
    )
    assert words[4] == "run run: version 1 (SHA-256 0101010101010101), from version 0 by round 0"


async def test_the_history_goes_on_after_a_restart(config: ServerConfig) -> None:
    (*_, head) = await fill(config)
    async with opened(config) as store:
        assert store.head == head
        assert is_genuine(head)
        await store.commit(EventRecord(NOON, "run paused"))
        assert store.head is not None
        assert store.head.sequence == head.sequence + 1
        assert await store.holds(head)
        assert await store.holds(store.head)
        assert not await store.holds(replace(head, digest=bytes(32)))
        assert not await store.holds(replace(head, sequence=99))
    assert (await audit(config, {})).faults == []


async def test_what_is_not_committed_is_not_told(config: ServerConfig) -> None:
    async with opened(config) as store:
        await store.commit(RUN, version(0))
        head = store.head
        rival = await Database.open(config.database_url, Troubles())
        await Lease.take(rival, "coordinator", 3600.0)
        with pytest.raises(LeaseLost):
            await store.commit(EventRecord(NOON, "too late"))
        assert store.head == head
        await Lease.take(rival, "coordinator", 3600.0)
        await rival.close()
        store._lease.epoch += 2
    assert (await audit(config, {})).faults == []


async def test_after_a_commit_of_which_nobody_knows_whether_it_was_done_the_chain_goes_on(config: ServerConfig) -> None:
    async with opened(config) as store:
        await store.commit(RUN, version(0))
        write = store._database.write

        async def done_but_not_known(work: Any, then: Any = None) -> Any:
            await write(work)
            raise asyncio.CancelledError

        store._database.write = done_but_not_known  # type: ignore[method-assign,assignment]
        with pytest.raises(asyncio.CancelledError):
            await store.commit(EventRecord(NOON, "the first"))
        store._database.write = write  # type: ignore[method-assign]
        await store.commit(EventRecord(NOON, "the second"))
    found = await audit(config, {})
    assert (found.faults, found.entries) == ([], 4)


async def test_records_from_before_the_history_are_named_and_not_missed(config: ServerConfig) -> None:
    await fill(config)
    await tamper(config, "DELETE FROM history")
    async with opened(config) as store:
        run = replace(RUN, latest=4, next_round=4)
        await store.commit(run, ended(3), version(4), EventRecord(NOON, "run paused"))
    assert (await audit(config, {})).faults == []
    first = (await newest(config, 99))[-1]
    assert first.content["found"] == {"runs": {"run": {"latest": 3, "rounds": 3}}, "events": 3}
    assert in_words(first.what, first.content).endswith("; there were already run")
    with pytest.raises(HistoryBroken, match="names version 3 of run run as parent, which was published before the history began"):
        await lineage(config, digest(4))


async def test_the_configuration_is_told_when_it_changes(config: ServerConfig) -> None:
    values = configuration(config, "postgresql://choral:***@host/choral")
    assert values["database"] == "postgresql://choral:***@host/choral"
    assert (values["run.rounds"], values["listen.port"]) == (3, 0)
    changed = {**values, "run.rounds": 9, "run.new_key": True}
    for told_values in (values, values, changed, changed):
        async with opened(config) as store:
            await store.configure(told_values)
    entries = [entry for entry in reversed(await newest(config, 99)) if entry.what == "configuration"]
    assert [entry.content for entry in entries] == [
        {"values": values, "changed": {}},
        {"values": changed, "changed": {"run.new_key": [None, True], "run.rounds": [3, 9]}},
    ]
    assert in_words("configuration", entries[1].content) == "run.new_key: None → True; run.rounds: 3 → 9"


# What is found


TAMPERED = {
    "flipped": (["UPDATE history SET facts = replace(facts, 'bob', 'eve') WHERE sequence = 4"], "entry 4 was changed"),
    "dropped": (["DELETE FROM history WHERE sequence = 7"], "entry 7 is missing"),
    "reordered": (
        [f"UPDATE history SET sequence = {a} WHERE sequence = {b}" for a, b in ((-1, 5), (5, 6), (6, -1))],
        "entry 5 is entry 6, moved here",
    ),
    "truncated": (
        ["DELETE FROM history WHERE sequence > 8"],
        "no entry tells of round 2 of run run, which the database has: the history was cut off (it ends at entry 8)",
    ),
    "a version": (
        ["UPDATE versions SET size_bytes = 7 WHERE number = 2"],
        "version 2 of run run in the database is not what entry 8 tells: one of the two was changed",
    ),
    "a round": (["UPDATE rounds SET goal = 7 WHERE number = 1"], "round 1 of run run in the database is not what entry 7 tells"),
    "a part": (
        ["DELETE FROM assignments WHERE assignment = 'run/1/bob'"],
        "round 1 of run run in the database is not what entry 7",
    ),
    "an event": (["UPDATE events SET told = 'nothing' WHERE round = 1"], "in the database is not what entry 6 tells"),
    "a record deleted": (
        ["DELETE FROM events WHERE round = 1"],
        "(entry 6), which the database does not have: records were deleted",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
async def test_what_was_done_to_the_database_is_found(case: str, config: ServerConfig) -> None:
    statements, expected = TAMPERED[case]
    await fill(config)
    await tamper(config, *statements)
    assert any(expected in fault for fault in told(await audit(config, {}))), told(await audit(config, {}))


async def test_an_end_removed_with_its_records_shows_with_a_clients_head(config: ServerConfig) -> None:
    heads = await fill(config)
    await tamper(
        config,
        "DELETE FROM history WHERE sequence > 8",
        *(f"DELETE FROM {table} WHERE round = 2" for table in ("assignments", "events")),
        "DELETE FROM rounds WHERE number = 2",
        "DELETE FROM versions WHERE number = 3",
    )
    assert (await audit(config, {})).faults == []
    cut = told(await audit(config, {"alice": heads}))
    assert cut == [
        f"alice: it was handed entry 11 ({heads[-1].digest.hex()[:16]}), and the history ends at entry 8: its end was cut off"
    ]
    async with opened(config) as store:
        await store.commit(*(EventRecord(NOON, "run paused") for _ in range(5)))
    assert told(await audit(config, {"alice": heads})) == [
        f"alice: it was handed entry 11 ({heads[-1].digest.hex()[:16]}), and the history has another there: it was written anew"
    ]


async def test_heads_of_others_are_told_from_those_of_this_history(config: ServerConfig) -> None:
    (*_, head) = await fill(config)
    other = Ed25519PrivateKey.generate()
    foreign = Head(3, digest(3), other.sign(signed_part(3, digest(3))), history_key.public_part(other))
    faults = told(await audit(config, {"alice": [head, replace(head, signature=bytes(64))], "bob": [foreign]}))
    assert len(faults) == 2
    assert faults[0].endswith("has no good signature: the file was changed")
    assert "bob: the head with entry 3" in faults[1]
    assert "is of a history with another key" in faults[1]


async def test_what_no_coordinator_wrote_is_found(tmp_path: Path) -> None:
    config = configured(tmp_path / "state", f"sqlite:///{tmp_path / 'choral.db'}")
    await fill(config)
    await tamper(config, "UPDATE history SET at = 'yesterday' WHERE sequence = 3")
    with pytest.raises(HistoryBroken, match="holds something that no coordinator wrote"):
        await audit(config, {})


async def test_where_there_is_nothing_to_audit(tmp_path: Path) -> None:
    config = configured(tmp_path / "state", f"sqlite:///{tmp_path / 'choral.db'}")
    for look in (audit(config, {}), newest(config, 1), lineage(config, digest(1))):
        with pytest.raises(ConfigError, match="does not exist: give the configuration of a coordinator that has run"):
            await look


# A checkpoint's line


async def test_a_line_leads_back_to_the_first_version(config: ServerConfig) -> None:
    await fill(config)
    async with opened(config) as store:
        again = version(4, parent=Origin("run", 1, digest(1)))  # a rollback
        await store.commit(replace(RUN, latest=4), again)
        other = replace(version(0, "run-2"), parent=Origin("run", 4, digest(4)))
        other = replace(other, version=VersionRef(0, digest(9), 100))
        await store.commit(replace(RUN, name="run-2"), other)
    line = await lineage(config, digest(9))
    assert [(a.version["run"], a.version["number"]) for a in line] == [("run-2", 0), ("run", 4), ("run", 1), ("run", 0)]
    assert [a.round["accepted"] if a.round else None for a in line] == [None, None, 1, None]
    with pytest.raises(HistoryBroken, match=f"no version has the SHA-256 {digest(77).hex()}: the file was changed, or is another"):
        await lineage(config, digest(77))
    await tamper(config, "DELETE FROM history WHERE sequence = 3")
    with pytest.raises(HistoryBroken, match="entry 3 is missing, so it proves nothing"):
        await lineage(config, digest(9))


async def test_a_line_that_leads_back_to_itself_ends(config: ServerConfig) -> None:
    """Whoever has the key can sign it."""
    await fill(config)
    async with opened(config) as store:
        await store.commit(replace(RUN, latest=4), version(4, parent=Origin("run", 4, digest(4))))
    with pytest.raises(HistoryBroken, match=r"version 4 of run run \(entry \d+\) descends from itself"):
        await lineage(config, digest(4))


@pytest.mark.parametrize("what", [VERSION, ROUND])
@pytest.mark.parametrize("facts", [{}, {"run": [], "number": 7, "round": 7}, {"run": "run", "number": {}, "round": {}}])
async def test_an_entry_without_its_facts_is_told_as_that(config: ServerConfig, what: str, facts: dict[str, Any]) -> None:
    await fill(config)
    async with opened(config) as store:
        await store._enter(what, facts)
    with pytest.raises(HistoryBroken, match="holds something that no coordinator wrote"):
        await lineage(config, digest(1))
    await audit(config, {})


@pytest.mark.parametrize("facts", ["[" * 100_000, "[]", ""])
async def test_facts_that_cannot_be_read_are_a_fault(config: ServerConfig, facts: str) -> None:
    await fill(config)
    await tamper(config, f"UPDATE history SET facts = '{facts}' WHERE sequence = 1")
    assert any("entry 1 was changed" in found for found in told(await audit(config, {})))


@pytest.mark.parametrize("change", ["digest = 'text'", "what = x'00'", "facts = x'7b7d'", "before = 7"])
async def test_an_entry_of_other_types_cannot_be_shown(tmp_path: Path, change: str) -> None:
    """SQLite has any type in any column."""
    config = configured(tmp_path / "state", f"sqlite:///{tmp_path / 'choral.db'}")
    await fill(config)
    await tamper(config, f"UPDATE history SET {change} WHERE sequence = 3")
    with pytest.raises(HistoryBroken, match="holds something that no coordinator wrote"):
        await newest(config, 20)


# The key


async def test_the_key_is_made_once_and_is_the_owners_alone(config: ServerConfig) -> None:
    await fill(config)
    path = config.state / "history.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    await audit(config, {})
    async with opened(config):
        assert path.read_bytes() == content
    assert [each.name for each in config.state.iterdir()] == ["history.key"]


@pytest.mark.parametrize("lost", ["gone", "another"])
async def test_a_history_does_not_go_on_with_another_key_unless_an_operator_says_so(lost: str, config: ServerConfig) -> None:
    heads = await fill(config)
    path = config.state / "history.key"
    path.unlink()
    if lost == "another":
        history_key.made(config.state)
        assert any("is another key" in fault for fault in told(await audit(config, {})))
    with pytest.raises(ConfigError, match=r"history\.key .*: put the file back from where it was .*\(`choral audit renew-key`\)"):
        async with opened(config):
            pass
    renewed = await history_key.renew(config, lambda: NOON)
    found = await audit(config, {"alice": heads})
    assert (found.faults, list(found.keys)) == ([], [1, found.entries])
    assert found.keys[found.entries].hex().startswith(renewed)
    async with opened(config) as store:
        await store.commit(EventRecord(NOON, "run paused"))
    assert (await audit(config, {})).faults == []
    with pytest.raises(WrongState, match="nothing is to be renewed"):
        await history_key.renew(config, lambda: NOON)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
async def test_a_file_that_holds_no_key_is_named(content: bytes, config: ServerConfig) -> None:
    await fill(config, 1)
    (config.state / "history.key").write_bytes(content)
    with pytest.raises(TrustError, match=r"history\.key holds no key in PEM form: restore it from a backup"):
        async with opened(config):
            pass


@pytest.mark.parametrize("key", ["in the backup", "nowhere", "another"])
async def test_a_restored_history_goes_on(key: str, config: ServerConfig, tmp_path: Path) -> None:
    heads = await fill(config)
    there = configured(tmp_path / "there", f"sqlite:///{tmp_path / 'there.db'}")
    await write_versions(config, there)
    if key == "nowhere":
        (config.state / "history.key").unlink()
    file = tmp_path / "backup.tar"
    taken = await back_up(config, file, NOON)
    if key == "another":
        history_key.made(there.state)
        with pytest.raises(ConfigError, match="is there already and another key than the one in the backup"):
            await restore(there, file, NOON)
        return
    restored = await restore(there, file, NOON)
    found = await audit(there, {"alice": heads})
    assert found.faults == []
    assert (await newest(there, 1))[0].content["what"] == "run restored"
    if key == "nowhere":
        assert taken.notes[-1].startswith("the key of the history is not in it: ")
        assert restored.notes[-1] == "the key of the history is not in the backup: it goes on with a new one, and clients will warn"
        assert len(found.keys) == 2
    else:
        assert (there.state / "history.key").read_bytes() == (config.state / "history.key").read_bytes()
    async with opened(there) as store:
        await store.commit(EventRecord(NOON, "afterwards"))
    assert (await audit(there, {"alice": heads})).faults == []


async def write_versions(config: ServerConfig, there: ServerConfig) -> None:
    """The newest version's file, as the records tell: a backup is nothing without it."""

    content = b"weights"
    path = config.state / "runs/run/versions/000003.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    async with opened(config) as store:
        reference = VersionRef(4, hashlib.sha256(content).digest(), len(content))
        path.rename(path.with_name("000004.safetensors"))
        records: list[Record] = [replace(version(4), version=reference), replace(RUN, latest=4, next_round=4)]
        await store.commit(*records)
