"""`choral doctor`: each thing that can be in the way of a run is named, with what to do about it."""

from __future__ import annotations

from typing import Any

import pytest
from e2e.federation import GATED_TASK, Federation
from e2e.scripted import Scripted, delta, hello
from e2e.test_troubles import doctor
from pieces import pieces


def found(federation: Federation, subject: str, code: int) -> tuple[bool, str, str]:
    """What is said of one subject: whether it is as it should be, what was found, and the cure."""
    (row,) = [row for row in doctor(federation, code) if row["subject"] == subject]
    return row["good"], row["found"], row["cure"]


def test_no_coordinator(quick: Federation) -> None:
    quick.configure()
    findings: list[dict[str, Any]] = doctor(quick, 1)
    assert [(row["subject"], row["good"]) for row in findings] == [
        ("coordinator", False),
        ("task", True),
        ("state", True),
        ("database", True),
        ("artifacts", True),
    ]
    assert (findings[0]["cure"], findings[3]["found"]) == ("start `choral server`", "will be made in the state folder")
    quick.configure(database="postgresql://choral@127.0.0.1:1/none", task="missing:task")
    good, why, cure = found(quick, "database", 1)
    assert (good, cure) == (False, "mend that, then start `choral server`")
    assert why.startswith("database: postgresql://choral@127.0.0.1:1/none cannot be used (")
    assert "missing" in found(quick, "task", 1)[1]
    assert not (quick.folder / "state").exists()


def test_who_is_missing_and_when_the_next_round_comes(quick: Federation) -> None:
    coordinator = quick.coordinator(run={"rounds": 3, "schedule": {"interval_s": 3600}}, exit_when_done=False)
    assert found(quick, "clients", 1) == (
        False,
        "0 eligible clients attend, 2 are needed to open a round",
        "start 2 more",
    )
    quick.client("alice")
    bob = quick.client("bob")
    coordinator.saw("round done", round=0)
    good, why, _ = found(quick, "schedule", 0)
    assert good
    assert why.startswith("the schedule opens the next round later: at 20")

    assert quick.command("runs", "pause", "-c", quick.config).code() == 0
    assert found(quick, "run", 1) == (False, "run run: 1 of 3 rounds done; paused by an operator", "`choral runs resume`")
    assert quick.command("runs", "resume", "-c", quick.config).code() == 0

    bob.kill()
    coordinator.saw("client left", client="bob")
    assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
    good, why, cure = found(quick, "clients", 1)
    assert (good, cure) == (False, "start 1 more")
    assert why == "1 eligible clients attend, 2 are needed to open a round; known but away: bob"
    quick.client("bob")
    coordinator.saw("round done", round=1)


def test_who_keeps_a_round_waiting(quick: Federation) -> None:
    task = quick.write_task(GATED_TASK, "gated")
    quick.coordinator(task=task, run={"rounds": 1, "quorum": 2})
    alice = quick.client("alice", task=task)
    quick.client("bob", task=task, environment={"GATE": quick.folder / "gate"}).saw("at the gate")
    alice.saw("sent", verdict="accepted")
    good, why, _ = found(quick, "round", 0)
    assert good
    assert why == "round 0: 1 results of 2, 2 are the least; still out: bob working"


def test_who_is_quarantined_and_why(quick: Federation) -> None:
    coordinator = quick.coordinator(run={"rounds": 1, "cohort_size": 1, "retry_s": 0, "quarantine_after": 2})
    bad = delta(1, float("nan"), 3)
    with Scripted(quick, hello("mallory")) as mallory:
        for number in range(2):
            answer = mallory.upload(mallory.header(mallory.hear("assignment").id), pieces(bad))
            assert "infinite or undefined number" in answer.reason
            coordinator.saw("round abandoned", round=number)
        why = (
            "2 results in a row were refused, the last because the update of mallory holds an infinite or undefined number: "
            "lower the learning rate, or look at its data"
        )
        assert found(quick, "quarantine", 1) == (False, f"mallory: {why}", "look at it, then `choral clients release mallory`")
        assert found(quick, "clients", 1)[2] == "start 1 more, or `choral clients release` one of mallory"
        (row,) = quick.rows("clients", "list")
        assert (row["quarantine"], row["refused"], row["attending"]) == (why, "2", True)
        (part,) = quick.rows("rounds", "show", 1)
        assert (part["client"], part["state"], part["reason"]) == ("mallory", "refused", why.partition("because ")[2])
        events = [(row["what"], row["client"]) for row in quick.rows("events", "--client", "mallory")]
        assert events[:3] == [("client quarantined", "mallory"), *[("result refused", "mallory")] * 2]
        coordinator.saw("upload refused", 2, client="mallory")

        unknown = quick.command("clients", "release", "nobody", "-c", quick.config)
        assert (unknown.code(), unknown.stderr) == (2, "choral: client 'nobody' is unknown; there are mallory\n")
        released = quick.command("clients", "release", "mallory", "-c", quick.config)
        assert (released.code(), released.stdout) == (0, "client mallory: released\n")
        assert mallory.upload(mallory.header(mallory.hear("assignment").id)).reason == ""
    assert coordinator.code() == 0


def test_an_operator_quarantines_a_client_and_its_owner_is_told(quick: Federation) -> None:
    run = {"rounds": 2, "cohort_size": 1, "schedule": {"interval_s": 3600}}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    with Scripted(quick, hello("alice")) as alice:
        alice.upload(alice.header(alice.hear("assignment").id))
    coordinator.saw("client left", client="alice")
    assert quick.command("clients", "quarantine", "alice", "--reason", "stolen", "-c", quick.config).code() == 0
    with Scripted(quick, hello("alice")) as alice:
        told = "this client is quarantined: stolen; the coordinator's operator can release it"
        assert alice.hear("welcome").notice == told
        assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
        assert found(quick, "clients", 1)[0] is False
        coordinator.kill()
        quick.configure(run=run, evaluation={"clients": False}, exit_when_done=False)
    again = quick.coordinator(run=run, evaluation={"clients": False}, exit_when_done=False)
    assert quick.rows("clients", "list")[0]["quarantine"] == "stolen"  # also after a restart
    assert not again.events("round done")


@pytest.mark.parametrize("when", ["between rounds", "in a round"])
def test_a_rollback_while_the_run_is_live(quick: Federation, when: str) -> None:
    task = quick.write_task(GATED_TASK, "gated")
    strategy = {"name": "fedavgm", "momentum": 0.5}
    run = {"rounds": 5, "schedule": {"interval_s": 3600}, "strategy": strategy}
    coordinator = quick.coordinator(task=task, run=run, evaluation={"clients": False}, exit_when_done=False)
    gate = quick.folder / "gate"
    gate.touch()
    shards = {"alice": quick.write_shard("alice", [(1, 2, 3)]), "bob": quick.write_shard("bob", [(2, 1, 3)])}  # shuffled alike
    alice, bob = (quick.client(name, shard, task, environment={"GATE": gate}) for name, shard in shards.items())
    coordinator.saw("round done", round=0)
    for number in (1, 2):
        assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
        coordinator.saw("round done", round=number)
    if when == "in a round":
        gate.unlink()
        assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
        alice.saw("at the gate")
        bob.saw("at the gate")

    back = quick.command("versions", "rollback", 1, "-c", quick.config)
    assert back.code() == 0, back.stderr
    assert back.out[-1] == "going back to version 1; `choral versions list` shows the new version that has its weights\n"
    coordinator.saw("rolled back", to=1, version=4)
    gate.touch()
    old, new = (quick.versions / f"{number:06d}.safetensors" for number in (1, 4))
    assert tensors(old) == tensors(new)
    assert tensors(old.with_suffix(".optimizer.safetensors")) == tensors(new.with_suffix(".optimizer.safetensors"))
    assert (quick.versions / "latest.safetensors").readlink().name == new.name
    if when == "in a round":
        assert coordinator.saw("round abandoned", round=3)["reason"] == "an operator went back to version 1"
    assert quick.rows("events", "--run", "run")[0]["what"] == "rolled back"

    assert quick.command("rounds", "trigger", "-c", quick.config).code() == 0
    coordinator.saw("round done", version=5)  # from the model of version 1, with its momentum
    assert tensors(quick.versions / "000005.safetensors") == tensors(quick.versions / "000002.safetensors")
    unknown = quick.command("versions", "rollback", 99, "-c", quick.config)
    assert unknown.code() != 0
    assert unknown.stderr == "choral: run run has no version 99: `choral versions list` shows those there are\n"


def tensors(path: Any) -> bytes:
    """A safetensors file behind its header, which says which version it is."""
    content: bytes = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]
