"""How long a round takes when nothing is trained: real processes, TLS on loopback, the coordinator as users run it.

    python benchmarks/rounds.py --clients 2 --params 1700 [--rounds 200] [--database URL ...] [--json]

Prints the median and 95th percentile of the rounds' duration (from opening until the version is written), of the whole cycle (from
one opening to the next: with all commits, and what clients do in between), and beside them, measured in the same run, what one bare
unary gRPC call over TLS takes on this machine: their ratio is what can be compared between machines. With several databases
(`--database sqlite --database sqlite:// --database postgresql://…`) it prints what durability costs: the same federation over each;
`sqlite` is a file in the state folder, `sqlite://` keeps all in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
import pandas as pd
import yaml
from choral.plan import Kind
from choral.v1 import admin_pb2 as pb
from choral.wire import KINDS
from choral_deploy.operator import Operator
from choral_deploy.processes import Children, started
from choral_server.trust import make_authority
from grpc_health.v1 import health_pb2, health_pb2_grpc

TASK = "empty_task:task"
HERE = Path(__file__).resolve().parent
NAMES = {"sqlite": "SQLite, a file", "sqlite://": "SQLite, in memory"}
WARM_UP = 10  # rounds that are not counted


def prepare(folder: Path, options: argparse.Namespace, database: str) -> None:
    """Certificates, a configuration, and one shard for all."""
    make_authority(folder, ["localhost", "127.0.0.1"])
    pd.DataFrame({"x": [1.0, 2.0], "y": [0.0, 0.0]}).to_csv(folder / "shard.csv", index=False)
    config = {
        "listen": "127.0.0.1:0",
        "tls": {"certificate": "server.pem", "key": "server.key"},
        "state": "state",
        "task": TASK,
        "run": {"rounds": options.rounds + WARM_UP, "cohort_size": options.clients, "keep_versions": 2},
        "evaluation": {"clients": False},
        "database": None if database == "sqlite" else database,
        "exit_when_done": True,
    }
    (folder / "choral.yaml").write_text(yaml.safe_dump(config))


async def measure(folder: Path, options: argparse.Namespace) -> dict[str, float | int]:
    """Run the federation and return the figures."""
    async with started() as children:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def listen(line: str) -> None:
            if '"coordinator ready"' in line:
                ready.set_result(json.loads(line)["address"])

        arguments = [
            "choral_deploy.cli",
            "server",
            "--config",
            str(folder / "choral.yaml"),
            "--log-format",
            "json",
            "--log-level",
            "info",
        ]
        server = await children.start("coordinator", arguments, folder / "coordinator.log", listen)
        address = await ready
        durations = asyncio.create_task(watch(folder / "state" / "admin.sock"))
        call_s = await bare_call(address, (folder / "ca.pem").read_bytes())
        clients = [await start_client(children, folder, address, number) for number in range(options.clients)]
        await asyncio.gather(*(child.succeed() for child in [server, *clients]))
        opened, seconds = np.array((await durations)[WARM_UP:]).T
        cycles = np.diff(opened)
    return {
        "clients": options.clients,
        "params": options.params,
        "rounds": len(seconds),
        "round_ms_p50": float(np.percentile(seconds, 50) * 1000),
        "round_ms_p95": float(np.percentile(seconds, 95) * 1000),
        "cycle_ms_p50": float(np.percentile(cycles, 50) * 1000),
        "cycle_ms_p95": float(np.percentile(cycles, 95) * 1000),
        "bare_call_ms_p50": call_s * 1000,
        "round_in_bare_calls": float(np.percentile(seconds, 50) / call_s),
    }


async def start_client(children: Children, folder: Path, address: str, number: int) -> object:
    """One client process."""
    name = f"client-{number}"
    options = {
        "--name": name,
        "--server": address,
        "--task": TASK,
        "--data": folder / "shard.csv",
        "--ca": folder / "ca.pem",
        "--state": folder / name,
        "--holdout": 0,
        "--threads": 1,
        "--log-level": "warning",
    }
    flags = [str(part) for option in options.items() for part in option]
    return await children.start(name, ["choral_deploy.cli", "client", *flags], folder / f"{name}.log")


async def watch(socket: Path) -> list[tuple[float, float]]:
    """When each training round opened, and its duration, in seconds."""
    durations = []
    training = KINDS[Kind.TRAINING]
    async with Operator(socket).stub() as admin:
        async for change in admin.Watch(pb.WatchRequest()):
            if change.WhichOneof("change") == "round" and change.round.kind == training and change.round.duration_s > 0:
                durations.append((change.round.opened_at.ToNanoseconds() / 1e9, change.round.duration_s))
    return durations


async def bare_call(address: str, ca: bytes, calls: int = 300) -> float:
    """Median seconds of a unary call over TLS to the coordinator while it waits."""
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        taken = []
        for _ in range(calls):
            began = time.perf_counter()
            await check(health_pb2.HealthCheckRequest())
            taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--params", type=int, default=1700)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--database", action="append", help="once for each to be measured; a file in the state folder by default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["CHORAL_EMPTY_PARAMS"] = str(options.params)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    for database in options.database or ["sqlite"]:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), options, database)
            found = asyncio.run(measure(Path(name), options)) | {"database": NAMES.get(database, "PostgreSQL")}
        tell(found, options.json)


def tell(found: dict[str, float | int | str], as_json: bool) -> None:
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
    sys.exit(main())
