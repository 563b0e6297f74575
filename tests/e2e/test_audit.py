"""`choral audit` on what a real coordinator and real clients left, and after somebody has written to the database."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from e2e.federation import Federation, Process, until
from e2e.zygote import Zygote

ROUNDS = 3
CALM: dict[str, Any] = {
    "run": {"rounds": ROUNDS, "schedule": {"interval_s": 3600}},
    "evaluation": {"clients": False},
    "exit_when_done": False,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Federation]:
    """Three rounds were done, and an operator had the model go back before; nobody runs any more."""
    with Federation(tmp_path_factory.mktemp("f"), zygote=zygote) as started:
        coordinator = started.coordinator(
            run={"rounds": ROUNDS, "schedule": {"interval_s": 3600}}, evaluation={"clients": False}, exit_when_done=False
        )
        clients = [started.client(name) for name in ("alice", "bob")]
        coordinator.saw("round done", round=0, accepted=2)
        assert started.command("versions", "rollback", 0, "-c", started.config).code() == 0
        coordinator.saw("rolled back", to=0)
        for number in range(1, ROUNDS):
            assert started.command("rounds", "trigger", "-c", started.config).code() == 0
            coordinator.saw("round done", round=number, accepted=2)
        coordinator.saw("run over", state="finished")
        assert audited(started, "verify").code() == 0  # also while it works
        for process in (*clients, coordinator):
            process.terminate()
            assert process.code() == 0
        yield started


class Tampering:
    """What somebody does who can write to the database: `do` statements, each in a connection that is closed again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def do(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._path)) as connection, connection:
            return connection.execute(statement, values).fetchall()


@pytest.fixture
def database(trained: Federation) -> Iterator[Tampering]:
    """The database, to tamper with; afterwards it is as it was."""
    path = trained.folder / "state" / "choral.db"
    tampering = Tampering(path)
    tampering.do("PRAGMA wal_checkpoint(TRUNCATE)")
    kept = shutil.copy(path, path.with_suffix(".kept"))
    yield tampering
    for leftover in path.parent.glob("choral.db-*"):
        leftover.unlink()
    shutil.move(kept, path)


def audited(federation: Federation, *words: object) -> Process:
    return federation.command("audit", *words, "-c", federation.config)


def heads(federation: Federation, client: str) -> Path:
    return federation.folder / client / "client" / "heads.jsonl"


def faults(federation: Federation, *words: object) -> list[str]:
    """What `verify` finds; it must find something."""
    broken = audited(federation, "verify", "--json", *words)
    assert broken.code() == 10
    found = json.loads(broken.stdout)["faults"]
    assert broken.stderr.startswith(f"choral: history: {len(found)} faults in ")
    assert all(fault["cure"] for fault in found)
    return [fault["found"] for fault in found]


def test_what_nobody_touched_is_whole_and_the_clients_hold_heads_of_it(trained: Federation) -> None:
    whole = audited(trained, "verify", "--head", heads(trained, "alice"), "--head", heads(trained, "bob"))
    assert (whole.code(), whole.stderr) == (0, "")
    first, key, held = whole.out
    assert first.endswith("entries are as they were signed, and the records are what they tell\n")
    assert key.endswith("signs from entry 1 on\n")
    kept = [line for name in ("alice", "bob") for line in heads(trained, name).read_text().splitlines()]
    assert held == f"{len(kept)} heads that clients were handed are in it\n"
    assert len(kept) >= 2 * ROUNDS
    for client in trained.processes[1:3]:
        assert client.events("the coordinator's history is not what it was") == []


def test_the_history_can_be_read(trained: Federation) -> None:
    shown = json.loads(audited(trained, "show", "--json", "--limit", 99).stdout)
    assert [entry["entry"] for entry in shown] == list(range(len(shown), 0, -1))
    whats = [entry["facts"]["what"] if entry["what"] == "event" else entry["what"] for entry in reversed(shown)]
    assert whats[:3] == ["history begun", "configuration", "version published"]
    assert whats.count("round ended") == ROUNDS
    assert whats.count("version published") == ROUNDS + 2
    assert {"rollback asked for", "rolled back", "round asked for"} <= set(whats)
    rounds = [entry["facts"] for entry in reversed(shown) if entry["what"] == "round ended"]
    assert [(round["asked"], round["accepted"], round["refused"]) for round in rounds] == [(2, 2, [])] * ROUNDS
    assert len({round["plan"] for round in rounds}) == 1
    assert all(len(bytes.fromhex(round["plan"])) == 32 for round in rounds)
    table = audited(trained, "show", "--limit", 3)
    assert (table.code(), table.stderr) == (0, "")
    assert "round ended" in table.stdout


def test_a_checkpoint_can_be_proved(trained: Federation, tmp_path: Path) -> None:
    latest = trained.versions / "latest.safetensors"
    line = json.loads(audited(trained, "lineage", latest, "--json").stdout)
    assert [step["version"]["number"] for step in line] == [4, 3, 2, 0]  # version 2 is version 0 again
    digests = [hashlib.sha256((trained.versions / f"{number:06d}.safetensors").read_bytes()).hexdigest() for number in (4, 3, 2, 0)]
    assert [step["version"]["digest"] for step in line] == digests
    assert [step["round"] and step["round"]["round"] for step in line] == [2, 1, None, None]
    table = audited(trained, "lineage", latest)
    assert (table.code(), table.stderr) == (0, "")
    assert digests[0][:8] in table.stdout
    other = tmp_path / "other.safetensors"
    other.write_bytes(latest.read_bytes() + b"\0")
    unknown = audited(trained, "lineage", other)
    assert unknown.code() == 10
    assert unknown.stderr.startswith("choral: history: no version has the SHA-256 ")
    assert audited(trained, "lineage", tmp_path / "none").code() == 2


def test_each_way_to_tamper_with_it_is_found(trained: Federation, database: Tampering) -> None:
    database.do("UPDATE history SET facts = replace(facts, '\"accepted\":2', '\"accepted\":3') WHERE what = 'round ended'")
    assert sum("was changed: its content is not what its digest says" in fault for fault in faults(trained)) == ROUNDS
    lineage = audited(trained, "lineage", trained.versions / "latest.safetensors")
    assert lineage.code() == 10
    assert "so it proves nothing" in lineage.stderr


def test_a_dropped_entry_is_found(trained: Federation, database: Tampering) -> None:
    database.do("DELETE FROM history WHERE sequence = 5")
    assert faults(trained)[0] == "entry 5 is missing"


def test_reordered_entries_are_found(trained: Federation, database: Tampering) -> None:
    for now, before in ((-1, 5), (5, 6), (6, -1)):
        database.do("UPDATE history SET sequence = ? WHERE sequence = ?", now, before)
    found = faults(trained)
    assert found[0].startswith("entry 5 is entry 6, moved here")
    assert found[1].startswith("entry 6 is entry 5, moved here")


def test_a_truncated_history_is_found_by_the_records_and_one_truncated_with_them_by_a_clients_heads(
    trained: Federation, database: Tampering
) -> None:
    ((last,),) = database.do("SELECT max(sequence) FROM history")
    ((third,), *_) = database.do("SELECT sequence FROM history WHERE facts LIKE '%\"round\":1,%' ORDER BY 1")
    database.do("DELETE FROM history WHERE sequence >= ?", third)
    assert any(f"the history was cut off (it ends at entry {third - 1})" in fault for fault in faults(trained))

    told = {json.loads(facts)["id"] for (facts,) in database.do("SELECT facts FROM history WHERE what = 'event'")}
    for (event,) in database.do("SELECT id FROM events"):
        if event not in told:
            database.do("DELETE FROM events WHERE id = ?", event)
    database.do("DELETE FROM rounds WHERE number >= 1")
    database.do("DELETE FROM assignments WHERE round >= 1")
    database.do("DELETE FROM versions WHERE number >= 3")
    whole = audited(trained, "verify")
    assert whole.code() == 0, whole.stdout  # nothing that is there contradicts anything that is there
    (fault,) = faults(trained, "--head", heads(trained, "alice"))
    assert fault.startswith(f"{heads(trained, 'alice')}: it was handed entry ")
    assert fault.endswith(f"and the history ends at entry {third - 1}: its end was cut off")
    assert last > third


def test_a_coordinator_and_its_clients_warn_of_a_history_that_was_cut(trained: Federation, database: Tampering) -> None:
    ((last,),) = database.do("SELECT max(sequence) FROM history")
    database.do("DELETE FROM history WHERE sequence > 4")
    coordinator = trained.coordinator(
        run={"rounds": ROUNDS, "schedule": {"interval_s": 3600}}, evaluation={"clients": False}, exit_when_done=False
    )
    alice = trained.client("alice")
    told = alice.saw("the coordinator's history is not what it was")
    assert "it was cut off or written anew, or restored from a backup" in told["reason"]
    coordinator.saw("history differs", client="alice")  # and keeps it then
    until(lambda: any(row["what"] == "history differs" for row in trained.rows("events")))
    events = [row for row in trained.rows("events") if row["what"] == "history differs"]
    assert [row["client"] for row in events] == ["alice"]
    assert "and the history ends at" in events[0]["told"]
    note = json.loads((trained.folder / "alice" / "client" / "status.json").read_text())
    assert note.get("history") == told["reason"], (note, alice.stderr)
    assert last > 4
    for process in (alice, coordinator):
        process.terminate()
        process.code()
