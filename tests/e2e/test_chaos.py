"""Processes killed and links cut at random, seeded moments: the run ends with the same bits as a calm one.

    CHORAL_CHAOS_SEEDS=100-199 pytest tests/e2e/test_chaos.py      (make chaos)

Moments are counted in things that happen (rounds that end, results that are sent), not in seconds, so that a seed means the same on
a slow machine; what is random beyond the seed is where exactly in a step a process dies.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
from e2e import exact
from e2e.federation import Federation, Process
from e2e.zygote import Zygote
from proxy import Proxy

ROUNDS = 20
DISTURBANCES = 8
ONCE_FAILED: Sequence[int] = ()
"""Seeds that ever failed are kept here, whatever range is asked for."""


def seeds() -> list[int]:
    first, _, last = os.environ.get("CHORAL_CHAOS_SEEDS", "0-11").partition("-")
    return sorted({*range(int(first), int(last or first) + 1), *ONCE_FAILED})


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Any]:
    """What comes out when nothing breaks."""
    return exact.undisturbed(tmp_path_factory.mktemp("calm"), zygote, ROUNDS)


class Chaos:
    """A federation whose clients reach the coordinator through a proxy, and what is done to it."""

    def __init__(self, federation: Federation, proxy: Proxy, seed: int) -> None:
        self.federation = federation
        self.proxy = proxy
        self.random = random.Random(seed)
        self.coordinator = federation.start_coordinator()
        self.clients = {name: self.client(name) for name in exact.CLIENTS}

    def client(self, name: str) -> Process:
        return exact.start_client(self.federation, name, self.proxy.address)

    def kill_coordinator(self) -> None:
        self.coordinator.kill()
        self.coordinator = self.federation.start_coordinator()

    def kill_client(self) -> None:
        name = self.random.choice(exact.CLIENTS)
        self.clients[name].kill()
        self.clients[name] = self.client(name)

    def kill_everyone(self) -> None:
        for process in (self.coordinator, *self.clients.values()):
            process.kill()
        self.coordinator = self.federation.start_coordinator()
        self.clients = {name: self.client(name) for name in exact.CLIENTS}

    def cut(self) -> None:
        self.proxy.cut()

    def cut_soon(self) -> None:
        self.proxy.cut_at(up=[self.proxy.up + self.random.randrange(1, 3000)])

    def disturb(self) -> None:
        """One thing goes wrong, after a few more steps of whoever is at work."""
        kinds = (self.kill_coordinator, self.kill_coordinator, self.kill_client, self.kill_everyone, self.cut, self.cut_soon)
        self.step()
        self.random.choice(kinds)()

    def step(self) -> None:
        """Wait until the coordinator has said a few more things, or has ended."""
        self.coordinator.progress(self.random.randrange(1, 8))

    @property
    def over(self) -> bool:
        return bool(self.coordinator.events("run over"))


@pytest.mark.parametrize("seed", seeds())
def test_chaos_ends_as_calm_does(seed: int, quick: Federation, calm: dict[str, Any]) -> None:
    exact.configure(quick, ROUNDS)
    with Proxy(int(quick.address.rpartition(":")[2])) as proxy:
        chaos = Chaos(quick, proxy, seed)
        for _ in range(DISTURBANCES):
            if not chaos.over:
                chaos.disturb()
        chaos.coordinator.saw("run over", state="finished")
        assert chaos.coordinator.code() == 0
    for client in chaos.clients.values():  # whoever comes back too late hears of nothing
        client.terminate()
        assert client.code() == 0
    assert exact.outcome(quick) == calm
    for process in quick.processes:
        assert "Traceback" not in process.stderr
