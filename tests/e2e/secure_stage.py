"""A federation that sums securely, whose coordinator lies when it is told to: one round for each lie, and what came of it.

Every client's update is known beforehand, to the last digit, so that a model tells whose updates are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from choral.v1 import admin_pb2
from choral.v1 import federation_pb2 as pb
from e2e.exact import free_port
from e2e.federation import PATIENCE_S, Federation, Process, until
from e2e.liar import Liar, Lie, Told, round_of
from e2e.zygote import Zygote
from safetensors.numpy import load_file

SLOPE_TASK = """
from dataclasses import replace
import small

task = replace(small.task, name="slope", metrics={}, loss=lambda prediction, target: prediction.mean())
"""
"""The gradient of an example is (a, b, 1), whatever the model: two steps of 0.01 a round take 0.02 times that off."""
NAMES = ("alice", "bob", "carol", "dave")
VICTIM, OTHERS = NAMES[0], NAMES[1:]
A = {name: 2.0**number for number, name in enumerate(NAMES)}
"""Of each client, in all its examples: no two sets of clients have the same mean."""
Model = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


def slope(name: str) -> tuple[float, float, float]:
    """A client's update."""
    return -0.02 * A[name], -0.02, -0.02


@dataclass(frozen=True)
class Played:
    """A round that is over."""

    stage: Stage
    number: int
    state: str
    reason: str
    before: Model
    after: Model

    @property
    def by(self) -> tuple[float, ...]:
        """By how much the model has changed: of a, of b, and of the bias."""
        steps = [self.after[name].ravel() - self.before[name].ravel() for name in ("weight", "bias")]
        return tuple(float(number) for number in np.concatenate(steps))

    def sums(self, clients: Iterable[str], **others: tuple[float, float, float]) -> None:
        """The model has changed by the mean of these clients' updates, and of `others`, which are given."""
        updates = [*map(slope, clients), *others.values()]
        assert self.state == "round done", self.reason
        assert np.allclose(self.by, np.mean(updates, axis=0), atol=1e-6, rtol=0), self.by

    def deceived(self, client: str) -> str:
        """Wait until a client has declined, because it was lied to; the reason in its log."""
        return str(self.stage.clients[client].saw("declined", round=self.number, error="Deceived")["reason"])

    def said(self, kind: str) -> list[str]:
        """Who has said this in the round."""
        return [client for client, _ in self.stage.liar.heard(kind, self.number)]

    @property
    def sent(self) -> set[str]:
        """Who has sent a masked result."""
        return {header.client for header in list(self.stage.liar.sent) if round_of(header.assignment) == self.number}

    def event(self, what: str, client: str | None = None) -> str:
        """Wait until operators see this event of the round; what it tells."""
        return self.stage.event(what, client, self.number)


@dataclass
class Stage:
    """The coordinator opens a round when it is asked to."""

    federation: Federation
    liar: Liar
    coordinator: Process
    clients: dict[str, Process] = field(default_factory=dict)

    def client(self, name: str) -> Process:
        """Start one of the clients, which meets the liar."""
        a = A[name]
        shard = self.federation.write_shard(name, [(a, 1, 0)] * 4)
        flags = {"--server": self.liar.address, "--longest-pause-s": 0.2}
        self.clients[name] = process = self.federation.client(name, shard, "slope:task", flags=flags)
        return process

    @property
    def next(self) -> int:
        """The number of the next round, once none is under way: also if a test has failed in the middle of one."""
        newest = max((one.round for _, one in self.liar.spoken("assignment")), default=0)
        while self.over(newest)["event"] != "round done":
            newest += 1
        return newest + 1

    def over(self, number: int) -> dict[str, Any]:
        """Wait until a round is over; its entry in the log of a coordinator, which may have been started again."""

        def found() -> list[dict[str, Any]]:
            coordinators = [one for one in self.federation.processes if one.name == "coordinator"]
            ends = ("round done", "round abandoned")
            return [entry for one in coordinators for end in ends for entry in one.events(end, round=number)]

        until(lambda: bool(found()))
        return found()[0]

    def play(self, lie: Lie | None = None) -> Played:
        """One round, about which `lie` is told. If it is abandoned, another follows at once, and an honest one is waited for."""
        number, before = self.next, self.model()
        self.liar.lies(lie or Lie(), number)
        self.ask()
        return self.played(number, before)

    def restart(self, **environment: object) -> None:
        """Start the coordinator again, which has died, and wait until all clients are back."""
        self.coordinator = self.federation.start_coordinator(environment=environment)
        self.coordinator.saw("coordinator ready")
        for name in self.clients:
            self.coordinator.saw("client attends", client=name)

    def ask(self) -> None:
        """For a round."""
        with self.federation.admin() as admin:
            admin.TriggerRound(admin_pb2.TriggerRoundRequest(), timeout=PATIENCE_S)

    def played(self, number: int, before: Model) -> Played:
        """The round of that number, once it is over."""
        ended = self.over(number)
        after = self.model() if ended["event"] == "round done" else before
        later = number
        while self.over(later)["event"] != "round done":
            later += 1
        return Played(self, number, ended["event"], ended.get("reason", ""), before, after)

    def model(self) -> Model:
        """The newest."""
        return load_file(self.federation.versions / "latest.safetensors")

    def event(self, what: str, client: str | None = None, number: int | None = None) -> str:
        """Wait until operators see this event, of the client, of the round; what it tells, each time."""
        found: list[str] = []

        def look() -> bool:
            with self.federation.admin() as admin:
                events = admin.ListEvents(admin_pb2.ListEventsRequest(limit=200), timeout=PATIENCE_S).events
            found.extend(
                one.told for one in events if one.what == what and client in (None, one.client) and number in (None, one.round)
            )
            return bool(found)

        until(look)
        return "\n".join(found)

    def guard(self, name: str, text: str) -> None:
        """What a device's owner writes into its guard."""
        folder = self.federation.folder / name / "client"
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / "guard.new"
        beside.write_text(text)
        beside.replace(folder / "guard.yaml")


@contextmanager
def staged(federation: Federation, names: Iterable[str] = NAMES, guard: str = "min_cohort: 3", **run: Any) -> Iterator[Stage]:
    """The coordinator and these clients, each with that guard; the first round opens when all are there."""
    federation.write_task(SLOPE_TASK, "slope")
    settings = {
        "rounds": 1000,
        "cohort_size": 4,
        "quorum": 3,
        "start_with": 4,
        "absence_s": 1,
        "weight_cap": 4,
        "retry_s": 0,
        "max_abandoned": 1000,
        "quarantine_after": None,
        "schedule": {"interval_s": 3600},
        "secure_aggregation": True,
    }
    other = {"heartbeat_s": 60.0, "exit_when_done": False}
    listen = f"127.0.0.1:{free_port()}"  # the same after a restart
    coordinator = federation.coordinator(task="slope:task", listen=listen, run=settings | run, **other)
    with Liar(federation) as liar:
        stage = Stage(federation, liar, coordinator)
        for name in names:
            if guard:
                stage.guard(name, guard)
            stage.client(name)
        yield stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Stage]:
    """One for all tests of a module, whose rounds follow each other."""
    with Federation(tmp_path_factory.mktemp("f"), zygote=zygote) as federation, staged(federation) as made:
        made.over(0)
        yield made
    for process in federation.processes:
        assert "Traceback" not in process.stderr


Change = Callable[[Any, Lie], Iterable[Told] | None]
"""Of a message that the victim is to be told: in place, or what it is told instead."""


class Instead(Lie):
    """The victim is told something else in place of a message of this kind, or nothing, or more."""

    def __init__(self, kind: str, change: Change) -> None:
        super().__init__()
        self._kind = kind
        self._change = change

    def told(self, client: str, message: pb.AttendResponse) -> Iterable[Told]:
        """As `change` says."""
        if client != VICTIM or message.WhichOneof("message") != self._kind:
            return (message,)
        instead = self._change(getattr(message, self._kind), self)
        return (message,) if instead is None else instead
