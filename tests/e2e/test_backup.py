"""A backup of a run that is under way, and the run going on from it elsewhere with the same bits; and what gives none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e import exact
from e2e.federation import Federation, Process
from e2e.zygote import Zygote
from server.databases import Postgres

ROUNDS = 30
LAST_LINE = "not in it: certificates, their keys and the configuration – copy the folder of {} yourself, without the state folder\n"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Any]:
    """What comes out when nothing happens."""
    return exact.undisturbed(tmp_path_factory.mktemp("calm"), zygote, ROUNDS)


def move_to(federation: Federation, database: str | None) -> None:
    """Another database in the configuration."""
    content = yaml.safe_load(federation.config.read_text()) | {"database": database}
    federation.config.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("when", ["while rounds go by", "within a round", "within the round before"])
@pytest.mark.parametrize(("before", "after"), [("sqlite", "postgresql"), ("postgresql", "sqlite")])
def test_a_run_goes_on_from_a_backup(
    when: str, before: str, after: str, quick: Federation, postgres: Postgres, calm: dict[str, Any]
) -> None:
    databases = {"sqlite": None, "postgresql": postgres.new_database()}
    exact.configure(quick, ROUNDS, database=databases[before])
    exact.pace(quick)
    gate, file, enough = quick.folder / "gate", quick.folder / "backup.tar", exact.BATCHES * ROUNDS // 2
    gate.write_text(str(enough))
    doomed, alice, bob = quick.start_coordinator(), exact.start_client(quick, "alice", gate=gate), exact.start_client(quick, "bob")
    doomed.saw("round done", round=3)
    if when != "while rounds go by":
        alice.saw("at the gate")
    backup = quick.command("backup", "-c", quick.config, file)
    assert backup.code() == 0, backup.stderr
    assert backup.out[-1] == LAST_LINE.format(quick.config)

    alice.saw("at the gate")  # the run was not over, and went on after the backup if it could
    if when == "within the round before":
        number = alice.events("working")[-1]["round"]
        gate.write_text(str(enough + exact.BATCHES))
        alice.saw("at the gate", 2)
        assert alice.events("working")[-1]["round"] == number + 1
    doomed.kill()
    shutil.rmtree(quick.folder / "state")
    gate.unlink()
    alice.saw("upload failed")  # she has a result that must not count any more: what it began from may come to be only later

    move_to(quick, databases[after])
    restored = quick.command("restore", "-c", quick.config, file)
    assert restored.code() == 0, restored.stderr
    if when != "while rounds go by":
        assert "was under way and is abandoned\n" in restored.out[0]
    again = quick.start_coordinator()
    assert [process.code() for process in (again, alice, bob)] == [0, 0, 0]
    assert exact.outcome(quick) == calm
    assert not alice.events("sent", verdict="duplicate")
    for process in (doomed, backup, restored, again, alice, bob):
        assert "Traceback" not in process.stderr


def ends_with(process: Process, *words: str) -> None:
    """It ends with code 2 and one message, which holds these words."""
    assert process.code() == 2, process.stderr
    (message,) = process.err
    assert message.startswith("choral: ")
    for word in words:
        assert word in message


def everything(folder: Path) -> dict[str, bytes]:
    """All files and what is in them, but for those that SQLite makes for itself."""
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix not in (".db-wal", ".db-shm")
    }


def test_wrong_inputs(quick: Federation) -> None:
    quick.configure(run={"rounds": 1, "start_with": 99})
    file, config = quick.folder / "backup.tar", ("-c", quick.config)
    ends_with(quick.command("backup", *config, file), "choral.db does not exist: give the configuration of a coordinator")
    ends_with(quick.command("backup", "-c", quick.folder / "other.yaml", file), "other.yaml")
    assert not (quick.folder / "state").exists()

    coordinator = quick.start_coordinator()
    coordinator.saw("coordinator ready")
    ends_with(quick.command("backup", *config, quick.folder / "nowhere" / "file"), "nowhere does not exist: make that folder")
    told = quick.command("backup", *config, "--json", file)
    assert told.code() == 0, told.stderr
    found = json.loads(told.stdout)
    assert found.items() >= {"file": str(file), "runs": 1, "versions": 1, "bytes": file.stat().st_size, "notes": []}.items()
    assert found["not_in_it"] == LAST_LINE.format(quick.config).strip()

    before = everything(quick.folder)
    ends_with(quick.command("restore", *config, file), f"state: {quick.folder / 'state'} is in use by a coordinator: stop it")
    assert quick.command("server", "health", *config).code() == 0
    assert everything(quick.folder) == before
    coordinator.terminate()
    assert coordinator.code() == 0

    before = everything(quick.folder)
    ends_with(quick.command("restore", *config, file), "is not empty (it holds 1 runs), and a backup overwrites nothing")
    ends_with(quick.command("restore", *config, quick.config), "choral.yaml is no backup")
    ends_with(quick.command("restore", *config, quick.folder / "missing"), "missing cannot be read (No such file or directory)")
    cut = quick.folder / "cut.tar"
    cut.write_bytes(file.read_bytes()[:5000])
    ends_with(quick.command("restore", *config, cut), "cut.tar is damaged", "give an earlier backup")
    cut.unlink()
    assert everything(quick.folder) == before

    shutil.rmtree(quick.folder / "state")
    restored = quick.command("restore", *config, file)
    assert (restored.code(), restored.err) == (0, [])
    assert restored.out[0].startswith("restored: runs: 1, versions: 1, bytes: ")
    assert restored.out[-1] == LAST_LINE.format(quick.config)
