"""How long it takes until something happens: real processes, started as users start them, TLS on loopback.

    python benchmarks/startup.py [--clients 2] [--times 5] [--test-set] [--json]

Prints, each as the median of a few times: how long `choral --help` takes; a new coordinator, from its start until clients can come;
a client, from its start with a token until it attends; and all of it, from the coordinator's start until the first round of so many
clients is done. Beside them, from the same run, how long Python takes to import torch on this machine, which no client can do
without: what takes a multiple of it is what can be compared between machines. Then what each process has in memory: the coordinator
when it is ready and at its most until the first round is done, and a client that attends.

With `--test-set` the coordinator measures versions, for which it keeps a second process that has torch; its memory is told too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from choral.errors import ChoralError
from choral_deploy.given import hand_over
from choral_deploy.operator import Operator
from choral_deploy.processes import Child, Children, started
from choral_server.trust import make_authority
from federation import at_least, progress, tidily

CLI = "choral_deploy.cli"
TASK = "choral.tasks.boston_housing:task"
Figures = dict[str, float]
TOLD = {
    "help_s": "choral --help",
    "torch_s": "import torch",
    "coordinator_ready_s": "coordinator ready",
    "client_attends_s": "client attends",
    "first_round_s": "launch → first round done",
    "coordinator_ready_mb": "coordinator, ready",
    "coordinator_peak_mb": "coordinator, at its most",
    "task_process_mb": "its second process",
    "client_mb": "client, attending",
}


class Logged:
    """A process, whose log is waited for."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.child: Child
        self._entries: list[dict[str, Any]] = []
        self._news = asyncio.Event()

    @classmethod
    async def start(cls, children: Children, name: str, arguments: list[object], log: Path) -> Logged:
        """Run a `choral` command."""
        logged = cls()
        command = [CLI, *map(str, arguments), "--log-format", "json"]
        logged.child = await children.start(name, command, log, logged._listen)
        return logged

    async def saw(self, event: str, **fields: str) -> dict[str, Any]:
        """Wait until it has logged this. Raises ChoralError: it has failed before that."""
        wanted, ending = {"event": event, **fields}.items(), asyncio.create_task(self.child.succeed())
        while (found := next((entry for entry in self._entries if wanted <= entry.items()), None)) is None:
            self._news.clear()
            news = asyncio.create_task(self._news.wait())
            await asyncio.wait({news, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                await ending
                raise ChoralError(f"{self.child.name} ended before it logged {event!r}")
        ending.cancel()
        return found

    def memory_mb(self, what: str = "VmRSS") -> float:
        """What it has in memory, or had at its most (VmHWM)."""
        return _memory_mb(self.child.process.pid, what)

    def _listen(self, line: str) -> None:
        if line.startswith("{"):
            self._entries.append(json.loads(line))
            self._news.set()


async def measure(clients: int, test_set: bool) -> Figures:
    """One launch, from nothing to the end of the first round."""
    with tempfile.TemporaryDirectory(prefix="choral-") as name:
        folder = Path(name)
        prepare(folder, clients, test_set)
        async with started() as children:
            arguments = ["server", "--config", folder / "choral.yaml"]
            coordinator = await Logged.start(children, "coordinator", arguments, folder / "coordinator.log")
            address = (await coordinator.saw("coordinator ready"))["address"]
            found = {
                "coordinator_ready_s": time.perf_counter() - coordinator.began,
                "coordinator_ready_mb": coordinator.memory_mb(),
            }
            there = [await join(children, folder, number, address) for number in range(clients)]
            await there[0].saw("attending")
            found |= {"client_attends_s": time.perf_counter() - there[0].began, "client_mb": there[0].memory_mb()}
            await coordinator.saw("round done", kind="training")
            found |= {
                "first_round_s": time.perf_counter() - coordinator.began,
                "coordinator_peak_mb": coordinator.memory_mb("VmHWM"),
            }
            if test_set:
                found["task_process_mb"] = _memory_mb(_only_child(coordinator.child.process.pid))
    return found


async def join(children: Children, folder: Path, number: int, address: str) -> Logged:
    """Start a client with a token of its own."""
    name = _name(number)
    token = folder / f"{name}.token"
    hand_over(token, await Operator(str(folder / "state" / "admin.sock")).token(name))
    options = {
        "--name": name,
        "--server": address,
        "--task": TASK,
        "--data": folder / name / "shard.csv",
        "--token": token,
        "--state": folder / name / "client",
        "--threads": 1,
    }
    arguments = ["client", *(part for option in options.items() for part in option)]
    return await Logged.start(children, name, arguments, folder / f"{name}.log")


def prepare(folder: Path, clients: int, test_set: bool) -> None:
    """Certificates, a configuration, and the shards of the bundled task that README begins with."""
    from choral.tasks.shards import deal

    make_authority(folder, ["localhost", "127.0.0.1"])
    deal("boston_housing", [_name(number) for number in range(clients)], folder)
    content = {
        "listen": "127.0.0.1:0",
        "tls": {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem", "ca_key": "ca.key"},
        "state": "state",
        "task": TASK,
        "run": {"rounds": 1_000_000, "cohort_size": clients},
        "evaluation": {"clients": False} | ({"test_set": "test.csv"} if test_set else {}),
    }
    (folder / "choral.yaml").write_text(yaml.safe_dump(content))


async def command_s(*arguments: str) -> float:
    """How long this Python takes for something."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.DEVNULL)
    await process.wait()
    return time.perf_counter() - began


async def launches(options: argparse.Namespace) -> list[Figures]:
    """The figures, so many times."""
    found = []
    with progress("launches", options.times) as advance:
        for _ in range(options.times):
            alone = {"help_s": await command_s("-m", CLI, "--help"), "torch_s": await command_s("-c", "import torch")}
            found.append(alone | await measure(options.clients, options.test_set))
            advance()
    return found


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(1), default=2)
    parser.add_argument("--times", type=at_least(1), default=5)
    parser.add_argument("--test-set", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = asyncio.run(launches(options))
    median = {name: float(np.median([each[name] for each in found])) for name in found[0]}
    if options.json:
        print(json.dumps({"clients": options.clients, "times": options.times, "test_set": options.test_set} | median))
        return
    print(f"{options.clients} clients, TLS, real processes, median of {options.times}")
    for name, what in TOLD.items():
        if name in median:
            unit = "s, {:.1f} × import torch".format(median[name] / median["torch_s"]) if name.endswith("_s") else "MB"
            print(f"{what:26} {median[name]:8.2f} {unit}")


def _name(number: int) -> str:
    return f"client-{number}"


def _memory_mb(process: int, what: str = "VmRSS") -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) / 1024


def _only_child(process: int) -> int:
    (child,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(child)


if __name__ == "__main__":
    tidily(main)
