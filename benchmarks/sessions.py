"""What many clients cost one coordinator: sessions that are idle, and rounds with a large cohort, over mTLS on loopback.

    python benchmarks/sessions.py [--sessions 2000] [--cohort 1000] [--params 1700] [--rounds 10] [--idle-s 30] [--json]
    python benchmarks/sessions.py --sweep docs/scale.png [--sessions 2000] [--cohort 800] [--params 1000000] [--json]

One process (`swarm.py`) holds all clients; each has its own certificate, connection and stream. Printed are

    memory       how much the coordinator's resident memory grows with each session
    joins        sessions per second, while clients connect as fast as they can
    heartbeats   the share of one core that the coordinator takes while all sessions are idle and say as often as they are asked to
                 (every 15 s, or seldomer if there are many: limits.heartbeats_per_s) that they live
    round        medians of the rounds' duration, from opening until the version is written
    announcement from the opening of a round, before it is stored, until a client of the cohort has heard of it
    cpu          what the coordinator and the swarm spend on one client's part in one round

The swarm shares this machine's cores with the coordinator, and takes more of them: it does the clients' half of each handshake and
transfer for all. Announcements are timed by the swarm, whose own queue is in them.

`--sweep` measures how costs grow with the number of sessions, the cohort and the model's size, each by itself in four steps up to
what is given, fits the exponent b of cost = a · size^b, prints it and draws it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from choral.flat import describe
from choral.v1 import admin_pb2 as pb
from choral_server.trust import CA_CERTIFICATE
from empty_task import task
from federation import Federation, at_least, federation, progress, tidily
from swarm import Swarm, swarm

TASK = "empty_task:task"
FIRST = 10  # sessions that pay for what all share, and are not counted
WARM_UP = 2  # rounds that are not counted
HEARTBEAT_S = 15.0
ENDLESS = 1_000_000  # rounds
STEP = 2  # from one size of a sweep to the next
SETTLING_S = 1.0  # until what joining has left behind is freed


@dataclass(frozen=True)
class Size:
    """What is measured: so many sessions, of which so many take part in a round, with a model of so many parameters."""

    sessions: int
    cohort: int
    params: int


@dataclass(frozen=True)
class Figures:
    """What one federation gave."""

    session_kb: float
    joins_per_s: float
    heartbeat_core: float
    round_s_p50: float
    announcement_s_p50: float
    announcement_s_p99: float
    server_cpu_ms_per_part: float
    swarm_cpu_ms_per_part: float
    server_memory_mb: float


async def measure(size: Size, rounds: int, idle_s: float) -> Figures:
    """Hold the sessions, and run rounds with some of them."""
    os.environ["CHORAL_EMPTY_PARAMS"] = str(size.params)
    settings = {"rounds": ENDLESS, "cohort_size": size.cohort, "keep_versions": 2}
    tls = {"certificate": "server.pem", "key": "server.key", "ca": CA_CERTIFICATE}
    manifest = describe(task.initial_model(0))
    who = (task.name, task.version)
    async with federation(TASK, settings, tls=tls, heartbeat_s=HEARTBEAT_S) as here, here.operator.stub() as admin:
        await admin.PauseRun(pb.PauseRunRequest())
        async with swarm(here.folder, here.address, who, manifest, size.params) as clients:
            session_kb, joins_per_s = await joined(here, clients, size.sessions)
            share = await spent_by(here, asyncio.sleep(idle_s)) / idle_s
            await admin.ResumeRun(pb.ResumeRunRequest())
            await published(clients, WARM_UP)
            before_s = time.process_time()
            server_s = await spent_by(here, published(clients, rounds))
            swarm_s = time.process_time() - before_s
            done = (await admin.ListRounds(pb.ListRoundsRequest(limit=WARM_UP + rounds + 1))).rounds
            memory_mb = here.memory_mb()
            await admin.StopRun(pb.StopRunRequest())
    counted = [each for each in done if WARM_UP <= each.number < WARM_UP + rounds]
    waits = [heard - opened(each) for each in counted for heard in clients.announced_at[each.number]]
    parts = rounds * size.cohort
    return Figures(
        session_kb=session_kb,
        joins_per_s=joins_per_s,
        heartbeat_core=share,
        round_s_p50=float(np.median([each.duration_s for each in counted])),
        announcement_s_p50=float(np.percentile(waits, 50)),
        announcement_s_p99=float(np.percentile(waits, 99)),
        server_cpu_ms_per_part=1000 * server_s / parts,
        swarm_cpu_ms_per_part=1000 * swarm_s / parts,
        server_memory_mb=memory_mb,
    )


async def joined(here: Federation, clients: Swarm, sessions: int) -> tuple[float, float]:
    """Let them join; the coordinator's memory for each, in kB, and how many joined in a second."""
    await clients.join(FIRST)
    before_mb = here.memory_mb()
    with progress("sessions", sessions - FIRST) as advance:
        took_s = await clients.join(sessions - FIRST, advance)
    await asyncio.sleep(SETTLING_S)
    return 1024 * (here.memory_mb() - before_mb) / (sessions - FIRST), (sessions - FIRST) / took_s


async def spent_by(here: Federation, what: Awaitable[None]) -> float:
    """The CPU seconds that the coordinator takes meanwhile."""
    before_s = here.server_cpu_s()
    await what
    return here.server_cpu_s() - before_s


async def published(clients: Swarm, versions: int) -> None:
    """Wait for so many more versions."""
    with progress("rounds", versions) as advance:
        for _ in range(versions):
            await clients.awaiting(clients.versions.get())
            advance()


@dataclass(frozen=True)
class Growth:
    """How a cost grew with a size: cost = factor · size^exponent, fitted to the logarithms."""

    cost: str
    size: str
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    exponent: float
    factor: float

    @classmethod
    def of(cls, cost: str, size: str, sizes: Sequence[int], costs: Sequence[float]) -> Growth:
        """Fitted by least squares."""
        exponent, logarithm = np.polyfit(np.log(sizes), np.log(costs), 1)
        return cls(cost, size, tuple(sizes), tuple(costs), float(exponent), float(np.exp(logarithm)))


async def sweep(most: Size, rounds: int, idle_s: float) -> list[Growth]:
    """One size after the other grows up to the most, by a factor of `STEP` each time; the other two stay small."""
    small = Size(max(FIRST + 1, most.sessions // STEP**3), max(1, most.cohort // STEP**3), max(1, most.params // 10**3))
    grown = [most.sessions // STEP**by for by in (3, 2, 1, 0)]
    found = [await measure(Size(max(FIRST + 1, many), min(small.cohort, many), small.params), rounds, idle_s) for many in grown]
    memory = [each.session_kb * many / 1024 for each, many in zip(found, grown, strict=True)]
    joining = [many / each.joins_per_s for each, many in zip(found, grown, strict=True)]
    growths = [Growth.of("memory, MB", "sessions", grown, memory), Growth.of("joining, s", "sessions", grown, joining)]
    cohorts = [max(1, most.cohort // STEP**by) for by in (3, 2, 1, 0)]
    found = [await measure(Size(max(FIRST + 1, many), many, small.params), rounds, idle_s) for many in cohorts]
    growths += of_rounds("clients in the cohort", cohorts, found)
    params = [max(1, most.params // 10**by) for by in (3, 2, 1, 0)]
    found = [await measure(Size(small.sessions, small.cohort, many), rounds, idle_s) for many in params]
    return growths + of_rounds("parameters", params, found, small.cohort)


def of_rounds(size: str, sizes: Sequence[int], found: Sequence[Figures], cohort: int | None = None) -> list[Growth]:
    """What rounds cost; `cohort` is that of all of them, if it is not what grows."""
    cpu_s = [each.server_cpu_ms_per_part * (cohort or many) / 1000 for each, many in zip(found, sizes, strict=True)]
    durations_s = [each.round_s_p50 for each in found]
    return [Growth.of("a round, s", size, sizes, durations_s), Growth.of("coordinator's CPU a round, s", size, sizes, cpu_s)]


def draw(growths: Sequence[Growth], path: Path) -> None:
    """One panel for each size."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(each.size for each in growths))
    figure = Figure(figsize=(4.2 * len(sizes), 3.8), layout="constrained")
    for panel, size in zip(figure.subplots(1, len(sizes)), sizes, strict=True):
        for each in (each for each in growths if each.size == size):
            (points,) = panel.loglog(each.sizes, each.costs, "o")
            fitted = [each.factor * number**each.exponent for number in each.sizes]
            panel.loglog(each.sizes, fitted, color=points.get_color(), label=f"{each.cost} ~ n^{each.exponent:.2f}")
        panel.set_xlabel(size)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def opened(round: pb.Round) -> float:
    """When, by the clock on the wall."""
    return round.opened_at.ToNanoseconds() / 1e9


def report(size: Size, found: Figures, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print(json.dumps(asdict(size) | asdict(found)))
        return
    print(f"{size.sessions} sessions, rounds of {size.cohort} with {size.params} parameters:")
    print(f"  memory        {found.session_kb:.0f} kB a session; the coordinator in all {found.server_memory_mb:.0f} MB")
    print(f"  joins         {found.joins_per_s:.0f} a second")
    print(f"  heartbeats    {100 * found.heartbeat_core:.1f} % of a core")
    print(f"  round         {found.round_s_p50:.2f} s")
    print(f"  announcement  {found.announcement_s_p50:.2f} s (median), {found.announcement_s_p99:.2f} s (99th percentile)")
    print(f"  cpu           {found.server_cpu_ms_per_part:.2f} ms a part; {found.swarm_cpu_ms_per_part:.2f} ms in the swarm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=at_least(FIRST + 1), default=2000)
    parser.add_argument("--cohort", type=at_least(1), default=1000)
    parser.add_argument("--params", type=at_least(1), default=1700)
    parser.add_argument("--rounds", type=at_least(1), default=10)
    parser.add_argument("--idle-s", type=at_least(1), default=30)
    parser.add_argument("--sweep", type=Path, metavar="PNG", help="measure how costs grow, and draw that")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.cohort > options.sessions:
        parser.error(f"--cohort {options.cohort} is more than --sessions {options.sessions}")
    size = Size(options.sessions, options.cohort, options.params)
    if options.sweep is not None:
        growths = asyncio.run(sweep(size, options.rounds, options.idle_s))
        draw(growths, options.sweep)
        for each in growths:
            told = f"{each.cost:30} grows with {each.size:22} as n^{each.exponent:.2f}"
            print(json.dumps(asdict(each)) if options.json else told)
        return
    report(size, asyncio.run(measure(size, options.rounds, options.idle_s)), options.json)


if __name__ == "__main__":
    tidily(main)
