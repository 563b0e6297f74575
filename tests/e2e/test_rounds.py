"""Runs that end otherwise than by completing their rounds, and clients that cannot do their part."""

from __future__ import annotations

from e2e.federation import GATED_TASK, Federation

RAISING_TASK = """
import os
from dataclasses import replace
import small


def loss(prediction, target):
    if "RAISE" in os.environ:
        raise KeyError("a mistake in the loss")
    return small.task.loss(prediction, target)


task = replace(small.task, name="raising", loss=loss)
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


def test_clients_that_cannot_do_their_part_decline_and_the_round_goes_on(federation: Federation) -> None:
    task = federation.write_task(RAISING_TASK, "raising")
    run = {"rounds": 2, "cohort_size": 3, "quorum": 1, "start_with": 3}
    coordinator = federation.coordinator(task=task, run=run, evaluation={"clients": False}, exit_when_done=False)
    federation.client("alice", task=task)
    bob = federation.client("bob", task=task, environment={"RAISE": 1})
    carol = federation.client("carol", federation.write_shard("carol", [(1e30, 1e30, 1e30), (-1e30, 1e30, 1e30)]), task)

    raised = "task raising: training raised KeyError: 'a mistake in the loss'"
    bob.saw("declined", round=0, reason=raised)
    no_number = carol.saw("declined", round=0)["reason"]
    assert no_number.startswith("the loss is ")
    assert no_number.endswith(" in epoch 1 of 1: lower the learning rate (0.01), or look at this client's data")
    coordinator.saw("client declines", client="bob", reason=raised)
    coordinator.saw("client declines", client="carol", reason=no_number)

    coordinator.saw("run over", reason="2 rounds completed")
    parts = {part["client"]: (part["state"], part["reason"]) for part in federation.rows("rounds", "show", 1)}
    assert parts == {"alice": ("accepted", ""), "bob": ("declined", raised), "carol": ("declined", no_number)}
    assert [row["attending"] for row in federation.rows("clients", "list")] == [True, True, True]
    assert "Traceback" not in bob.stderr + carol.stderr + coordinator.stderr
