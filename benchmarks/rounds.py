"""How long a round takes when nothing is trained: real processes, TLS on loopback, the coordinator as users run it.

    python benchmarks/rounds.py --clients 2 --params 1700 [--rounds 200] [--database URL ...] [--json]
    python benchmarks/rounds.py --durability [--rounds 200] [--series 20] [--json]

Prints the median and 95th percentile of the rounds' duration (from opening until the version is written), of the whole cycle (from
one opening to the next: with all commits, and what clients do in between), and beside them, measured in the same run, what one bare
unary gRPC call over TLS takes on this machine: their ratio is what can be compared between machines. `--database` measures over
another database, or over several: `sqlite` is a file in the state folder, `sqlite://` keeps all in memory.

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
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, contextmanager

import numpy as np
from choral.errors import ConfigError
from choral.v1 import admin_pb2 as pb
from federation import Times, at_least, federation, progress, tidily, timings

IN_MEMORY = "SQLite, in memory"
NAMES = {"sqlite://": IN_MEMORY, "sqlite": "SQLite, a file"}
WARM_UP = 10  # rounds that are not counted
SETTLING = 3  # the same in each series
ENDLESS = 1_000_000  # rounds
TASK = "empty_task:task"

Rounds = list[pb.Round]
Figures = dict[str, float | str]


async def measure(options: argparse.Namespace, database: str) -> Figures:
    """Run the federation over a database and return the figures."""
    settings = {"rounds": WARM_UP + options.rounds, "cohort_size": options.clients}
    async with federation(TASK, settings, database=url(database)) as here, aclosing(here.rounds()) as done:
        call_s = await here.bare_call_s()
        await here.start_clients(options.clients)
        with progress(f"rounds over {name_of(database)}", settings["rounds"]) as advance:
            seen = []
            async for each in done:
                seen.append(each)
                advance()
    rounds, cycles = timings([seen[WARM_UP:]])
    return {
        "database": name_of(database),
        "round_ms_p50": float(np.percentile(rounds, 50)),
        "round_ms_p95": float(np.percentile(rounds, 95)),
        "cycle_ms_p50": float(np.percentile(cycles, 50)),
        "cycle_ms_p95": float(np.percentile(cycles, 95)),
        "bare_call_ms_p50": call_s * 1000,
        "round_in_bare_calls": float(np.percentile(rounds, 50) / call_s / 1000),
    }


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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--database", action="append", help="once for each to be measured; a file in the state folder by default")
    what.add_argument("--durability", action="store_true", help="compare the databases with each other")
    parser.add_argument("--series", type=at_least(1), default=20, help="into which --durability divides the rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["CHORAL_EMPTY_PARAMS"] = str(options.params)
    setting = {"clients": options.clients, "params": options.params, "rounds": options.rounds}
    if options.durability:
        if options.rounds < 2 * options.series:
            raise ConfigError(f"--series {options.series}: two rounds at least in each are more than --rounds {options.rounds}")
        with databases() as found:
            costs = asyncio.run(compare(options, found))
        tell_costs(setting | {"series": options.series}, costs, options.json)
        return
    for database in options.database or ["sqlite"]:
        tell(setting | asyncio.run(measure(options, database)), options.json)


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
    print(f"database   {found['database']}")
    print(f"round      p50 {found['round_ms_p50']:8.2f} ms    p95 {found['round_ms_p95']:8.2f} ms")
    print(f"cycle      p50 {found['cycle_ms_p50']:8.2f} ms    p95 {found['cycle_ms_p95']:8.2f} ms    from one opening to the next")
    print(f"bare call  p50 {found['bare_call_ms_p50']:8.2f} ms    a round is {found['round_in_bare_calls']:.1f} of these")


if __name__ == "__main__":
    tidily(main)
