"""What secure aggregation costs in arithmetic: a client's masking, the coordinator's unmasking, and Flower's SecAgg+ beside them.

    python benchmarks/secagg.py [--clients 10 100] [--params 1000000] [--dropouts 0.3] [--flower] [--venvs FOLDER] [--json]

One process, one thread. All steps of the protocol are done by as many clients as are asked for; the vectors of most of them are
not, since they are alike: one client's is masked, and the mask that is left is taken off one sum.

    keys        a client's own: keys, everybody's signatures checked, its secrets shared, sealed for each, and theirs opened
    mask        fixed point and all masks, added to the vector
    unmask      the coordinator: secrets recovered and checked, what is left of the masks taken off; nobody gone, or a share of them
    upload      bytes of the masked vector, as a multiple of float32's
    memory      taken for it at a time, the masked vector included, as a multiple of the update

With --flower, Flower's own functions do the same in their own environment (see peers.py), right after ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from choral.errors import ChoralError
from choral.secagg.fixed_point import FixedPoint, Ring, fixed_point
from choral.secagg.masks import Mask
from choral.secagg.roster import Signer, Terms
from choral_client.masking import Floor, Masking
from choral_server.unmasking import Unmasking
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federation import HERE, at_least, tidily
from numpy.typing import NDArray
from peers import PEERS, at_home, installed

TERMS = Terms("run", 1, bytes(32), bytes(32))
CLIP = 1.0
BLOCK = 1 << 16  # elements


class Sum:
    """A secure sum of so many clients, led as far as the masked updates."""

    def __init__(self, clients: int) -> None:
        self.names = [f"client-{number:05}" for number in range(clients)]
        signing = {name: Ed25519PrivateKey.generate() for name in self.names}
        signers = {name: Signer(key.sign, key.public_key().public_bytes_raw()) for name, key in signing.items()}
        self.coordinator = Unmasking(TERMS, lambda said: None, clients)
        self.clients = {
            name: Masking(TERMS, name, signers[name], lambda said: None, Floor(2), lambda terms: None) for name in self.names
        }
        for client in self.clients.values():
            self.coordinator.take_advert(client.advertise())
        self.coordinator.close_adverts()

    def masks(self) -> tuple[float, Mask]:
        """Seconds for one client's part until it has its mask, and the mask."""
        first, *others = self.names
        began = time.perf_counter()
        sealed = self.clients[first].take_roster(self.coordinator.roster)
        spent_s = time.perf_counter() - began
        self.coordinator.take_shares(first, sealed)
        for name in others:
            self.coordinator.take_shares(name, self.clients[name].take_roster(self.coordinator.roster))
        shares = self.coordinator.shares_for(first)
        began = time.perf_counter()
        mask = self.clients[first].take_shares(shares)
        spent_s += time.perf_counter() - began
        for name in others:
            self.clients[name].take_shares(self.coordinator.shares_for(name))
        return spent_s, mask

    def reveal(self, survivors: Iterable[str]) -> None:
        """All that the survivors say until the coordinator can unmask."""
        there = self.coordinator.close(list(survivors))
        for name in there:
            self.coordinator.take_signature(name, self.clients[name].take_survivors(there))
        for name in there:
            said = self.clients[name].reveal(self.coordinator.signatures_for(name))
            self.coordinator.take_revealed(name, said.mask_seeds, said.key_seeds)


def measure(clients: int, params: int, dropouts: float) -> dict[str, Any]:
    """One row."""
    update = np.random.default_rng(1).uniform(-1, 1, params).astype(np.float32)
    point = fixed_point(clients, CLIP)
    sum_ = Sum(clients)
    keys_s, mask = sum_.masks()
    began = time.perf_counter()
    masked = masked_by(mask, update, point)
    mask_s = time.perf_counter() - began
    gone = round(clients * dropouts)
    found = {"clients": clients, "params": params, "keys_s": keys_s, "mask_s": mask_s, "gone": gone}
    found["upload_to_float32"] = masked.nbytes / update.nbytes
    found["memory_in_vectors"] = peak_bytes(lambda: masked_by(Mask([bytes(16)] * clients, []), update, point)) / update.nbytes
    sum_.reveal(sum_.names)
    found["unmask_s"] = timed(lambda: sum_.coordinator.mask().add_to(masked))
    if gone:
        another = Sum(clients)
        another.masks()
        another.reveal(another.names[gone:])
        found["unmask_gone_s"] = timed(lambda: another.coordinator.mask().add_to(masked))
    return found


def masked_by(mask: Mask, update: NDArray[np.float32], point: FixedPoint) -> Ring:
    """The update as it is sent, made block by block."""
    masked = np.empty(len(update), dtype=point.dtype)
    for start in range(0, len(update), BLOCK):
        block = masked[start : start + BLOCK]
        block[:] = point.encode(update[start : start + BLOCK])
        mask.add_to(block)
    return masked


def peak_bytes(do: Callable[[], object]) -> int:
    """The most memory that it takes at a time."""
    tracemalloc.start()
    try:
        do()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def timed(do: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


async def flower(row: dict[str, Any], venvs: Path) -> dict[str, Any]:
    """The same by Flower's functions."""
    venv = await installed(PEERS["flower"], venvs, torch=False)
    told: dict[str, Any] = {}
    for gone in dict.fromkeys((0, row["gone"])):
        process = await asyncio.create_subprocess_exec(
            str(venv / "bin/python"),
            str(HERE / "peer_apps/flower_secagg.py"),
            *(str(number) for number in (row["clients"], row["params"], gone)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(os.environ) | at_home(venv, venvs) | {"FLWR_TELEMETRY_ENABLED": "0"},
        )
        said, wrong = await process.communicate()
        if process.returncode != 0:
            raise ChoralError(f"flower_secagg.py failed: {wrong.decode('utf-8', 'replace').strip().splitlines()[-1:]}")
        figures = json.loads(said)
        told |= {"mask_s": figures["client_s"]} if gone == 0 else {}
        told["unmask_gone_s" if gone else "unmask_s"] = figures["server_s"]
    return told


def tell(rows: list[dict[str, Any]]) -> None:
    """A line each; beside Flower's figures, how often ours goes into theirs."""
    for row in rows:
        theirs = row.get("flower", {})
        print(f"{row['clients']} clients, {row['params']} parameters")
        for name, label in (("keys_s", "keys"), ("mask_s", "mask"), ("unmask_s", "unmask"), ("unmask_gone_s", "")):
            if name in row:
                label = label or f"unmask, {row['gone']} gone"
                beside = f"   Flower {1e3 * theirs[name]:10.1f} ms   {theirs[name] / row[name]:6.1f} ×" if name in theirs else ""
                print(f"  {label:<16}{1e3 * row[name]:10.1f} ms{beside}")
        print(f"  {'upload':<16}{row['upload_to_float32']:10.3f} of float32")
        print(f"  {'memory':<16}{row['memory_in_vectors']:10.2f} of the update")


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=at_least(2), default=[10, 100])
    parser.add_argument("--params", type=at_least(1), default=1_000_000)
    parser.add_argument("--dropouts", type=float, default=0.3, help="share of the clients that go away after they have sent shares")
    parser.add_argument("--flower", action="store_true", help="measure Flower's functions as well")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache/choral-peers", help="where the peers are installed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not 0 <= options.dropouts < 1 / 3:
        parser.error(f"--dropouts {options.dropouts:g}: a third of the clients cannot go away; give 0 to 0.33")
    rows = []
    for clients in options.clients:
        row = measure(clients, options.params, options.dropouts)
        if options.flower:
            row["flower"] = asyncio.run(flower(row, options.venvs.resolve()))
        rows.append(row)
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        tell(rows)


if __name__ == "__main__":
    tidily(main)
