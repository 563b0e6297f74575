"""What differential privacy costs in accuracy: digits among many simulated clients, for several ε beside the same without noise.

    python benchmarks/dp_utility.py [--clients 200] [--cohort 200] [--rounds 60] [--clip 0.5] [--epsilon 1 2 4 8 16] [--seeds 2]
                                    [--delta 1e-5] [--adaptive] [--plot FILE] [--json]

scikit-learn's digits (1 797 images of 8 × 8 pixels) are dealt to the clients, seven images each; the model is the bundled
64 → 32 → 10 network of 2 410 parameters. Clients are simulated one after the other in this process, by the code that clients run
(`fit`), and their updates are summed by the code that the coordinator runs (`PrivateSum`): simulated is only what is between. Each
round draws its cohort by Poisson sampling, if it is smaller than all; noise is what the accountant asks for.

Accuracy is the last model's on the 359 images that no client has, the mean over the seeds, of which only training and the deal are
functions: noise never is. Nothing is chosen by looking at it. The row "no noise" clips updates as the others do, "plain" does not.

Membership is how well the last model tells who took part (Yeom et al. 2018, CSF): how often its loss on a client's images is lower
than on as many images that no client has. 50 % is a guess.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choral.errors import ConfigError
from choral.evaluation import evaluate
from choral.flat import describe
from choral.manifest import Manifest
from choral.metrics import LOSS, value_of
from choral.plan import Training, seed_for
from choral.privacy.accounting import Accountant, Release, Sampling, epsilon, noise_for
from choral.privacy.noise import Integers, gaussian
from choral.standardize import standardize_of
from choral.statistics import Moments
from choral.task import load_task
from choral.tasks.shards import deal
from choral_client.train import fit
from choral_server.aggregate import WeightedSum
from choral_server.cohort import drawn
from choral_server.privacy import AdaptiveClip, noise_of
from choral_server.private_sum import PrivateSum, Terms
from choral_server.rounds import Part, PartState
from choral_server.strategies.fedavg import step
from federation import at_least, progress, tidily
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Subset

TASK = load_task("choral.tasks.digits:task")
TRAINING = Training(epochs=5, batch_size=8, learning_rate=0.05)
CLIP_SHARE = 0.02
PLAIN, NO_NOISE = "plain", "no noise"
Flat = NDArray[np.float32]


def silent(count: int) -> Integers:
    """No noise."""
    return np.zeros(count, np.int64)


@dataclass(frozen=True)
class Kept:
    """What is kept of one row: which ε, with how much noise, and of each seed's last model how good it is, and what it betrays."""

    name: str
    noise: float
    spent: float
    accuracies: tuple[float, ...]
    memberships: tuple[float, ...]

    @property
    def membership(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.memberships))

    @property
    def accuracy(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.accuracies))


class Simulation:
    """Clients with their shards, one model that each of them trains in turn, and a test set."""

    def __init__(self, options: argparse.Namespace, seed: int, folder: Path) -> None:
        self._options = options
        self._seed = seed
        self._folder = folder
        names = [f"client-{number}" for number in range(options.clients)]
        paths = deal("digits", names, folder, seed)
        self._shards = {name: TASK.examples(paths[name]) for name in names}
        self._test = TASK.examples(paths["test"])
        self._model = TASK.initial_model(seed)
        standardise_by_ranges(self._model)
        self._manifest: Manifest = describe(self._model)

    def train(self, noise: float | None, clip: float, advance: Any) -> tuple[float, float]:
        """All rounds with this noise (0: only clipping, None: neither); accuracy and membership at the end."""
        weights = flat(self._model, self._manifest)
        first = weights.copy()
        sampling = Sampling.POISSON if self._options.cohort < self._options.clients else Sampling.NONE
        for number in range(self._options.rounds):
            draw = drawn(sampling, sorted(self._shards), self._options.cohort)
            total = self._sum(noise, clip, draw.expected)
            for client in draw.clients:
                self._add(total, weights, client, number)
            if isinstance(total, PrivateSum):
                total.release()
                if total.within is not None:
                    clip = AdaptiveClip().next(clip, total.within)
            weights = step(weights, total.mean())
            advance()
        load(self._model, self._manifest, weights)
        accuracy = value_of(evaluate(TASK, self._model, self._test), "accuracy")
        membership = self._membership()
        load(self._model, self._manifest, first)
        assert accuracy is not None, "it is among the task's metrics"
        return accuracy, membership

    def _membership(self) -> float:
        """How often the loss on a client's images is lower than on as many that nobody has."""
        inside = np.array([self._loss(shard) for shard in self._shards.values()])
        size = max(1, sum(map(len, self._shards.values())) // len(self._shards))
        outside = np.array(
            [self._loss(Subset(self._test, range(at, at + size))) for at in range(0, len(self._test) - size + 1, size)]
        )
        return float((inside[:, None] < outside).mean() + (inside[:, None] == outside).mean() / 2)

    def _loss(self, examples: Any) -> float:
        loss = value_of(evaluate(TASK, self._model, examples), LOSS)
        assert loss is not None, "it is always measured"
        return loss

    def _sum(self, noise: float | None, clip: float, expected: int) -> WeightedSum | PrivateSum:
        if noise is None:
            return WeightedSum(self._manifest.size, 1)
        if noise == 0:
            return PrivateSum(self._manifest.size, Terms(clip, 1.0, expected), silent)
        if not self._options.adaptive:
            return PrivateSum(self._manifest.size, Terms(clip, noise, expected), gaussian())
        terms = Terms(clip, noise / math.sqrt(1 - CLIP_SHARE), expected, noise_of(CLIP_SHARE, noise))
        return PrivateSum(self._manifest.size, terms, gaussian())

    def _add(self, total: WeightedSum | PrivateSum, weights: Flat, client: str, number: int) -> None:
        load(self._model, self._manifest, weights)
        fit(TASK, self._model, self._shards[client], TRAINING, seed_for(self._seed, number, client))
        path = self._folder / "update"
        (flat(self._model, self._manifest) - weights).astype("<f4").tofile(path)
        total.fold(Part(f"{number}/{client}", client, PartState.ACCEPTED, examples=1), path)


def standardise_by_ranges(model: nn.Module) -> None:
    """As if numbers were spread evenly over their ranges: known without the data, so it costs nothing."""
    layer = standardize_of(model)
    assert layer is not None, "the task has one"
    assert TASK.ranges is not None, "and its ranges"
    low, high = np.array(TASK.ranges).T
    layer.fill(Moments(1.0, (low + high) / 2, np.square(high - low) / 12))


def flat(model: nn.Module, manifest: Manifest) -> Flat:
    state = model.state_dict()
    return np.concatenate([state[entry.name].detach().reshape(-1).numpy() for entry in manifest.averaged]).astype(np.float32)


def load(model: nn.Module, manifest: Manifest, weights: Flat) -> None:
    state = model.state_dict()
    for entry in manifest.averaged:
        part = weights[entry.offset : entry.offset + entry.size].reshape(entry.shape)
        state[entry.name].copy_(torch.from_numpy(part.copy()))


def rows_of(options: argparse.Namespace) -> list[tuple[str, float | None, float]]:
    """Name, noise and ε of each row."""
    sampling = Sampling.POISSON if options.cohort < options.clients else Sampling.NONE

    def releases(noise: float) -> dict[Release, int]:
        return {Release(noise, sampling, options.cohort, options.clients): options.rounds}

    rows: list[tuple[str, float | None, float]] = [(PLAIN, None, math.inf), (NO_NOISE, 0.0, math.inf)]
    for target in options.epsilon:
        noise = noise_for(target, options.delta, releases, Accountant.PLD)
        rows.append((f"ε = {target:g}", noise, epsilon(releases(noise), options.delta, Accountant.PLD)))
    return rows


def compare(options: argparse.Namespace) -> list[Kept]:
    """A row for each ε, and the two without noise."""
    rows = rows_of(options)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in rows}
    with (
        tempfile.TemporaryDirectory(prefix="choral-dp-") as folder,
        progress("rounds", len(rows) * options.seeds * options.rounds) as advance,
    ):
        for seed in range(options.seeds):
            simulation = Simulation(options, seed, Path(folder) / str(seed))
            for name, noise, _ in rows:
                found[name].append(simulation.train(noise, options.clip, advance))
    return [
        Kept(name, noise or 0.0, spent, *(tuple(each) for each in zip(*found[name], strict=True))) for name, noise, spent in rows
    ]


def draw(rows: Sequence[Kept], options: argparse.Namespace, path: Path) -> None:
    """Accuracy over ε."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    private = [row for row in rows if math.isfinite(row.spent)]
    axes.plot(
        [row.spent for row in private], [100 * row.accuracy for row in private], "o-", color="#762a83", label="with noise for ε"
    )
    for row, style in zip(rows[:2], ("-", ":"), strict=True):
        axes.axhline(100 * row.accuracy, color="#1b7837", linestyle=style, label=f"{row.name}: {100 * row.accuracy:.1f} %")
    axes.axhline(10, color="grey", linewidth=0.8, label="a guess")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row.spent for row in private], [f"{row.spent:.2g}" for row in private])
    axes.set(xlabel=f"ε at δ = {options.delta:g}", ylabel="accuracy on images nobody has, %", ylim=(0, 100))
    axes.set_title(f"Digits among {options.clients} clients, {options.cohort} in each of {options.rounds} rounds")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def show(rows: Sequence[Kept]) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "noise", "ε", "accuracy", "each seed", "membership")
    for row in rows:
        each = ", ".join(f"{100 * accuracy:.1f}" for accuracy in row.accuracies)
        table.add_row(
            row.name, f"{row.noise:.3g}", f"{row.spent:.4g}", f"{100 * row.accuracy:.1f} %", each, f"{100 * row.membership:.1f} %"
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(2), default=200)
    parser.add_argument("--cohort", type=at_least(1), default=200)
    parser.add_argument("--rounds", type=at_least(1), default=60)
    parser.add_argument("--seeds", type=at_least(1), default=2)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--adaptive", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.cohort > options.clients:
        raise ConfigError(f"--cohort {options.cohort}: is more than --clients {options.clients}; give at most that")
    torch.set_num_threads(1)
    rows = compare(options)
    if options.plot is not None:
        draw(rows, options, options.plot)
    if options.json:
        print(json.dumps([vars(row) | {"accuracy": row.accuracy, "membership": row.membership} for row in rows]))
    else:
        show(rows)


if __name__ == "__main__":
    tidily(main)
