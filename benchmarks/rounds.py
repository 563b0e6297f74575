"""What a round costs when nothing is trained: real processes, TLS on loopback, the coordinator as users run it.

    python benchmarks/rounds.py --clients 2 --params 1700 [--rounds 200] [--codec NAME] [--database URL ...] [--json]
    python benchmarks/rounds.py --secure --clients 10 --params 1000000 [--rounds 200] [--json]
    python benchmarks/rounds.py --durability [--rounds 200] [--series 20] [--json]

Prints, all of one run:

    round, cycle  median and 95th percentile of the rounds' duration (from opening until the version is written), and of the whole
                  cycle (from one opening to the next: with all commits, and what clients do in between)
    bare call     one unary gRPC call over TLS on this machine; how many of these a round is can be compared between machines
    memory        the most that was ever resident in the coordinator, beside what it has when it is ready, and in the client that
                  had most, beside what it had before there was a model (all imported, nothing fetched)
    CPU           seconds of the coordinator, and of a client on the average, per round
    bytes         that a client sent and received per round, as the kernel counts TCP's payload (`ss`): with TLS, HTTP/2, checksums
                  and announcements. They are the only figure that a codec should change for certain
    launch        from the start of all processes at once, with certificates and without a model, until the first round is done
    floor         bare gRPC moving the same bytes, each client first down, then up (floor.py), in plaintext and with mutual TLS
    payload       float32 model bytes that a cycle moves, once down and once up for each client, per second; and how much of what
                  the floors move that is

`--database` measures over another database, or over several: `sqlite` is a file in the state folder, `sqlite://` keeps all in
memory. Clients change every parameter in every round (empty_task.py), so nothing can be left out as known.

`--secure` sums the results securely, and measures the same rounds in the clear beside it, in the same run: how often these go into
those is what is to be looked at.

`--durability` prints what it costs that a round survives: the same federation over SQLite in memory, over a SQLite file, and over
a PostgreSQL server of its own. All three are there at once, and all but one are paused: they take turns in short series of rounds,
each time in another order, so that what else the machine does hits all alike. What a database adds is the median, over the series,
of its difference to the one in memory; beside it are these differences' quartiles. The databases lie in temporary folders, so their
disk is measured too (TMPDIR moves SQLite's; PostgreSQL's are in /tmp).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from choral.errors import ConfigError
from choral.v1 import admin_pb2 as pb
from choral_server.trust import make_authority
from federation import ENDLESS, Federation, Times, at_least, certify, federation, launch_s, progress, tidily, timings
from floor import floor_s
from usage import Usage, traffic, usage

IN_MEMORY = "SQLite, in memory"
NAMES = {"sqlite://": IN_MEMORY, "sqlite": "SQLite, a file"}
WARM_UP = 10  # rounds that are not counted
SETTLING = 3  # the same in each series
LARGE_PARAMS = 1_000_000
LEAST_SECURE = 3  # clients
FLOORS = ("plaintext", "mtls")
FLOOR_REPETITIONS, LARGE_FLOOR_REPETITIONS = 51, 4  # the first is not counted
TASK = "empty_task:task"

Rounds = list[pb.Round]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What is run: so many rounds of so many clients, with so many parameters."""

    clients: int
    params: int
    rounds: int
    codec: str | None = None
    database: str = "sqlite"
    secure: bool = False

    @property
    def model_bytes(self) -> int:
        """Of float32."""
        return 4 * self.params

    @property
    def is_large(self) -> bool:
        """Whether a round takes so long that there cannot be many."""
        return self.params >= LARGE_PARAMS

    @property
    def run(self) -> dict[str, Any]:
        """The run's settings; it goes on until it is stopped."""
        changes: dict[str, Any] = {"compression": {"upload": self.codec}} if self.codec else {}
        changes |= {"secure_aggregation": True} if self.secure else {}
        return {"rounds": ENDLESS, "cohort_size": self.clients, **changes}


@dataclass(frozen=True)
class Count:
    """What all processes have taken, and what came and went, so far; clients by process id."""

    rounds: int
    server: Usage
    clients: dict[int, Usage]
    traffic: dict[int, tuple[int, int]] | None

    @classmethod
    def of(cls, here: Federation) -> Self:
        """Of a federation that rests."""
        clients = {pid: usage(pid) for pid in here.client_pids}
        return cls(here.rounds_told, usage(here.server_pid), clients, traffic(int(here.address.rpartition(":")[2])))


async def measure(load: Load) -> Figures:
    """Run the federation, and its floors; return the figures."""
    figures: Figures = {"codec": load.codec, "database": name_of(load.database), "model_bytes": load.model_bytes}
    with tempfile.TemporaryDirectory(prefix="choral-") as folder:
        figures |= await of_rounds(load, Path(folder))
        figures["launch_s"] = await launch_s(TASK, load.run, load.clients, database=url(load.database))
        figures |= await of_floors(load, Path(folder))
        if load.secure:
            clear = await of_rounds(replace(load, secure=False), Path(folder))
            figures |= {f"clear_{name}": clear[name] for name in ("cycle_ms_p50", "client_sent_bytes_per_round")}
            figures["secure_to_clear_cycle"] = figures["cycle_ms_p50"] / clear["cycle_ms_p50"]
    for what in ("cycle", "round"):
        moved = 2 * load.clients * load.model_bytes / figures[f"{what}_ms_p50"] * 1000
        figures[f"payload_bytes_per_s_in_{what}"] = moved
        for kind in FLOORS:
            figures[f"payload_to_{kind}_floor_in_{what}"] = moved / figures[f"{kind}_floor_bytes_per_s"]
    return figures


async def of_rounds(load: Load, notes: Path) -> Figures:
    """How long rounds take, and what they take of the machine. `notes` is where clients tell of their memory."""
    os.environ |= {"CHORAL_EMPTY_PARAMS": str(load.params), "CHORAL_EMPTY_NOTES": str(notes)}
    warm_up = 1 if load.is_large else WARM_UP
    async with federation(TASK, load.run, database=url(load.database)) as here, aclosing(here.rounds()) as done:
        ready = usage(here.server_pid)
        call_s = await here.bare_call_s()
        await here.start_clients(load.clients)
        with progress(f"rounds over {name_of(load.database)}", warm_up + load.rounds) as advance:
            await take(done, warm_up, advance)
            await here.rest(done)
            before = Count.of(here)
            await here.resume()
            seen = await take(done, load.rounds, advance) + await here.rest(done)
        after = Count.of(here)
        await here.stop()
        async for _ in done:
            pass
    rounds, cycles = timings([seen[1:]])  # clients had fetched the first one's model before it opened
    return {
        **{f"round_ms_p{p}": float(np.percentile(rounds, p)) for p in (50, 95)},
        **{f"cycle_ms_p{p}": float(np.percentile(cycles, p)) for p in (50, 95)},
        "bare_call_ms_p50": call_s * 1000,
        "round_in_bare_calls": float(np.percentile(rounds, 50) / call_s / 1000),
        "server_ready_bytes": ready.resident_bytes,
        "server_peak_bytes": after.server.peak_bytes,
        **taken_by_clients(after, {pid: int((notes / str(pid)).read_text()) for pid in after.clients}, load.model_bytes),
        **per_round(before, after),
    }


async def take(done: AsyncIterator[pb.Round], count: int, advance: Callable[[], None]) -> Rounds:
    """The next so many rounds."""
    taken = []
    for _ in range(count):
        taken.append(await anext(done))
        advance()
    return taken


def taken_by_clients(after: Count, imports: Mapping[int, int], model_bytes: int) -> Figures:
    """The memory of the client that had most beyond its imports."""
    most = max(after.clients, key=lambda pid: after.clients[pid].peak_bytes - imports[pid])
    peak = after.clients[most].peak_bytes
    return {
        "client_imports_bytes": imports[most],
        "client_peak_bytes": peak,
        "client_peak_beyond_imports_in_models": (peak - imports[most]) / model_bytes,
    }


def per_round(before: Count, after: Count) -> Figures:
    """CPU time and bytes; None for what cannot be measured here."""
    rounds = after.rounds - before.rounds
    spent = [after.clients[pid].cpu_s - before.clients[pid].cpu_s for pid in after.clients]
    sent = received = None
    if before.traffic is not None and after.traffic is not None:
        moved = [np.subtract(after.traffic[pid], before.traffic[pid]) for pid in after.clients]
        sent, received = (float(each) for each in np.mean(moved, axis=0) / rounds)
    return {
        "server_cpu_s_per_round": (after.server.cpu_s - before.server.cpu_s) / rounds,
        "client_cpu_s_per_round": float(np.mean(spent)) / rounds,
        "client_sent_bytes_per_round": sent,
        "client_received_bytes_per_round": received,
    }


async def of_floors(load: Load, folder: Path) -> Figures:
    """The same bytes over bare gRPC."""
    repetitions = LARGE_FLOOR_REPETITIONS if load.is_large else FLOOR_REPETITIONS
    make_authority(folder, ["localhost", "127.0.0.1"])
    certify(folder, 1)
    figures: Figures = {}
    for kind in FLOORS:
        seconds = float(np.median((await floor_s(load.clients, load.model_bytes, repetitions, folder, kind == "mtls"))[1:]))
        figures[f"{kind}_floor_s"] = seconds
        figures[f"{kind}_floor_bytes_per_s"] = 2 * load.clients * load.model_bytes / seconds
    return figures


def url(database: str) -> str | None:
    """What the configuration says."""
    return None if database == "sqlite" else database


def name_of(database: str) -> str:
    """What people call it."""
    return NAMES.get(database, "PostgreSQL")


async def compare(options: argparse.Namespace, databases: Mapping[str, str]) -> list[Figures]:
    """What each of the databases costs."""
    found, order = {name: list[Rounds]() for name in databases}, deque(databases)
    async with AsyncExitStack() as stack:
        play = {name: await stack.enter_async_context(at_rest(options, database)) for name, database in databases.items()}
        with progress("series of rounds", options.series * len(play)) as advance:
            for _ in range(options.series):
                for name in order:
                    found[name].append(await play[name](-(-options.rounds // options.series)))
                    advance()
                order.rotate()
    return [{"database": name, **cost(series, found[IN_MEMORY])} for name, series in found.items()]


@asynccontextmanager
async def at_rest(options: argparse.Namespace, database: str) -> AsyncIterator[Callable[[int], Awaitable[Rounds]]]:
    """The federation over a database, paused; what it gives lets it run for so many rounds, once things have settled."""
    settings = {"rounds": ENDLESS, "cohort_size": options.clients}
    async with (
        federation(TASK, settings, database=url(database)) as here,
        here.operator.stub() as admin,
        aclosing(here.rounds()) as done,
    ):

        async def play(count: int) -> Rounds:
            await admin.ResumeRun(pb.ResumeRunRequest())
            played = [await anext(done) for _ in range(SETTLING + count)]
            await admin.PauseRun(pb.PauseRunRequest())
            return played[SETTLING:]

        await admin.PauseRun(pb.PauseRunRequest())
        await here.start_clients(options.clients)
        await play(WARM_UP)
        yield play
        await admin.StopRun(pb.StopRunRequest())


def cost(series: list[Rounds], in_memory: list[Rounds]) -> Figures:
    """What is usual over a database, and by how much that is more than in memory, series by series, in ms."""
    told: Figures = {}
    for what, mine, other in zip(("round", "cycle"), medians(series), medians(in_memory), strict=True):
        low, middle, high = np.percentile(mine - other, [25, 50, 75])
        told |= {f"{what}_ms_p50": float(np.median(mine)), f"{what}_added_ms_p50": float(middle)}
        told |= {f"{what}_added_ms_p25": float(low), f"{what}_added_ms_p75": float(high)}
    return told


def medians(series: list[Rounds]) -> Times:
    """Of the rounds' duration and of the cycle in each series, in ms (2, series)."""
    return np.array([[np.median(each) for each in timings([rounds])] for rounds in series]).T


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """A fresh database of each kind that there is here, by name."""
    from server.databases import Postgres  # brings pytest with it, which nothing else here needs

    with ExitStack() as running:
        found = {name: database for database, name in NAMES.items()}
        try:
            found["PostgreSQL"] = running.enter_context(Postgres()).new_database()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            print(f"without PostgreSQL: {error}", file=sys.stderr)
        yield found


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(1), default=2)
    parser.add_argument("--params", type=at_least(1), default=1700)
    parser.add_argument("--rounds", type=at_least(2), default=200)
    parser.add_argument("--codec", help="how uploads are compressed; as they are, if not given")
    parser.add_argument("--secure", action="store_true", help="sum results securely; the same in the clear is measured beside it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--database", action="append", help="once for each to be measured; a file in the state folder by default")
    what.add_argument("--durability", action="store_true", help="compare the databases with each other")
    parser.add_argument("--series", type=at_least(1), default=20, help="into which --durability divides the rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["CHORAL_EMPTY_PARAMS"] = str(options.params)
    setting = {"clients": options.clients, "params": options.params, "rounds": options.rounds}
    if options.secure and options.clients < LEAST_SECURE:
        raise ConfigError(f"--clients {options.clients} --secure: devices take part with {LEAST_SECURE} or more")
    if options.durability:
        if options.codec or options.secure:
            raise ConfigError("--codec, --secure: --durability compares databases; leave one of them out")
        if options.rounds < 2 * options.series:
            raise ConfigError(f"--series {options.series}: two rounds at least in each are more than --rounds {options.rounds}")
        with databases() as found:
            costs = asyncio.run(compare(options, found))
        tell_costs(setting | {"series": options.series}, costs, options.json)
        return
    for database in options.database or ["sqlite"]:
        load = Load(**setting, codec=options.codec, database=database, secure=options.secure)
        tell(setting | asyncio.run(measure(load)), options.json)


def tell_costs(setting: dict[str, int], costs: list[Figures], as_json: bool) -> None:
    """Print what durability costs."""
    if as_json:
        print(json.dumps(setting | {"databases": costs}))
        return
    told = "{clients} clients, {params} parameters, {rounds} rounds without training over each, in {series} series, TLS, processes"
    print(told.format(**setting))
    for what in ("round", "cycle"):
        for each in costs:
            told = f"{what}  {each['database']:18} p50 {each[f'{what}_ms_p50']:8.2f} ms"
            if each["database"] != IN_MEMORY:
                told += "    adds {:+6.2f} ms ({:+.2f} to {:+.2f})".format(
                    *(each[f"{what}_added_ms{end}"] for end in ("_p50", "_p25", "_p75"))
                )
            print(told)


def tell(found: Figures, as_json: bool) -> None:
    """Print the figures."""
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{found['clients']} clients, {found['params']} parameters, {found['rounds']} rounds without training, TLS, real processes"
    )
    print(f"database   {found['database']}" + (f"    codec {found['codec']}" if found["codec"] else ""))
    print(f"round      p50 {found['round_ms_p50']:8.2f} ms    p95 {found['round_ms_p95']:8.2f} ms")
    print(f"cycle      p50 {found['cycle_ms_p50']:8.2f} ms    p95 {found['cycle_ms_p95']:8.2f} ms    from one opening to the next")
    print(f"bare call  p50 {found['bare_call_ms_p50']:8.2f} ms    a round is {found['round_in_bare_calls']:.1f} of these")
    beyond = f"    {found['client_peak_beyond_imports_in_models']:.2f} x the model beyond its imports"
    print(f"server     peak {mb(found['server_peak_bytes'])}, {mb(found['server_ready_bytes'])} when it is ready", end="")
    print(f"    CPU {found['server_cpu_s_per_round'] * 1000:8.2f} ms a round")
    print(f"client     peak {mb(found['client_peak_bytes'])}, {mb(found['client_imports_bytes'])} after its imports", end="")
    print(f"    CPU {found['client_cpu_s_per_round'] * 1000:8.2f} ms a round{beyond if found['params'] >= LARGE_PARAMS else ''}")
    if (sent := found["client_sent_bytes_per_round"]) is None:
        print("bytes      not measured: there is no ss (iproute2)")
    else:
        received, model = found["client_received_bytes_per_round"], found["model_bytes"]
        print(f"bytes      of a client in a round: sent {sent:.0f}, received {received:.0f}, and the model has {model}")
    if "secure_to_clear_cycle" in found:
        clear, ratio = found["clear_cycle_ms_p50"], found["secure_to_clear_cycle"]
        print(f"secure     a cycle is {ratio:.2f} x that of the same rounds in the clear, p50 {clear:.2f} ms", end="")
        print(f"; a client sent {found['clear_client_sent_bytes_per_round'] or 0:.0f} bytes there")
    print(f"launch     {found['launch_s']:.2f} s until the first round is done")
    for kind in FLOORS:
        seconds, rate = found[f"{kind}_floor_s"], found[f"{kind}_floor_bytes_per_s"]
        cycle, alone = (found[f"payload_to_{kind}_floor_in_{what}"] for what in ("cycle", "round"))
        print(f"floor      {kind:9} {seconds * 1000:9.2f} ms, {rate / 1e9:.3f} GB/s", end="")
        print(f"    payload in a cycle at {cycle:.1%} of it, in a round at {alone:.1%}")


def mb(size_bytes: float) -> str:
    """For people."""
    return f"{size_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    tidily(main)
