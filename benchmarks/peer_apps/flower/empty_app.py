"""The empty work as a Flower app: clients change every number, the server takes the weighted mean, and nothing is trained.

It works with NumPy; with CHORAL_PEER_TORCH each process imports torch, as those of users who train with it do for each message.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

if os.environ.get("CHORAL_PEER_TORCH"):
    import torch  # noqa: F401 - as users do who train with it

NOISE = 1 << 20
server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; the end of each, and the beginning of the first, is told in the file `times`."""
    config = context.run_config
    times, clients = Path(str(config["times"])), int(config["clients"])

    def note(number: int, arrays: ArrayRecord) -> None:
        with times.open("a") as file:
            file.write(f"{time.time()}\n")

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    initial = ArrayRecord({"weights": Array(np.zeros(int(config["params"]), dtype=np.float32))})
    strategy.start(grid, initial, num_rounds=int(config["rounds"]), evaluate_fn=note)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Change every number."""
    (name, array), *_ = message.content["arrays"].items()
    weights = array.numpy()
    if not weights.flags.writeable:
        weights = weights.copy()
    random = np.random.default_rng((os.getpid(), context.node_id))
    noise = random.standard_normal(min(NOISE, weights.size), dtype=np.float32) * np.float32(0.001)
    for start in range(0, weights.size, NOISE):
        piece = weights[start : start + NOISE]
        piece += noise[: piece.size]
    answer = {"arrays": ArrayRecord({name: Array(weights)}), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(answer), reply_to=message)
