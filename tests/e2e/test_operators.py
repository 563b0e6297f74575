"""What operators see and do, through the command, with a coordinator whose schedule opens no round by itself."""

from __future__ import annotations

import json
import signal

import pytest
from e2e.federation import Federation, Process


@pytest.fixture
def coordinator(federation: Federation) -> Process:
    """A coordinator that has done its first round and opens the next in an hour."""
    process = federation.coordinator(run={"rounds": 100, "schedule": {"interval_s": 3600}}, exit_when_done=False)
    for name in ("alice", "bob"):
        federation.client(name, flags={"--holdout": 0.5})
    process.saw("round done", round=0, accepted=2)
    return process


def steer(federation: Federation, *words: object) -> Process:
    return federation.command(*words, "-c", federation.config)


def test_an_operator_steers_a_run(federation: Federation, coordinator: Process) -> None:
    paused = steer(federation, "runs", "pause")
    assert (paused.code(), paused.stdout.split()[:3]) == (0, ["run", "run:", "waiting"])
    refused = steer(federation, "rounds", "trigger")
    assert (refused.code(), refused.stderr) == (8, "choral: run run is paused; resume it first\n")
    assert steer(federation, "runs", "resume").code() == 0
    nothing = steer(federation, "runs", "resume")
    assert (nothing.code(), nothing.stderr) == (8, "choral: run run is neither paused nor failed; there is nothing to resume\n")

    assert steer(federation, "rounds", "trigger").code() == 0
    coordinator.saw("round done", round=1, accepted=2)
    assert [row["number"] for row in federation.rows("rounds", "list")] == ["1", "0"]

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
    runs = {row["name"]: row for row in federation.rows("runs", "list")}
    assert {name: (row["state"], row["rounds_done"]) for name, row in runs.items()} == {
        "run": ("RUN_STATE_STOPPED", "2"),
        "run-2": ("RUN_STATE_FINISHED", "1"),
    }
    first = federation.versions.parent.parent / "run-2" / "versions" / "000000.safetensors"
    assert tensors(first.read_bytes()) == tensors(federation.latest)


def tensors(checkpoint: bytes) -> bytes:
    """A safetensors file behind its header."""
    return checkpoint[8 + int.from_bytes(checkpoint[:8], "little") :]


def test_an_operator_sees_clients_rounds_and_versions(federation: Federation, coordinator: Process) -> None:
    clients = {row["name"]: row for row in federation.rows("clients", "list")}
    assert sorted(clients) == ["alice", "bob"]
    for row in clients.values():
        assert row["attending"] is True
        assert (row["examples"], row["accepted"]) == ("2", "1")
        assert row["address"].startswith("ipv4:127.0.0.1:")
    shown = federation.rows("rounds", "show", 0)
    assert [(part["client"], part["state"]) for part in shown] == [("alice", "accepted"), ("bob", "accepted")]
    versions = federation.rows("versions", "list")
    assert [int(row["version"]["number"]) for row in versions] == [1, 0]
    assert int(versions[0]["version"]["size_bytes"]) == len(federation.latest)

    table = steer(federation, "clients", "list")
    assert table.code() == 0
    assert "alice" in table.stdout
    unknown = steer(federation, "rounds", "show", 99)
    assert (unknown.code(), unknown.stderr) == (2, "choral: round 99 is unknown; `choral rounds list` shows those that are kept\n")
    unknown = steer(federation, "versions", "list", "--run", "other")
    assert (unknown.code(), unknown.stderr) == (2, "choral: run 'other' is unknown; there are run\n")
    healthy = steer(federation, "server", "health")
    assert (healthy.code(), healthy.stdout) == (0, "serving\n")


def test_an_operator_watches_until_the_coordinator_ends(federation: Federation, coordinator: Process) -> None:
    impatient = federation.start("watch", "runs", "watch", "-c", federation.config)
    watcher = federation.start("watch", "runs", "watch", "-c", federation.config)
    for process in (impatient, watcher):
        process.said('"client"')
    impatient.popen.send_signal(signal.SIGINT)
    assert impatient.code() == 130
    assert steer(federation, "rounds", "trigger").code() == 0
    coordinator.saw("round done", round=1)
    coordinator.terminate()
    assert coordinator.code() == 0
    assert watcher.code() == 0
    changes = [json.loads(line) for line in watcher.out]
    done = [change["round"] for change in changes if change.get("round", {}).get("state") == "ROUND_STATE_DONE"]
    assert {round["number"] for round in done} == {"1"}
    assert [change["version"]["version"]["number"] for change in changes if "version" in change][-1] == "2"
    assert "Traceback" not in impatient.stderr + watcher.stderr

    gone = steer(federation, "runs", "list")
    assert gone.code() == 7
    assert gone.stderr.startswith("choral: no coordinator runs with this configuration: ")
    assert steer(federation, "server", "health").code() == 7
