"""Processes that are told to end, killed, and started again."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

from choral.v1 import admin_pb2
from e2e.federation import GATED_TASK, Federation, Process

ENDLESS_TASK = """
import json, os, sys, time
from dataclasses import replace
import small


def loss(prediction, target):
    if "ENDLESS" in os.environ:
        print(json.dumps({"event": "in an endless batch"}), file=sys.stderr, flush=True)
        time.sleep(86_400)
    return small.task.loss(prediction, target)


task = replace(small.task, name="endless", loss=loss)
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_client_told_to_end_during_a_batch_ends_and_the_round_goes_on(federation: Federation) -> None:
    task = federation.write_task(ENDLESS_TASK, "endless")
    run = {"rounds": 2, "cohort_size": 2, "quorum": 1, "start_with": 2}
    coordinator = federation.coordinator(task=task, run=run, evaluation={"clients": False})
    alice = federation.client("alice", task=task, environment={"ENDLESS": 1})
    bob = federation.client("bob", task=task)
    alice.saw("in an endless batch")
    bob.saw("sent", round=0, verdict="accepted")  # the round now waits for alice alone
    alice.terminate()
    assert alice.code() == 0
    alice.saw("client ends", reason="it was told to")
    coordinator.saw("client left", client="alice")
    coordinator.saw("round done", round=0, accepted=1)
    assert (coordinator.code(), bob.code()) == (0, 0)
    coordinator.saw("run over", reason="2 rounds completed")
    assert "Traceback" not in alice.stderr + bob.stderr + coordinator.stderr


def test_a_client_told_to_end_before_it_was_ever_answered_ends(federation: Federation) -> None:
    federation.address = "127.0.0.1:1"
    alice = federation.client("alice")
    alice.saw("no link to the coordinator")
    alice.terminate()
    assert alice.code() == 0
    assert "Traceback" not in alice.stderr


def gated(federation: Federation, **run: object) -> tuple[Process, Process, Process]:
    """A coordinator and two clients that wait at the gate."""
    task = federation.write_task(GATED_TASK, "gated")
    coordinator = federation.coordinator(task=task, run=run, evaluation={"clients": False}, drain_s=60)
    gate = {"GATE": federation.folder / "gate"}
    alice, bob = (federation.client(name, task=task, environment=gate) for name in ("alice", "bob"))
    alice.saw("at the gate")
    bob.saw("at the gate")
    return coordinator, alice, bob


def test_a_coordinator_told_to_end_finishes_its_round_and_goes_on_when_started_again(federation: Federation) -> None:
    coordinator, alice, bob = gated(federation, rounds=3)
    watcher = federation.start("watch", "runs", "watch", "-c", federation.config)
    watcher.said('"client"')
    coordinator.terminate()
    coordinator.saw("draining")
    (federation.folder / "gate").touch()
    assert (coordinator.code(), watcher.code()) == (0, 0)
    coordinator.saw("round done", rounds="1/3", version=1)
    assert len(coordinator.events("round done")) == 1
    for client in (alice, bob):
        client.saw("sent away", reason="the coordinator restarts")
    assert '"ROUND_STATE_DONE"' in watcher.stdout
    drained = digest(federation.versions / "000001.safetensors")

    again = federation.coordinator(listen=federation.address, task="gated:task", evaluation={"clients": False})
    again.saw("round done", rounds="2/3", version=2)
    assert (again.code(), alice.code(), bob.code()) == (0, 0, 0)
    again.saw("run over", reason="3 rounds completed")
    assert digest(federation.versions / "000001.safetensors") == drained
    assert (federation.versions / "latest.safetensors").readlink() == Path("000003.safetensors")
    assert "Traceback" not in coordinator.stderr + again.stderr + alice.stderr + bob.stderr


def test_a_round_that_outlasts_the_drain_is_left_to_the_next_start(federation: Federation) -> None:
    task = federation.write_task(GATED_TASK, "gated")
    run = {"rounds": 3, "cohort_size": 1}
    changes = {"task": task, "run": run, "evaluation": {"clients": False}, "drain_s": 0.2}
    coordinator = federation.coordinator(**changes)
    alice = federation.client("alice", task=task, environment={"GATE": federation.folder / "gate"})
    alice.saw("at the gate")
    coordinator.terminate()
    assert coordinator.code() == 0
    coordinator.saw("round left to the next start")
    alice.saw("sent away", reason="the coordinator restarts")
    assert (federation.versions / "latest.safetensors").readlink() == Path("000000.safetensors")

    again = federation.coordinator(listen=federation.address, **changes)
    again.saw("round taken up", round=0)
    (federation.folder / "gate").touch()
    again.saw("round done", round=0, accepted=1)
    assert (again.code(), alice.code()) == (0, 0)
    assert len(alice.events("working", round=0)) == 1  # it was not trained twice


def test_a_coordinator_told_to_end_after_its_run_keeps_its_clients_for_the_next(federation: Federation) -> None:
    run = {"rounds": 1, "cohort_size": 1}
    coordinator = federation.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    alice = federation.client("alice")
    coordinator.saw("run over", state="finished")
    coordinator.terminate()
    assert coordinator.code() == 0
    alice.saw("sent away", reason="the coordinator restarts")
    federation.coordinator(listen=federation.address, run=run, evaluation={"clients": False}, exit_when_done=False)
    alice.saw("attending", count=2)


def test_a_coordinator_killed_between_rounds_goes_on_from_the_latest_version(federation: Federation) -> None:
    run = {"rounds": 3, "schedule": {"interval_s": 3600}}
    coordinator = federation.coordinator(run=run, evaluation={"clients": False})
    alice, bob = (federation.client(name) for name in ("alice", "bob"))
    coordinator.saw("round done", rounds="1/3", version=1)
    for change in federation.watch():
        if change.run.state == admin_pb2.RUN_STATE_WAITING:
            break
    os.kill(coordinator.popen.pid, signal.SIGKILL)
    assert coordinator.code() == -signal.SIGKILL
    before = federation.latest
    for client in (alice, bob):
        client.saw("no link to the coordinator")

    again = federation.coordinator(listen=federation.address, evaluation={"clients": False})
    again.saw("round done", rounds="2/3", version=2)
    assert (again.code(), alice.code(), bob.code()) == (0, 0, 0)
    assert (federation.versions / "000001.safetensors").read_bytes() == before
    assert (federation.versions / "latest.safetensors").readlink() == Path("000003.safetensors")


def test_a_coordinator_killed_during_a_round_repeats_it(federation: Federation) -> None:
    coordinator, alice, bob = gated(federation, rounds=2)
    os.kill(coordinator.popen.pid, signal.SIGKILL)
    assert coordinator.code() == -signal.SIGKILL
    for client in (alice, bob):
        client.saw("no link to the coordinator")
    (federation.folder / "gate").touch()

    again = federation.coordinator(listen=federation.address, task="gated:task", run={"rounds": 2}, evaluation={"clients": False})
    again.saw("round done", rounds="1/2", version=1)
    assert (again.code(), alice.code(), bob.code()) == (0, 0, 0)
    assert (federation.versions / "latest.safetensors").readlink() == Path("000002.safetensors")


def test_clients_whose_work_is_withdrawn_again_and_again_stay_to_the_end(federation: Federation) -> None:
    """Three are asked and the first answer closes the round, so that two hear of their work and of its end at once."""
    run = {"rounds": 40, "cohort_size": 1, "over_selection": 2.0, "start_with": 3}
    coordinator = federation.coordinator(run=run, evaluation={"clients": False})
    clients = [federation.client(name) for name in ("alice", "bob", "carol")]
    coordinator.saw("run over", reason="40 rounds completed")
    for process in (coordinator, *clients):
        assert process.code() == 0
    for client in clients:
        client.saw("the run is over", reason="40 rounds completed")
        assert client.events("no link to the coordinator") == []
