"""What clients that lie do to a model whose updates are summed securely, and what helps: an attack × defence table of real rounds.

    python benchmarks/poisoning.py [--clients 9] [--liars 1] [--rounds 30] [--seeds 1] [--json]
                                   [--attack garbage …] [--defence groups …]

scikit-learn's digits (1 797 images of 8 × 8 pixels) are dealt to the clients; the model is the bundled 64 → 32 → 10 network of
2 410 parameters. For each attack, defence and seed a coordinator and its clients, real processes over TLS, try so many rounds of
training. Liars are the ordinary client with altered software (liars.py), or with an altered shard.

Accuracy is the last version's on the test images that no client has, the mean over the seeds. A round whose sum cannot be what was
asked for is abandoned and leaves the model as it was; a group whose sum cannot be is left out of its round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from choral.errors import Unreachable
from choral.plan import Kind
from choral.tasks.shards import deal
from choral.v1 import admin_pb2 as pb
from choral.wire import KINDS
from federation import Federation, at_least, federation, progress, tidily

TASK = "choral.tasks.digits:task"
MAX_UPDATE_NORM = 1.0
"""of nine clients, honest updates are up to 0.75 long in the third round, and 0.2 in the thirtieth"""
GROUPS = 3
ATTACKS = ("none", "flipped labels", "times -10", "times -100", "garbage")
"""what liars do; all but the first two are in liars.py"""
DEFENCES: dict[str, dict[str, Any]] = {
    "sum alone": {},
    "norm bound": {"max_update_norm": MAX_UPDATE_NORM},
    "groups": {"groups": GROUPS},
    "groups, norm bound": {"groups": GROUPS, "max_update_norm": MAX_UPDATE_NORM},
}
"""by name, keys of run and of run.secure_aggregation"""
_LEFT_OUT = "group left out"


@dataclass
class Found:
    """One run: how its rounds of training ended, and how good the versions were. `rounds` are to be tried."""

    rounds: int
    accuracy: dict[int, float] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    abandoned: dict[int, str] = field(default_factory=dict)
    groups_left_out: int = 0
    newest: int = 0

    def take(self, change: pb.WatchResponse) -> None:
        """Note what has changed."""
        kind = change.WhichOneof("change")
        if kind == "version":
            found = {metric.name: metric.value for metric in change.version.test}
            if "accuracy" in found:
                self.accuracy[change.version.version.number] = found["accuracy"]
        elif kind == "event" and not self.tried:
            self.groups_left_out += change.event.what == _LEFT_OUT
        elif kind == "round" and change.round.kind == KINDS[Kind.TRAINING] and not self.tried:
            if change.round.state == pb.ROUND_STATE_DONE:
                self.done.add(change.round.number)
                self.newest = change.round.version + 1
            elif change.round.state == pb.ROUND_STATE_ABANDONED:
                self.abandoned[change.round.number] = change.round.reason

    @property
    def tried(self) -> bool:
        """Whether all rounds have ended, one way or the other."""
        return len(self.done) + len(self.abandoned) >= self.rounds

    @property
    def over(self) -> bool:
        """Whether the last version is measured, too."""
        return self.tried and (not self.done or self.newest in self.accuracy)

    @property
    def final(self) -> float | None:
        """The last version's accuracy; None: there is no trained one."""
        return self.accuracy[self.newest] if self.done else None

    @property
    def reason(self) -> str:
        """Why the last round that was abandoned was."""
        return self.abandoned[max(self.abandoned)] if self.abandoned else ""


async def measure(attack: str, defence: str, options: argparse.Namespace, seed: int, dealt: Mapping[str, Path]) -> Found:
    """One run. Raises ChoralError: a process failed."""
    changes = dict(DEFENCES[defence])
    secure = {"minimum_cohort": 2} | ({"groups": changes.pop("groups")} if "groups" in changes else {})
    run = {
        "rounds": options.rounds,
        "cohort_size": options.clients,
        "quorum": options.clients - options.clients // GROUPS,  # as many as are left when a group is left out
        "start_with": options.clients,
        "seed": seed,
        "secure_aggregation": secure,
        "max_abandoned": options.rounds + 1,
        "retry_s": 0,
        **changes,
    }
    evaluation = {"clients": False, "test_set": str(dealt["test"])}
    found = Found(options.rounds)
    async with federation(TASK, run, evaluation=evaluation) as here:
        await start(here, attack, options, dealt)
        with suppress(Unreachable):  # the coordinator ends when the run is over
            async with here.operator.stub() as admin:
                async for change in admin.Watch(pb.WatchRequest()):
                    before = found.over
                    found.take(change)
                    if found.over and not before and found.abandoned:
                        await here.stop()
    return found


async def start(here: Federation, attack: str, options: argparse.Namespace, dealt: Mapping[str, Path]) -> None:
    """Start the clients, the liars first; all of them allow groups of two, which are left of three when one has gone."""
    for number in range(options.clients):
        state = here.folder / f"client-{number}"
        state.mkdir()
        (state / "guard.yaml").write_text("{secure_aggregation: true, min_cohort: 2}\n")
    shards = [dealt[name] for name in names(options.clients)]
    if attack == "flipped labels":
        shards[: options.liars] = [flipped(shard) for shard in shards[: options.liars]]
    liars = 0 if attack in ("none", "flipped labels") else options.liars
    await here.start_clients(liars, data=shards, software=("liars", attack))
    await here.start_clients(options.clients - liars, data=shards)


def flipped(shard: Path) -> Path:
    """The same images, each said to be nine less what it is."""
    frame = pd.read_csv(shard)
    lies = shard.with_name("flipped.csv")
    frame.assign(target=9 - frame["target"]).to_csv(lies, index=False)
    return lies


def names(clients: int) -> list[str]:
    """Whose shards there are."""
    return [f"shard-{number}" for number in range(clients)]


async def compare(options: argparse.Namespace, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """A row for each attack and defence."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="digits-") as folder:
        dealt = deal("digits", names(options.clients), Path(folder))
        for attack in options.attack or ATTACKS:
            for defence in options.defence or DEFENCES:
                found = []
                for seed in range(options.seeds):
                    found.append(await measure(attack, defence, options, seed, dealt))
                    advance()
                rows.append(row(attack, defence, found))
    return rows


def row(attack: str, defence: str, found: Sequence[Found]) -> dict[str, Any]:
    """What was found with one attack and defence."""
    finals = [one.final for one in found]
    there = [final for final in finals if final is not None]
    return {
        "attack": attack,
        "defence": defence,
        "accuracy": float(np.mean(there)) if len(there) == len(found) else None,
        "accuracies": finals,
        "done": sum(len(one.done) for one in found),
        "abandoned": sum(len(one.abandoned) for one in found),
        "groups_left_out": sum(one.groups_left_out for one in found),
        "reason": next((one.reason for one in reversed(found) if one.abandoned), ""),
    }


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(3 * GROUPS), default=9)
    parser.add_argument("--liars", type=at_least(1), default=1)
    parser.add_argument("--rounds", type=at_least(1), default=30)
    parser.add_argument("--seeds", type=at_least(1), default=1)
    parser.add_argument("--attack", action="append", choices=ATTACKS)
    parser.add_argument("--defence", action="append", choices=list(DEFENCES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.liars >= options.clients:
        parser.error(f"{options.liars} liars of {options.clients} clients: somebody must be honest")
    runs = len(options.attack or ATTACKS) * len(options.defence or DEFENCES) * options.seeds
    with progress("runs", runs) as advance:
        rows = asyncio.run(compare(options, advance))
    tell(rows, options)


def tell(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the figures."""
    if options.json:
        print(json.dumps(rows))
        return
    print(f"digits, {options.clients} clients, {options.liars} of them lie, {options.rounds} rounds tried, seeds: {options.seeds}")
    print(f"{'attack':15} {'defence':19} {'accuracy':>10} {'done':>5} {'abandoned':>10} {'groups left out':>16}")
    for one in rows:
        accuracy = f"{100 * one['accuracy']:9.2f}%" if one["accuracy"] is not None else "no version"
        counts = f"{one['done']:5} {one['abandoned']:10} {one['groups_left_out']:16}"
        print(f"{one['attack']:15} {one['defence']:19} {accuracy} {counts}")
    for one in rows:
        if one["reason"]:
            print(f"{one['attack']}, {one['defence']}: rounds were abandoned because {one['reason']}")


if __name__ == "__main__":
    tidily(main)
