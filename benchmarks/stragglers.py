"""What a round costs in which some of the cohort hang: real processes that are frozen (SIGSTOP) with their sockets open.

    python benchmarks/stragglers.py [--clients 10] [--hung 0.3] [--rounds 20] [--repetitions 3] [--train-ms 100] [--json]

A round wants as many results as there are clients that do not hang, and asks all of them: over-selection covers the hung ones. In
one federation, series of `--rounds` rounds follow each other, `--repetitions` times in turn:

    free     all are asked, and nobody hangs; the round ends with the first results that are enough
    spared   those that hang later are not asked (an operator has quarantined them), and the others all answer
    hung     all are asked, and the same ones as before hang

Figures are medians over all rounds of a kind: of their duration, and of the cycle from one opening to the next. All processes share
this machine's cores, and hung ones leave them to the others, as separate devices would not: compared with `free` that flatters the
hung rounds, compared with `spared` it does not. For the same reason training sleeps for `--train-ms`, in ten batches, in place of
computing. It takes equally long everywhere; with devices of different speed a round also gets longer because fewer are left to be
quick.

Frozen clients say nothing, but heartbeats are so far apart here that the coordinator asks them in every round, the hard case: with
the usual 15 s it would take them for gone after 45 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import numpy as np
from choral.errors import ChoralError, ConfigError
from choral.v1 import admin_pb2 as pb
from choral_deploy.processes import Child
from federation import Federation, at_least, federation, progress, tidily, timings
from slow_task import BATCHES

SETTLING = 5  # rounds that are not counted when clients have begun to hang, or to live again
HEARTBEAT_S = 600

Rounds = list[pb.Round]


async def measure(options: argparse.Namespace, hanging: int) -> dict[str, list[Rounds]]:
    """The rounds of each kind, as series of rounds that followed each other."""
    goal = options.clients - hanging
    settings = {
        "rounds": len(KINDS) * options.repetitions * (SETTLING + options.rounds),
        "cohort_size": goal,
        "over_selection": options.clients / goal - 1,
        "start_with": options.clients,
    }
    measured = {kind: list[Rounds]() for kind in KINDS}
    async with federation("slow_task:task", settings, BATCHES, heartbeat_s=HEARTBEAT_S) as here, aclosing(here.rounds()) as rounds:
        await here.start_clients(options.clients)
        others = here.clients[goal:]
        with progress("series of rounds", len(KINDS) * options.repetitions) as advance:
            for _ in range(options.repetitions):
                for kind, among in KINDS.items():
                    async with among(here, others):
                        measured[kind].append(await series(rounds, options.rounds))
                    advance()
    for kind, asked in (("free", options.clients), ("spared", goal), ("hung", options.clients)):
        check(kind, measured[kind], asked, {client.name for client in others})
    return measured


async def series(rounds: AsyncIterator[pb.Round], count: int) -> Rounds:
    """The next so many rounds, once things have settled."""
    return [await anext(rounds) for _ in range(SETTLING + count)][SETTLING:]


@asynccontextmanager
async def free(here: Federation, others: Sequence[Child]) -> AsyncIterator[None]:
    """Everyone takes part."""
    yield


@asynccontextmanager
async def spared(here: Federation, others: Sequence[Child]) -> AsyncIterator[None]:
    """The others are not asked meanwhile."""
    async with here.operator.stub() as admin:
        for client in others:
            await admin.QuarantineClient(pb.QuarantineClientRequest(client=client.name, reason="measuring without it"))
        yield
        for client in others:
            await admin.ReleaseClient(pb.ReleaseClientRequest(client=client.name))


@asynccontextmanager
async def hung(here: Federation, others: Sequence[Child]) -> AsyncIterator[None]:
    """The others are frozen meanwhile."""
    for client in others:
        client.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for client in others:
            client.process.send_signal(signal.SIGCONT)


KINDS: dict[str, Callable[[Federation, Sequence[Child]], AbstractAsyncContextManager[None]]] = {
    "free": free,
    "spared": spared,
    "hung": hung,
}


def check(kind: str, measured: list[Rounds], asked: int, others: set[str]) -> None:
    """Raises ChoralError: these rounds were not what was to be measured."""
    for done in (done for rounds in measured for done in rounds):
        if len(done.parts) != asked:
            raise ChoralError(f"{kind} round {done.number} asked {len(done.parts)} clients where it was to ask {asked}")
        alive = {part.client for part in done.parts if part.state == "accepted"} & others
        if kind == "hung" and alive:
            raise ChoralError(f"round {done.number} has a result of {', '.join(sorted(alive))}, which hung")


def figures(measured: list[Rounds]) -> dict[str, float]:
    """Medians in ms."""
    rounds, cycles = timings(measured)
    return {"round_ms_p50": float(np.median(rounds)), "cycle_ms_p50": float(np.median(cycles))}


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(2), default=10)
    parser.add_argument("--hung", type=float, default=0.3, help="share of the clients")
    parser.add_argument("--rounds", type=at_least(2), default=20, help="of each kind in each repetition")
    parser.add_argument("--repetitions", type=at_least(1), default=3)
    parser.add_argument("--train-ms", type=at_least(1), default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    hanging = round(options.clients * options.hung)
    if not 0 < hanging < options.clients:
        raise ConfigError(f"--hung {options.hung:g}: {hanging} of {options.clients} clients; some have to hang, and some not to")
    os.environ["CHORAL_TRAIN_S"] = str(options.train_ms / 1000)
    found = {kind: figures(measured) for kind, measured in asyncio.run(measure(options, hanging)).items()}
    tell(vars(options) | {"hung": hanging}, found)


def tell(setting: dict[str, Any], found: dict[str, dict[str, float]]) -> None:
    """Print the figures."""
    ratios = {
        f"{what}_to_{kind}": found["hung"][f"{what}_ms_p50"] / found[kind][f"{what}_ms_p50"]
        for kind in ("free", "spared")
        for what in ("round", "cycle")
    }
    if setting.pop("json"):
        print(json.dumps(setting | found | ratios))
        return
    goal = setting["clients"] - setting["hung"]
    print(
        "{clients} clients, {repetitions} x {rounds} rounds of each kind with {train_ms} ms of training".format(**setting), end=""
    )
    print(f" that want {goal} results, TLS, real processes")
    for kind, told in (
        ("free", "nobody hangs"),
        ("spared", f"{goal} are asked, nobody hangs"),
        ("hung", f"{setting['hung']} hang"),
    ):
        print(f"{told:28} round p50 {found[kind]['round_ms_p50']:8.2f} ms   cycle p50 {found[kind]['cycle_ms_p50']:8.2f} ms")
    for kind, told in (("free", "hung to nobody hangs"), ("spared", f"hung to {goal} are asked")):
        print(f"{told:28} {ratios[f'round_to_{kind}']:18.3f} x {ratios[f'cycle_to_{kind}']:22.3f} x")


if __name__ == "__main__":
    tidily(main)
