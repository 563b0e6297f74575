"""The demo: a coordinator and clients as processes of their own, over TLS on loopback, from raw data to a report."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from choral.errors import ChoralError, ConfigError
from choral.metrics import value_of
from choral.plan import Kind
from choral.tasks.shards import deal
from choral.v1 import admin_pb2 as pb
from choral.wire import KINDS, metrics_from_pb
from choral_server.trust import make_authority

from choral_deploy.display import Display
from choral_deploy.given import hand_over
from choral_deploy.operator import Operator
from choral_deploy.processes import Child, Children, started
from choral_deploy.report import Report

TASK = "choral.tasks.boston_housing:task"
HOLDOUT = 0.1
METRIC = "mse"
_MARK = ".choral-demo"
_CLI = "choral_deploy.cli"
_TRAINING = KINDS[Kind.TRAINING]
DELTA, _MOST_EPSILON = 1e-5, 1e3
_BEARABLE = 0.03
"""standard deviation of the noise on each weight that the model bears in a round: with it the clip shrinks where clients are few"""
_NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy")


@dataclass
class Observed:
    """What the coordinator told while it ran."""

    test_mse: dict[int, float] = field(default_factory=dict)
    round_s: list[float] = field(default_factory=list)
    first_version: int | None = None
    outcome: pb.Run | None = None
    epsilon: dict[int, float] = field(default_factory=dict)
    """what was spent when a round opened, by round"""

    def take(self, change: pb.WatchResponse) -> None:
        """Note one change."""
        match change.WhichOneof("change"):
            case "version":
                mse = value_of(metrics_from_pb(change.version.test), METRIC)
                if mse is not None:
                    self.test_mse[change.version.version.number] = mse
            case "round":
                if change.round.duration_s > 0 and (change.round.kind, change.round.state) == (_TRAINING, pb.ROUND_STATE_DONE):
                    self.round_s.append(change.round.duration_s)
                    self.first_version = change.round.version if self.first_version is None else self.first_version
            case "spending" if change.spending.state == "spent" and change.spending.kind == _TRAINING:
                self.epsilon[change.spending.round] = change.spending.epsilon_models
            case "run":
                self.outcome = change.run


@dataclass(frozen=True)
class Terms:
    """How the clients are protected: by sums alone, or by noise for a budget."""

    secure: bool = False
    dp_epsilon: float | None = None
    noise: float | None = None


def names(count: int) -> list[str]:
    """alice, bob, … and then client-11, client-12, …"""
    return [*_NAMES[:count], *(f"client-{number}" for number in range(len(_NAMES) + 1, count + 1))]


async def run(
    rounds: int, clients: Sequence[str], seed: int, out: Path, secure: bool = False, dp_epsilon: float | None = None
) -> Report:
    """Train, compare, and leave all of it in `out`; `secure`: the coordinator sees sums alone; `dp_epsilon`: at this price.

    Raises ConfigError: `out` is somebody else's, one client alone is to be hidden, or so much privacy cannot be kept;
    ChoralError: a process failed.
    """
    began = time.monotonic()
    if secure and len(clients) < 2:
        raise ConfigError(f"--clients {len(clients)} --secure: the sum of one client is its own update: give 3 or more")
    if secure and dp_epsilon is not None:
        raise ConfigError("--secure contradicts --dp-epsilon in this release: take one of the two")
    private = _privacy(rounds, len(clients), dp_epsilon) if dp_epsilon is not None else {}
    _prepare(out)
    shards = deal("boston_housing", clients, out, seed)
    special = private | ({"secure_aggregation": {"minimum_cohort": len(clients)}} if secure else {})
    config = _configure(out, rounds, len(clients), seed, shards["test"], special)
    if secure:
        _guard([shards[client].parent / "state" for client in clients])
    observed = Observed()
    with Display(METRIC) as display:
        async with started() as children:
            display.say("starting the coordinator and the clients")
            await _federate(children, config, out, {client: shards[client] for client in clients}, observed, display)
            federated_s = time.monotonic() - began
            display.say("for comparison: each device alone, and all data pooled")
            alone, pooled = await _compare(children, out, shards, clients, rounds, seed)
    terms = Terms(secure, dp_epsilon, private["privacy"]["noise"] if private else None)
    return _report(observed, out, clients, seed, terms, alone, pooled, federated_s, began)


def _prepare(out: Path) -> None:
    """An empty folder at `out`; what an earlier demo left there goes."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARK).exists():
            raise ConfigError(f"--out {out}: is not empty and no demo made it; give another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    (out / "logs").mkdir()


def _guard(states: Sequence[Path]) -> None:
    """Devices that take part in secure sums only; with two of them, each must say that it knows what the other learns."""
    guard = {"secure_aggregation": True, "min_cohort": len(states)}
    for state in states:
        state.mkdir()
        (state / "guard.yaml").write_text(yaml.safe_dump(guard, sort_keys=False), encoding="utf-8")


def _privacy(rounds: int, clients: int, epsilon: float) -> dict[str, Any]:
    """As much noise as the budget asks for: everybody takes part in each round, and in one more that measures the features."""
    if not 0 < epsilon <= _MOST_EPSILON:
        raise ConfigError(f"--dp-epsilon {epsilon:g}: give a number above 0, at most {_MOST_EPSILON:g}")
    from choral.privacy.accounting import Release, noise_for

    noise = noise_for(epsilon, DELTA, lambda noise: {Release(noise, expected=clients, population=clients): rounds + 1})
    clip = min(1.0, _BEARABLE * clients / noise)
    return {"privacy": {"epsilon": epsilon, "delta": DELTA, "noise": noise, "clip": clip}}


def _configure(out: Path, rounds: int, clients: int, seed: int, test_set: Path, special: dict[str, Any]) -> Path:
    home = out / "coordinator"
    make_authority(home, ["localhost", "127.0.0.1"])
    test_set.rename(home / "test.csv")
    config = {
        "listen": "127.0.0.1:0",
        "tls": {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem", "ca_key": "ca.key"},
        "state": "state",
        "task": TASK,
        "run": {"name": "boston", "rounds": rounds, "seed": seed, "cohort_size": clients, "deadline_s": 120} | special,
        "evaluation": {"test_set": "test.csv"} | ({"clients": False} if "privacy" in special else {}),
        "exit_when_done": True,
    }
    path = home / "choral.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


async def _federate(
    children: Children, config: Path, out: Path, shards: dict[str, Path], observed: Observed, display: Display
) -> None:
    """Run the federation to its end."""
    server, address = await _start_coordinator(children, config, out)
    operator = Operator.at(config)
    watching = asyncio.create_task(_watch(operator, observed, display))
    everyone = [server]
    for name, path in shards.items():
        hand_over(path.parent / "token", await operator.token(name))
        everyone.append(await _start_client(children, name, path, address, out))
    try:
        async with asyncio.TaskGroup() as group:  # the first process that fails ends the demo
            for child in everyone:
                group.create_task(child.succeed())
        await asyncio.gather(watching, return_exceptions=True)  # it ends with the coordinator
    except* ChoralError as failures:
        raise failures.exceptions[0] from None
    finally:
        watching.cancel()
    if observed.outcome is None or observed.outcome.state != pb.RUN_STATE_FINISHED:
        raise ChoralError(f"the run did not finish; see {out / 'logs' / 'coordinator.log'}")


async def _start_coordinator(children: Children, config: Path, out: Path) -> tuple[Child, str]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def listen(line: str) -> None:
        if not ready.done() and '"coordinator ready"' in line:
            ready.set_result(json.loads(line)["address"])

    arguments = [_CLI, "server", "--config", str(config), "--log-format", "json"]
    child = await children.start("the coordinator", arguments, out / "logs" / "coordinator.log", listen)
    child.following.add_done_callback(lambda _: ready.cancel())
    try:
        return child, await ready
    except asyncio.CancelledError:
        if not child.following.done():
            raise  # the demo was interrupted
        await child.succeed()  # raises why it ended
        raise ChoralError(f"the coordinator ended before it was ready; see {child.log}") from None


async def _start_client(children: Children, name: str, shard: Path, address: str, out: Path) -> Child:
    options = {
        "--name": name,
        "--server": address,
        "--task": TASK,
        "--data": str(shard),
        "--token": str(shard.parent / "token"),
        "--state": str(shard.parent / "state"),
        "--holdout": str(HOLDOUT),
        "--threads": "1",
    }
    flags = [part for option in options.items() for part in option]
    return await children.start(name, [_CLI, "client", *flags], out / "logs" / f"{name}.log")


async def _watch(operator: Operator, observed: Observed, display: Display) -> None:
    async with operator.stub() as admin:
        async for change in admin.Watch(pb.WatchRequest()):
            observed.take(change)
            display.show(change)


async def _compare(
    children: Children, out: Path, shards: dict[str, Path], clients: Sequence[str], rounds: int, seed: int
) -> tuple[dict[str, float], float]:
    """Mean squared error on the test set of each device alone, and of all data pooled."""
    free = asyncio.Semaphore(os.cpu_count() or 1)
    test_set = out / "coordinator" / "test.csv"

    async def measure(name: str, paths: Sequence[Path]) -> float:
        async with free:
            numbers = (str(rounds), str(seed), str(HOLDOUT))
            arguments = ["choral_deploy.baseline", TASK, str(test_set), *numbers, *map(str, paths)]
            child = await children.start(f"the comparison {name}", arguments, out / "logs" / f"{name}.log")
            return float(json.loads(await child.succeed())[METRIC])

    measured = await asyncio.gather(
        measure("pooled", [shards[client] for client in clients]),
        *(measure(f"{client}-alone", [shards[client]]) for client in clients),
    )
    return dict(zip(clients, measured[1:], strict=True)), measured[0]


def _report(
    observed: Observed,
    out: Path,
    clients: Sequence[str],
    seed: int,
    terms: Terms,
    alone: dict[str, float],
    pooled: float,
    federated_s: float,
    began: float,
) -> Report:
    versions = sorted(version for version in observed.test_mse if version > (observed.first_version or 0))
    history = [observed.test_mse[version] for version in versions]
    checkpoint = out / "model.safetensors"
    shutil.copyfile(out / "coordinator" / "state" / "runs" / "boston" / "versions" / "latest.safetensors", checkpoint)
    report = Report(
        rounds=len(observed.round_s),
        clients=list(clients),
        seed=seed,
        test_mse=history[-1],
        best_mse=min(history),
        alone_mse=alone,
        pooled_mse=pooled,
        round_s_p50=float(np.percentile(observed.round_s, 50)),
        round_s_p95=float(np.percentile(observed.round_s, 95)),
        federated_s=federated_s,
        wall_s=time.monotonic() - began,
        checkpoint=str(checkpoint),
        plot=str(out / "plot.png"),
        history=history,
        secure=terms.secure,
        dp_budget=terms.dp_epsilon,
        dp_delta=DELTA if terms.dp_epsilon is not None else None,
        dp_noise=terms.noise,
        epsilon=[observed.epsilon[round] for round in sorted(observed.epsilon)],
    )
    report.draw(out / "plot.png")
    (out / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    return report
