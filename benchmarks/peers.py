"""The same work on Flower, on NVFlare and on Choral, in one run: rounds without training, real deployments on this machine.

    python benchmarks/peers.py [--rows small-2 ...] [--peers flower nvflare] [--rounds 3] [--torch] [--venvs FOLDER] [--json]

    small-2, small-10   1 700 parameters, 2 and 10 clients
    100mb-2, 100mb-10   25 000 000 parameters
    1gb-2               250 000 000 parameters

Each peer lives in a virtual environment of its own, which is made when it is first needed. A row is measured on one after another:

    choral   a coordinator with SQLite and a process per client, mutual TLS: as users run it, as rounds.py does
    floor    bare gRPC moving the same bytes, in plaintext and with mutual TLS (floor.py)
    flower   flower-superlink, a flower-supernode per client, `flwr run`: without TLS, state in memory, no telemetry; FedAvg
    nvflare  a server and a process per site (PocEnv), mutual TLS; FedAvg, the recipe for NumPy

Clients change every number each round. Printed are the median time from the end of a round to the end of the next, the first not
counted; the server side's peak memory; and the time from launch until the first round is done. The peers' apps use NumPy only,
which is the best case for them: `--torch` lets them import torch as well, as those of users who train with it do (in Flower each
message is a new process that does); Choral's clients always do. Of Choral's coordinator the memory is the kernel's own peak; of the
peers' several processes it is sampled, with what they share counted once: rather too low than too high. What went wrong with a peer
is told in one line, and the others go on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from choral.errors import ChoralError, ConfigError
from federation import HERE, at_least, launch_s, progress, tidily
from marked import Deployment, deployed
from rounds import TASK, Load, mb, of_floors, of_rounds

ROWS = {
    "small-2": Load(2, 1700, 100),
    "small-10": Load(10, 1700, 100),
    "100mb-2": Load(2, 25_000_000, 10),
    "100mb-10": Load(10, 25_000_000, 5),
    "1gb-2": Load(2, 250_000_000, 3),
}
USUAL = ("small-2", "100mb-2")
APPS = HERE / "peer_apps"
POLL_S = 0.05
LABELS = {"cycle_s": "round", "server_peak_bytes": "server peak memory", "launch_s": "launch until the first round is done"}


@dataclass(frozen=True)
class Outcome:
    """Of one row on one of them."""

    cycle_s: float
    server_peak_bytes: int
    launch_s: float


@dataclass(frozen=True)
class Peer:
    """Another framework: what pip installs, and how its deployment runs so many rounds."""

    name: str
    requirement: str
    run: Callable[[Load, int, Path, Path], Awaitable[Outcome]]

    def needs(self, torch: bool) -> tuple[str, ...]:
        """All that pip installs; torch in the release that is installed here."""
        return (self.requirement, f"torch=={version('torch').partition('+')[0]}") if torch else (self.requirement,)


async def choral(load: Load, folder: Path) -> dict[str, Any]:
    """Ours, and the floor."""
    found = await of_rounds(load, folder)
    launch = await launch_s(TASK, load.run, load.clients)
    floors = await of_floors(load, folder)
    outcome = Outcome(found["cycle_ms_p50"] / 1000, found["server_peak_bytes"], launch)
    return {"choral": vars(outcome), "plaintext_floor_s": floors["plaintext_floor_s"], "mtls_floor_s": floors["mtls_floor_s"]}


async def flower(load: Load, rounds: int, venv: Path, folder: Path) -> Outcome:
    """A SuperLink, SuperNodes and a run."""
    port, *others = free_ports(1 + load.clients)
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {**at_home(venv, folder), "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0"}
    times = folder / "times"
    async with deployed(folder, "flower-superlink", environment) as there:
        began = time.time()
        at = ("--insecure", "--host", "127.0.0.1")
        superlink = (venv / "bin/flower-superlink", *at, "--port", port, "--disable-runtime-dependency-installation")
        await there.start("superlink", *superlink)
        for number, own in enumerate(others):
            supernode = (venv / "bin/flower-supernode", *at, "--port", own, "--superlink", f"127.0.0.1:{port}")
            await there.start(f"supernode-{number}", *supernode)
        await answers(port)
        config = f"params={load.params} clients={load.clients} rounds={rounds + 1} times='{times}'"
        command = (venv / "bin/flwr", "run", APPS / "flower", "here", "--stream", "--run-config", config)
        run = await there.start("run", *command)
        told = await times_in(times, rounds + 2, there, "run", run)
        return outcome(told, began, there)


async def nvflare(load: Load, rounds: int, venv: Path, folder: Path) -> Outcome:
    """PocEnv's services and a job."""
    times = folder / "times"
    workspace = {"NVFLARE_POC_WORKSPACE": str(folder / "poc"), "CHORAL_PEER_TIMES": str(times)}
    async with deployed(folder, ".app.server.", {**at_home(venv, folder), **workspace}) as there:
        command = (venv / "bin/python", APPS / "nvflare_job.py", load.params, load.clients, rounds + 2, folder)
        run = await there.start("job", *command)
        told = await times_in(times, rounds + 2, there, "job", run)
        return outcome(told, float((folder / "launched").read_text()), there)


PEERS = {peer.name: peer for peer in (Peer("flower", "flwr==1.41.*", flower), Peer("nvflare", "nvflare==2.9.*", nvflare))}


def at_home(venv: Path, folder: Path) -> dict[str, str]:
    """An environment in which a peer finds its own programs, and leaves nothing in the user's folder."""
    return {"HOME": str(folder), "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


def outcome(told: Sequence[float], began: float, there: Deployment) -> Outcome:
    """From when the first round began, and each one ended; the first is not counted but for the launch."""
    return Outcome(float(np.median(np.diff(told)[1:])), there.peak_bytes, told[1] - began)


async def times_in(file: Path, count: int, there: Deployment, name: str, run: asyncio.subprocess.Process) -> list[float]:
    """So many times, once they are in the file. Raises ChoralError: the process that would bring them has ended."""
    while True:
        told = [float(line) for line in file.read_text().split()] if file.exists() else []
        if len(told) >= count:
            return told[:count]
        if run.returncode is not None:
            raise ChoralError(
                f"ended with exit code {run.returncode} after {max(len(told) - 1, 0)} rounds: {there.last_words(name)}"
            )
        await asyncio.sleep(POLL_S)


async def answers(port: int) -> None:
    """Wait until something listens."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(POLL_S)
        else:
            writer.close()
            return


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    with ExitStack() as taken:
        return [taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


async def installed(peer: Peer, folder: Path, torch: bool) -> Path:
    """The peer's virtual environment, made if it is not there yet. Raises ChoralError: pip could not."""
    needs = peer.needs(torch)
    venv = folder / (f"{peer.name}-torch" if torch else peer.name)
    note = venv / "choral-requirement"
    if note.exists() and note.read_text() == "\n".join(needs):
        return venv
    folder.mkdir(parents=True, exist_ok=True)
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *needs]
    for command in ([sys.executable, "-m", "venv", "--clear", venv], pip):
        process = await asyncio.create_subprocess_exec(
            *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            said, _ = await process.communicate()
        finally:
            if process.returncode is None:  # nobody waits for it any more
                process.terminate()
                await process.wait()
        if process.returncode != 0:
            lines = said.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise ChoralError(f"{' and '.join(needs)} cannot be installed in {venv}: {lines[-1]}")
    note.write_text("\n".join(needs))
    return venv


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows on all that were asked for. Whoever fails in a row has a reason there instead of figures."""
    found = []
    with progress("rows", len(options.rows) * (1 + len(options.peers))) as advance:
        for row in options.rows:
            load = ROWS[row]
            with tempfile.TemporaryDirectory(prefix="choral-") as folder:
                figures = await choral(load, Path(folder))
            advance()
            say(row, "choral", figures["choral"])
            for name in options.peers:
                figures[name] = await tried(PEERS[name], load, options)
                advance()
                say(row, name, figures[name])
            found.append({"row": row, "clients": load.clients, "params": load.params, **figures})
    return found


async def tried(peer: Peer, load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """A peer's figures, or why there are none."""
    try:
        venv = await installed(peer, options.venvs, options.torch)
        with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
            async with asyncio.timeout(options.patience_s):
                return vars(await peer.run(load, options.rounds, venv, Path(folder)))
    except TimeoutError:
        reason = f"not done after {options.patience_s} s: give it more --patience-s"
    except (ChoralError, OSError) as error:
        reason = str(error)
    return {"failed": reason}


def say(row: str, name: str, told: dict[str, Any]) -> None:
    """One line for those who wait."""
    print(f"{row} on {name}: {told.get('failed') or 'a round takes ' + seconds(told['cycle_s'])}", file=sys.stderr)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "all"], default=list(USUAL))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument(
        "--rounds", type=at_least(1), default=3, help="of the peers that are counted; ours are more where they are quick"
    )
    parser.add_argument("--torch", action="store_true", help="let the peers' apps import torch")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache/choral-peers", help="where the peers are installed")
    parser.add_argument("--patience-s", type=at_least(1), default=1800, help="for a peer's row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if "all" in options.rows:
        options.rows = list(ROWS)
    if sys.platform != "linux":
        raise ConfigError("peers.py reads /proc: it needs Linux")
    options.venvs = options.venvs.resolve()
    if options.torch:
        os.environ["CHORAL_PEER_TORCH"] = "1"
    found = asyncio.run(measure(options))
    if options.json:
        print(json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), "torch": options.torch, "rows": found}))
    else:
        tell(found, options.peers, options.torch)


def tell(found: Sequence[dict[str, Any]], peers: Sequence[str], torch: bool) -> None:
    """Print the figures as a table that Markdown understands."""
    heads = ["work", "bare gRPC (mTLS)", "Choral", *(head for name in peers for head in (PEERS[name].requirement, "ratio"))]
    apps = "with torch" if torch else "with NumPy only"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, nothing is trained, peers' apps {apps}; a round is timed from its end to the next one's\n"
    )
    print(line(heads))
    print(line(["---"] * len(heads)))
    for what, floor, told in (
        ("cycle_s", True, seconds),
        ("server_peak_bytes", False, mb),
        ("launch_s", False, seconds),
    ):
        for row in found:
            ours = row["choral"][what]
            bare = f"{seconds(row['plaintext_floor_s'])} ({seconds(row['mtls_floor_s'])})" if floor else ""
            cells = [f"{LABELS[what]}: {row['params']} parameters, {row['clients']} clients", bare, told(ours)]
            for name in peers:
                theirs = row[name].get(what)
                cells += ["failed", ""] if theirs is None else [told(theirs), f"{theirs / ours:.1f} x"]
            print(line(cells))


def line(cells: Sequence[str]) -> str:
    """A table's line."""
    return f"| {' | '.join(cells)} |"


def seconds(value: float) -> str:
    """For people."""
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


if __name__ == "__main__":
    tidily(main)
