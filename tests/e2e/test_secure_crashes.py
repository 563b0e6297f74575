"""`kill -9` in the middle of a secure sum, of the coordinator and of clients: the next sum is right, and nobody reveals twice."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterable

import numpy as np
import pytest
from choral.v1 import federation_pb2 as pb
from choral_server import failpoints
from e2e.federation import PATIENCE_S
from e2e.liar import Lie, Told
from e2e.secure_stage import NAMES, Model, Stage, slope

*REST, DAVE = NAMES
TOLD = ("sum_roster", "sum_shares", "sum_survivors", "sum_signatures")
SAID = ("sum_advert", "sum_shares", "sum_signature", "sum_revealed")


class Cut(Lie):
    """Of this kind, nothing arrives any more that `clients` are told, or say."""

    def __init__(self, told: str = "", said: str = "", clients: Iterable[str] = NAMES) -> None:
        super().__init__()
        self._told, self._said, self._clients = told, said, set(clients)
        self._left = set(clients)
        self._there = threading.Event()

    def told(self, client: str, message: pb.AttendResponse) -> Iterable[Told]:
        return () if self._cuts(client, message.WhichOneof("message") == self._told) else (message,)

    def said(self, client: str, message: pb.AttendRequest) -> Iterable[pb.AttendRequest]:
        return () if self._cuts(client, message.WhichOneof("message") == self._said) else (message,)

    def wait(self) -> None:
        """Until it was to arrive from all of them, or at all."""
        assert self._there.wait(PATIENCE_S)

    def _cuts(self, client: str, is_it: bool) -> bool:
        if not is_it or client not in self._clients:
            return False
        self._left.discard(client)
        if not self._left:
            self._there.set()
        return True


def spent(stage: Stage) -> dict[str, int]:
    """The newest round that each client has revealed."""
    files = {name: stage.federation.folder / name / "client" / "spent.json" for name in NAMES}
    return {name: max(json.loads(path.read_bytes()).values()) for name, path in files.items()}


def nobody_reveals_twice(stage: Stage) -> None:
    """In any round of the whole test."""
    told = [(client, said.assignment) for client, said in stage.liar.heard("sum_revealed")]
    assert len(told) == len(set(told))
    for process in stage.federation.processes:
        done = [one["round"] for one in process.events("secure sum done")]
        assert done == sorted(set(done))


def changed(before: Model, after: Model, rounds: int) -> None:
    """By so many rounds, with everybody's update in each."""
    mean = rounds * np.mean([slope(name) for name in NAMES], axis=0)
    for name, by in (("weight", mean[:2]), ("bias", mean[2:])):
        np.testing.assert_allclose(after[name].ravel() - before[name].ravel(), by, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("way", "kind"), [*(("told", kind) for kind in TOLD), *(("said", kind) for kind in SAID)])
def test_the_coordinator_is_killed_between_two_steps(stage: Stage, way: str, kind: str) -> None:
    number, before, revealed = stage.next, stage.model(), spent(stage)
    cut = Cut(**{way: kind})
    stage.liar.lies(cut, number)
    stage.ask()
    cut.wait()
    stage.coordinator.kill()
    stage.restart()
    ended = stage.over(number)
    assert ended["event"] == "round abandoned"
    assert "of a secure sum nothing is kept: the round is done anew, with other keys" in ended["reason"]
    assert ended["reason"] in stage.event("round abandoned", number=number)
    changed(before, stage.model(), 0)
    meanwhile = spent(stage)
    assert meanwhile == (dict.fromkeys(NAMES, number) if kind == "sum_revealed" else revealed)
    stage.ask()
    again = stage.played(number + 1, before)
    again.sums(NAMES)
    for process in stage.clients.values():
        process.saw("secure sum done", round=again.number)
    assert spent(stage) == dict.fromkeys(NAMES, again.number)
    nobody_reveals_twice(stage)


@pytest.mark.parametrize(
    ("death", "kept"),
    [
        ("round-opened:after", 0),
        ("parts-changed:before", 0),
        ("parts-changed:after#2", 0),
        ("upload-spooled#2", 0),
        ("upload-folded#3", 0),
        ("round-closed:before", 0),
        ("round-closed:after", 0),
        ("checkpoint-written", 0),
        ("version-published:before", 0),
        ("version-published:after", 1),
    ],
)
def test_the_coordinator_dies_while_it_stores(stage: Stage, death: str, kept: int) -> None:
    number, before = stage.next, stage.model()
    stage.liar.lies(Lie(), number)
    stage.coordinator.kill()
    stage.restart(**{failpoints.VARIABLE: death})
    stage.ask()
    assert stage.coordinator.code() == -signal.SIGKILL, f"{death} was never reached"
    stage.restart()
    changed(before, stage.model(), kept)
    stage.ask()
    again = stage.over(number + 1)
    assert again["event"] == "round done"
    changed(before, stage.model(), kept + 1)
    for process in stage.clients.values():
        process.saw("secure sum done", round=number + 1)
    assert spent(stage) == dict.fromkeys(NAMES, number + 1)
    nobody_reveals_twice(stage)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("kind", "summed"), [("sum_roster", False), ("sum_shares", False), ("sum_survivors", True), ("sum_signatures", True)]
)
def test_a_client_is_killed_between_two_steps(stage: Stage, kind: str, summed: bool, at_once: bool) -> None:
    """And started again at once, when it does not know its keys any more, or later."""
    number, before = stage.next, stage.model()
    cut = Cut(told=kind, clients=[DAVE])
    stage.liar.lies(cut, number)
    stage.ask()
    cut.wait()
    stage.clients[DAVE].kill()
    stage.liar.lies(Lie(), number)
    if at_once:
        stage.client(DAVE).saw("attending")
    played = stage.played(number, before)
    played.sums(NAMES if summed else REST)
    assert sorted(played.said("sum_revealed")) == REST
    if not at_once:
        stage.client(DAVE).saw("attending")
    stage.play().sums(NAMES)
    nobody_reveals_twice(stage)
