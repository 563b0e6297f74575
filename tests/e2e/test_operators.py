"""What operators see and do, through the command, with a coordinator whose schedule opens no round by itself."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from e2e.federation import Federation, Process


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator that has done its first round and opens the next in an hour; one test here steers it, the others look."""
    with Federation(tmp_path_factory.mktemp("f")) as started:
        coordinator = started.coordinator(run={"rounds": 100, "schedule": {"interval_s": 3600}}, exit_when_done=False)
        for name in ("alice", "bob"):
            started.client(name, flags={"--holdout": 0.5})
        coordinator.saw("round done", round=0, accepted=2)
        yield started


def steer(federation: Federation, *words: object) -> Process:
    return federation.command(*words, "-c", federation.config)


def test_an_operator_steers_a_run(federation: Federation) -> None:
    coordinator = federation.processes[0]
    watcher = federation.start("watch", "runs", "watch", "-c", federation.config)
    watcher.said('"client"')

    assert steer(federation, "runs", "pause").code() == 0
    watcher.said("RUN_STATE_PAUSED")
    refused = steer(federation, "rounds", "trigger")
    assert (refused.code(), refused.stderr) == (8, "choral: run run is paused; resume it first\n")
    assert steer(federation, "runs", "resume").code() == 0
    nothing = steer(federation, "runs", "resume")
    assert (nothing.code(), nothing.stderr) == (8, "choral: run run is neither paused nor failed; there is nothing to resume\n")

    assert steer(federation, "rounds", "trigger").code() == 0
    coordinator.saw("round done", round=1, accepted=2)

    early = steer(federation, "runs", "start")
    assert early.code() == 8
    assert early.stderr.startswith("choral: run run is ")
    assert early.stderr.endswith("; stop it before starting another\n")
    stopped = steer(federation, "runs", "stop")
    assert (stopped.code(), stopped.stdout) == (0, "run run: stopped (stopped by an operator)\n")
    late = steer(federation, "runs", "pause")
    assert (late.code(), late.stderr) == (8, "choral: run run is stopped and cannot be paused; start another\n")

    started = steer(federation, "runs", "start", "--rounds", 1, "--from-latest")
    assert (started.code(), started.stdout.split()[:2]) == (0, ["run", "run-2:"])
    coordinator.saw("run over", run="run-2", state="finished", reason="1 rounds completed")
    runs = {row["name"]: (row["state"], row["rounds_done"]) for row in federation.rows("runs", "list")}
    assert runs == {"run": ("RUN_STATE_STOPPED", "2"), "run-2": ("RUN_STATE_FINISHED", "1")}
    first = federation.versions.parent.parent / "run-2" / "versions" / "000000.safetensors"
    assert tensors(first.read_bytes()) == tensors(federation.latest)

    noted = [row["what"] for name in ("run", "run-2") for row in reversed(federation.rows("events", "--run", name))]
    assert noted == ["run paused", "run resumed", "round asked for", "run stopped", "run started"]

    watcher.said("RUN_STATE_FINISHED")
    watcher.popen.send_signal(signal.SIGINT)
    assert watcher.code() == 130
    assert "Traceback" not in watcher.stderr
    changes = [json.loads(line) for line in watcher.out]
    assert any(change.get("round", {}).items() >= {"number": "1", "state": "ROUND_STATE_DONE"}.items() for change in changes)
    assert any(change.get("version", {}).get("version", {}).get("number") == "2" for change in changes)


def tensors(checkpoint: bytes) -> bytes:
    """A safetensors file behind its header."""
    return checkpoint[8 + int.from_bytes(checkpoint[:8], "little") :]


def test_an_operator_sees_clients_rounds_and_versions(federation: Federation) -> None:
    clients = {row["name"]: row for row in federation.rows("clients", "list")}
    assert sorted(clients) == ["alice", "bob"]
    for row in clients.values():
        assert row["attending"] is True
        assert row["examples"] == "2"
        assert int(row["accepted"]) >= 1
        assert row["address"].startswith("ipv4:127.0.0.1:")
    shown = federation.rows("rounds", "show", 0, "--run", "run")
    assert [(part["client"], part["state"]) for part in shown] == [("alice", "accepted"), ("bob", "accepted")]
    versions = {int(row["version"]["number"]): row for row in federation.rows("versions", "list", "--run", "run")}
    assert set(versions) >= {0, 1}
    assert int(versions[1]["version"]["size_bytes"]) == (federation.versions / "000001.safetensors").stat().st_size
    rounds = {int(row["number"]): row["state"] for row in federation.rows("rounds", "list", "--run", "run")}
    assert rounds[0] == "ROUND_STATE_DONE"


def test_tables_are_for_people(federation: Federation) -> None:
    table = steer(federation, "clients", "list")
    assert table.code() == 0
    assert "alice" in table.stdout
    healthy = steer(federation, "server", "health")
    assert (healthy.code(), healthy.stdout) == (0, "serving\n")


def test_what_is_unknown_is_named(federation: Federation) -> None:
    number = steer(federation, "rounds", "show", 99, "--run", "run")
    assert (number.code(), number.stderr) == (2, "choral: round 99 is unknown; `choral rounds list` shows those there are\n")
    for command in (("rounds", "show", 2**63), ("rounds", "list", "--limit", 2**31), ("versions", "rollback", 2**63)):
        refused = steer(federation, *command)
        assert refused.code() == 2
        assert "Invalid value for" in refused.stderr
    for listing in (("versions", "list"), ("rounds", "list"), ("events",)):
        run = steer(federation, *listing, "--run", "other")
        assert run.code() == 2
        assert run.stderr.startswith("choral: run 'other' is unknown; there are run")
