"""Where torch is: not in the coordinator."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from e2e.federation import Federation, Process, until


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def has_torch(process: int) -> bool:
    return "libtorch" in Path(f"/proc/{process}/maps").read_text()


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def runs_a_round(federation: Federation) -> list[Process]:
    return [federation.client("alice"), federation.client("bob")]


def test_without_a_test_set_there_is_no_torch_at_all(federation: Federation) -> None:
    coordinator = federation.coordinator(run={"rounds": 1})
    process = coordinator.popen.pid
    assert not has_torch(process)
    until(lambda: not [child for child in children(process) if not ended(child)])
    clients = runs_a_round(federation)
    coordinator.saw("round done", kind="training")
    assert not has_torch(process)
    assert [one.code() for one in (coordinator, *clients)] == [0, 0, 0]


def test_a_test_set_is_measured_beside_it_and_again_after_a_crash(federation: Federation) -> None:
    federation.write_shard("test")
    coordinator = federation.coordinator(evaluation={"test_set": "test/shard.csv"}, run={"rounds": 2, "start_with": 2})
    process = coordinator.popen.pid
    (child,) = children(process)
    assert has_torch(child)
    os.kill(child, signal.SIGTERM)  # as whoever ends all processes of a service does: the coordinator says when it is over
    os.kill(child, signal.SIGKILL)
    clients = runs_a_round(federation)
    coordinator.saw("measured", version=1)
    assert not has_torch(process)
    assert [one.code() for one in (coordinator, *clients)] == [0, 0, 0]
    assert len(coordinator.events("measured")) == 2


def test_it_ends_with_a_coordinator_that_is_killed(federation: Federation) -> None:
    federation.write_shard("test")
    coordinator = federation.coordinator(evaluation={"test_set": "test/shard.csv"})
    (child,) = children(coordinator.popen.pid)
    coordinator.kill()
    until(lambda: ended(child))
