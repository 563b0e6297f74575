"""Three machines: coordinator and clients in network namespaces of their own, each with its own address."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from e2e.federation import Federation, Process

HOSTS = {"coordinator": "10.77.0.1", "alice": "10.77.0.2", "bob": "10.77.0.3"}


class Network:
    """Namespaces joined by a bridge in a further one. Nothing in them reaches, or is reached from, the machine's own network."""

    def __init__(self) -> None:
        self._mark = f"choral{os.getpid()}"  # so that two test processes do not meet
        self._made: list[str] = []

    def build(self) -> None:
        """One namespace for each host and one for the bridge."""
        bridge = self._add("bridge")
        _ip("-n", bridge, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "bridge0", "up")
        for host, address in HOSTS.items():
            name = self._add(host)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"to-{host}"[:15], "netns", bridge)
            _ip("-n", bridge, "link", "set", f"to-{host}"[:15], "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")

    def entering(self, host: str) -> tuple[str, ...]:
        """The words before a command that is to run on a host."""
        return ("ip", "netns", "exec", self._name(host))

    def remove(self) -> None:
        """Remove what was built; devices go with their namespaces."""
        for name in self._made:
            _ip("netns", "delete", name)

    def _add(self, host: str) -> str:
        name = self._name(host)
        _ip("netns", "add", name)
        self._made.append(name)
        return name

    def _name(self, host: str) -> str:
        return f"{self._mark}-{host}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def impossible(reason: str) -> None:
    """Skip, unless everything is required to run."""
    if os.environ.get("CHORAL_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        impossible("network namespaces need root")
    if shutil.which("ip") is None:
        impossible("network namespaces need the command ip (iproute2)")
    built = Network()
    try:
        try:
            built.build()
        except OSError as error:
            impossible(f"this machine gives no network namespaces: {error}")
        yield built
    finally:
        built.remove()


def test_coordinator_and_clients_on_machines_of_their_own(network: Network, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Federation(tmp_path_factory.mktemp("f"), [HOSTS["coordinator"]]) as federation:
        federation.configure(listen="0.0.0.0:0", exit_when_done=False)
        coordinator = federation.start_coordinator(before=network.entering("coordinator"))
        port = coordinator.saw("coordinator ready")["address"].rpartition(":")[2]
        federation.address = f"{HOSTS['coordinator']}:{port}"
        clients: list[Process] = [
            federation.client(name, before=network.entering(name), flags={"--holdout": 0.25}) for name in ("alice", "bob")
        ]
        coordinator.saw("run over", reason="3 rounds completed")
        assert [entry["accepted"] for entry in coordinator.events("round done", kind="training")] == [2, 2, 2]
        seen = {row["name"]: row["address"] for row in federation.rows("clients", "list")}
        for name, address in seen.items():
            assert address.startswith(f"ipv4:{HOSTS[name]}:")
        assert sorted(seen) == ["alice", "bob"]
        for process in (coordinator, *clients):
            process.terminate()
        assert [process.code() for process in (coordinator, *clients)] == [0, 0, 0]
