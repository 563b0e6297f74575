"""Runs that end otherwise than by completing their rounds, and clients that cannot do their part."""

from __future__ import annotations

import json

from e2e.federation import GATED_TASK, Federation

RAISING_TASK = """
import os
from choral import Table, Task, Training
from torch import nn
from torch.nn.functional import mse_loss


def loss(prediction, target):
    if "RAISE" in os.environ:
        raise KeyError("a mistake in the loss")
    return mse_loss(prediction, target)


task = Task("raising", lambda: nn.Linear(2, 1), loss, Table(["a", "b"], target="y"))
"""


def test_a_run_that_gets_no_better_stops_early_and_says_so(federation: Federation) -> None:
    federation.write_shard("test")
    run = {"rounds": 50, "cohort_size": 1, "training": {"epochs": 0}, "objective": {"patience_rounds": 2}}
    evaluation = {"test_set": "test/shard.csv", "clients": False}
    coordinator = federation.coordinator(run=run, evaluation=evaluation)
    alice = federation.client("alice")
    over = coordinator.saw("run over", state="finished")
    assert over["reason"] == "stopped early after 3 rounds: loss has not improved on version 1"
    assert (coordinator.code(), alice.code()) == (0, 0)
    alice.saw("the run is over", reason=over["reason"])
    assert (federation.versions / "best.safetensors").readlink().name == "000001.safetensors"


def test_rounds_without_a_quorum_are_abandoned_with_the_reason_until_the_run_fails(federation: Federation) -> None:
    task = federation.write_task(GATED_TASK, "gated")
    run = {"rounds": 3, "deadline_s": 3, "retry_s": 0, "max_abandoned": 2}
    coordinator = federation.coordinator(task=task, run=run, evaluation={"clients": False})
    federation.client("alice", task=task)
    federation.client("bob", task=task, environment={"GATE": federation.folder / "never"})
    for number in (0, 1):
        abandoned = coordinator.saw("round abandoned", round=number, accepted=1)
        missed = "the deadline of 3 s passed: quorum of 2 missed with 1 accepted: bob working"
        assert abandoned["reason"] == missed
    over = coordinator.saw("run over", state="failed")
    assert over["reason"] == f"2 rounds in a row were abandoned, the last because {missed}; mend that, then resume"
    assert coordinator.code() == 1
    assert (federation.versions / "latest.safetensors").readlink().name == "000000.safetensors"


def test_a_client_whose_loss_raises_declines_and_the_round_goes_on(federation: Federation) -> None:
    task = federation.write_task(RAISING_TASK, "raising")
    run = {"rounds": 2, "quorum": 1, "start_with": 2}
    coordinator = federation.coordinator(task=task, run=run, evaluation={"clients": False})
    alice = federation.client("alice", task=task)
    bob = federation.client("bob", task=task, environment={"RAISE": 1})
    reason = "task raising: training raised KeyError: 'a mistake in the loss'"
    bob.saw("declined", round=0, reason=reason)
    coordinator.saw("client declines", client="bob", assignment="run/0/bob", reason=reason)
    assert (coordinator.code(), alice.code(), bob.code()) == (0, 0, 0)
    assert [entry["accepted"] for entry in coordinator.events("round done")] == [1, 1]
    assert "Traceback" not in bob.stderr


def test_a_client_whose_loss_is_no_number_declines_with_the_reason_and_the_round_goes_on(federation: Federation) -> None:
    run = {"rounds": 2, "quorum": 1, "start_with": 2}
    coordinator = federation.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    federation.client("alice")
    bob = federation.client("bob", federation.write_shard("bob", [(1e30, 1e30, 1e30), (-1e30, 1e30, 1e30)]))
    reason = bob.saw("declined", round=0)["reason"]
    assert reason.startswith("the loss is ")
    assert reason.endswith(" in epoch 1 of 1: lower the learning rate (0.01), or look at this client's data")
    coordinator.saw("client declines", client="bob", reason=reason)
    coordinator.saw("run over", reason="2 rounds completed")
    parts = {part["client"]: part for part in federation.rows("rounds", "show", 1)}
    assert (parts["alice"]["state"], parts["bob"]["state"]) == ("accepted", "declined")
    assert parts["bob"]["reason"] == reason
    assert json.loads(json.dumps(federation.rows("clients", "list")))[1]["attending"] is True
