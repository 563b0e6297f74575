"""What each codec costs in bytes and in accuracy: real rounds on handwritten digits, for each codec the same but for its bits.

    python benchmarks/compression.py --speed [--json]
    python benchmarks/compression.py [--clients 4] [--rounds 30] [--seeds 1] [--codec int8 --codec topk+zstd …] [--json]

scikit-learn's digits (1 797 images of 8 × 8 pixels) are dealt to the clients; the model is the bundled 64 → 32 → 10 network
of 2 410 parameters. For each codec and seed a coordinator and its clients, real processes over TLS, train for so many rounds.

Bytes up are those of the results' payloads, of one client and round on the average, as the coordinator has recorded them; bytes
down those of a version in the form that clients fetch, a header of some 600 bytes included, the mean over the rounds. Accuracy is
the last version's on the test images that no client has, the mean over the seeds; a point is one image in a hundred.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from choral import codecs
from choral.errors import ChoralError, Unreachable
from choral.plan import Kind
from choral.tasks.shards import deal
from choral.v1 import admin_pb2 as pb
from choral.wire import KINDS
from choral_server.config import Compression
from federation import at_least, federation, progress, tidily

TASK = "choral.tasks.digits:task"
CODECS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32+zstd": {"zstd": True},
    "bf16": {"upload": "bf16"},
    "bf16+zstd": {"upload": "bf16", "zstd": True},
    "int8": {"upload": "int8"},
    "int8+zstd": {"upload": "int8", "zstd": True},
    "topk": {"upload": "topk"},
    "topk+zstd": {"upload": "topk", "zstd": True},
    "topk 1 %": {"upload": "topk", "topk_share": 0.01},
    "down bf16": {"download": "bf16"},
    "down delta": {"download": "delta"},
    "int8, bf16": {"upload": "int8", "download": "bf16"},
}
"""by name, run.compression"""


@dataclass(frozen=True)
class Found:
    """One run: payload bytes of each accepted result, bytes in which each trained version is fetched, accuracy of the last one."""

    up_bytes: tuple[int, ...]
    down_bytes: tuple[int, ...]
    accuracy: float


async def measure(compression: Mapping[str, Any], options: argparse.Namespace, seed: int, dealt: Mapping[str, Path]) -> Found:
    """One run. Raises ChoralError: a round was abandoned, or a process failed."""
    run = {"rounds": options.rounds, "cohort_size": options.clients, "seed": seed, "compression": dict(compression)}
    evaluation = {"clients": False, "test_set": str(dealt["test"])}
    async with federation(TASK, run, evaluation=evaluation) as here:
        await here.start_clients(options.clients, data=[dealt[name] for name in names(options.clients)])
        sent: dict[str, int] = {}
        fetched: dict[int, int] = {}
        accuracy: dict[int, float] = {}
        with suppress(Unreachable):  # the coordinator ends when the run is over
            async with here.operator.stub() as admin:
                async for change in admin.Watch(pb.WatchRequest()):
                    take(change, sent, fetched, accuracy)
    if len(sent) != options.rounds * options.clients or not accuracy:
        raise ChoralError(f"{len(sent)} results were seen of {options.rounds} rounds and {options.clients} clients")
    trained = [fetched[number] for number in sorted(fetched)[-options.rounds :]]  # not the initial weights, nor the statistics
    return Found(tuple(sent.values()), tuple(trained), accuracy[max(accuracy)])


def take(change: pb.WatchResponse, sent: dict[str, int], fetched: dict[int, int], accuracy: dict[int, float]) -> None:
    """Note what an accepted result weighs, and a version in the form in which clients that attend fetch it, and how good it is."""
    if change.WhichOneof("change") == "round" and change.round.kind == KINDS[Kind.TRAINING]:
        if change.round.state == pb.ROUND_STATE_ABANDONED:
            raise ChoralError(f"round {change.round.number} was abandoned: {change.round.reason}")
        sent.update({part.assignment: part.payload_bytes for part in change.round.parts if part.state == "accepted"})
    if change.WhichOneof("change") == "version":
        version = change.version.version
        if version.number not in fetched:  # as it was published
            fetched[version.number] = min([version.size_bytes, *(form.size_bytes for form in version.forms)])
        found = {metric.name: metric.value for metric in change.version.test}
        if "accuracy" in found:
            accuracy[change.version.version.number] = found["accuracy"]


def names(clients: int) -> list[str]:
    """Whose shards there are."""
    return [f"shard-{number}" for number in range(clients)]


async def compare(options: argparse.Namespace, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """A row for each codec."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="digits-") as folder:
        dealt = deal("digits", names(options.clients), Path(folder))
        for name in options.codec or CODECS:
            found = []
            for seed in range(options.seeds):
                found.append(await measure(CODECS[name], options, seed, dealt))
                advance()
            rows.append(row(name, found))
    return rows


def row(name: str, found: Sequence[Found]) -> dict[str, Any]:
    """What was found with one codec."""
    up, down = (np.concatenate([getattr(one, which) for one in found]) for which in ("up_bytes", "down_bytes"))
    accuracies = [one.accuracy for one in found]
    return {
        "codec": name,
        "up_bytes": float(up.mean()),
        "down_bytes": float(down.mean()),
        "accuracy": float(np.mean(accuracies)),
        "accuracies": accuracies,
    }


def against(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what they are to float32's, if that was measured."""
    plain = next((one for one in rows if one["codec"] == "float32"), None)
    if plain is None:
        return list(rows)
    return [
        one
        | {
            "up_to_float32": one["up_bytes"] / plain["up_bytes"],
            "down_to_float32": one["down_bytes"] / plain["down_bytes"],
            "points_lost": 100 * (plain["accuracy"] - one["accuracy"]),
        }
        for one in rows
    ]


def speed(name: str, repeats: int = 9) -> dict[str, Any]:
    """Bytes to float32, and MB of float32 encoded and decoded a second of CPU, for normally distributed values: the best repeat."""
    codec = Compression(**CODECS[name]).codec
    values = np.random.default_rng(0).normal(size=4 * codecs.BLOCK).astype(np.float32)
    best = [float("inf")] * 2
    for _ in range(repeats):
        began = time.process_time()
        payload = b"".join(codecs.encoded(codecs.blocks(values), codec, codecs.rng_of(0)))
        between = time.process_time()
        decoded = sum(block.size for block in codecs.decoded(io.BytesIO(payload).read, codec, values.size))
        best = [min(best[0], between - began), min(best[1], time.process_time() - between)]
        assert decoded == values.size
    encoding, decoding = (values.nbytes / 1e6 / seconds for seconds in best)
    return {"codec": name, "to_float32": len(payload) / values.nbytes, "encode_mb_per_s": encoding, "decode_mb_per_s": decoding}


def tell_speeds(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print the figures."""
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'codec':14} {'to float32':>10} {'encode MB/s':>12} {'decode MB/s':>12}")
    for one in rows:
        print(f"{one['codec']:14} {one['to_float32']:10.4f} {one['encode_mb_per_s']:12.0f} {one['decode_mb_per_s']:12.0f}")


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(1), default=4)
    parser.add_argument("--rounds", type=at_least(1), default=30)
    parser.add_argument("--seeds", type=at_least(1), default=1)
    parser.add_argument("--codec", action="append", choices=list(CODECS))
    parser.add_argument("--speed", action="store_true", help="no rounds: how fast updates are encoded and decoded")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.speed:
        tell_speeds([speed(name) for name in CODECS if "down" not in name and "," not in name], options.json)
        return
    with progress("runs", len(options.codec or CODECS) * options.seeds) as advance:
        rows = against(asyncio.run(compare(options, advance)))
    tell(rows, options)


def tell(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the figures."""
    if options.json:
        print(json.dumps(rows))
        return
    print(f"digits, 2 410 parameters, {options.clients} clients, {options.rounds} rounds, seeds: {options.seeds}")
    print(f"{'codec':14} {'bytes up':>9} {'':>7} {'bytes down':>10} {'':>7} {'accuracy':>9} {'points lost':>11}")
    for one in rows:
        up, down = (f"{one[ratio]:6.3f}×" if ratio in one else f"{'':7}" for ratio in ("up_to_float32", "down_to_float32"))
        lost = f"{one['points_lost']:11.2f}" if "points_lost" in one else ""
        transfers = f"{one['up_bytes']:9.0f} {up} {one['down_bytes']:10.0f} {down}"
        print(f"{one['codec']:14} {transfers} {100 * one['accuracy']:8.2f}% {lost}")


if __name__ == "__main__":
    tidily(main)
