"""Who took part, read from a model that has learned by heart: membership inference without noise, and with noise for several ε.

    python benchmarks/membership.py [--clients 300] [--rounds 40] [--seeds 8] [--epsilon 8 2 1] [--delta 1e-5] [--clip 0.1]
                                    [--random-labels 0.25] [--plot FILE] [--json]

The setting is made for the attack. scikit-learn's digits (1 797 images of 8 × 8 pixels) are dealt to the clients, four or five
each, and a quarter of all labels is replaced by random ones. A model can only learn them by heart: they stand for what is true of
one client and nobody else. The network, 64 → 128 → 10, has 9 610 parameters for some 720 images. A toss of a fair coin for each
client decides whether it takes part; all who do are in all rounds. Clients are simulated one after the other in this process, by
the code that clients run (`fit`), and summed by the code that the coordinator runs (`PrivateSum`): simulated is only what is
between.

The attacker has the last model, and of each client its images with their labels, and says who took part. It is the client with all
its images that is guessed, as it is the client that noise is to protect. Each gets a score, higher if it rather was in:

    loss        the negative mean loss on its images (Yeom et al. 2018, CSF)
    reference   how much lower its loss is than in models that were trained without it (Watson et al. 2022, ICLR): those of the
                other seeds. They begin with the same weights, so the attacker knows the first model, how training goes, and what
                data there are, but neither the coins nor the noise

AUC is how often, of one client that was in and one that was not, the first has the higher score; 50 % is a guess. Advantage is
TPR - FPR at a threshold that was chosen on one half of the clients and is used on the other; 0 is a guess. Both are means over the
models, ± one standard error; models differ by coins and noise, not by images and labels. TPR at 1 % FPR (Carlini et al. 2022, S&P)
is of the scores in all models together, as the plotted curves are, whose first steps are single clients and mere chance. "At
most" is (e^ε - 1 + 2δ) / (e^ε + 1): no attack has a larger advantage in expectation.

Coins are the same in all rows: where those who are in happen to have the easier images, or the harder ones, the loss attack's
figures are off in the same direction in all of them. The other attack takes the difficulty out.

Rows are those of dp_utility.py: "plain" neither clips nor adds noise, "no noise" only clips. Accuracy is on the 359 images that no
client has, with their right labels. What is shown is how much these two attacks find here, and how much less of it there is with
noise. It is not shown what others would find, or these in another model: of all attacks speaks only ε.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choral import Standardize
from choral.evaluation import evaluate
from choral.flat import describe
from choral.metrics import LOSS, value_of
from choral.plan import Training, seed_for
from choral.privacy.noise import gaussian
from choral.task import load_task
from choral.tasks.shards import deal
from choral_client.train import fit
from choral_server.aggregate import WeightedSum
from choral_server.private_sum import PrivateSum, Terms
from choral_server.rounds import Part, PartState
from choral_server.strategies import ServerOptimizer, State, step
from dp_utility import flat, load, rows_of, silent, standardise_by_ranges  # type: ignore[import-not-found]
from federation import at_least, progress, tidily  # type: ignore[import-not-found]
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
CLASSES = 10
LOW_FPR = 0.01
TRAINING = Training(epochs=1, batch_size=8, learning_rate=0.3)
SERVER = ServerOptimizer(name="fedavgm")


def network() -> nn.Module:
    """64 → 128 → 10: four times as wide as the bundled one."""
    return nn.Sequential(Standardize(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))


TASK = replace(load_task("choral.tasks.digits:task"), model=network)


def by_loss(losses: Floats, members: Bools) -> Floats:
    """The negative loss (Yeom et al. 2018); all `(models, clients)`."""
    scores: Floats = -losses
    return scores


def by_reference(losses: Floats, members: Bools) -> Floats:
    """How much lower the loss is than that of the other models without the client (Watson et al. 2022); all `(models, clients)`.

    If the client was in all other models, they are what it is compared with.
    """
    without = ~members
    count = without.sum(axis=0) - without
    total = (losses * without).sum(axis=0) - losses * without
    all_others = (losses.sum(axis=0) - losses) / (len(losses) - 1)
    scores: Floats = np.where(count > 0, total / np.maximum(count, 1), all_others) - losses
    return scores


ATTACKS: dict[str, Callable[[Floats, Bools], Floats]] = {"loss": by_loss, "reference": by_reference}
"""by name; no score depends on who was in the model that it is for, only on who was in the others"""


def roc(scores: Floats, members: Bools) -> tuple[Floats, Floats]:
    """FPR and TPR, from (0, 0) to (1, 1), one point for each threshold: who has that score or a higher one is said to be in."""
    order = np.argsort(-scores, axis=None)
    ranked, inside = scores.flat[order], members.flat[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), ranked.size - 1)  # of those that have the same score
    right, wrong = np.cumsum(inside)[last], np.cumsum(~inside)[last]
    return np.append(0.0, wrong / wrong[-1]), np.append(0.0, right / right[-1])


def auc(scores: Floats, members: Bools) -> float:
    """The area under the ROC curve: how often a member's score is higher than another's; where they are equal, half."""
    fpr, tpr = roc(scores, members)
    return float((np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2).sum())


def tpr_at(most: float, scores: Floats, members: Bools) -> float:
    """The highest TPR at an FPR of `most` or less."""
    fpr, tpr = roc(scores, members)
    return float(tpr[fpr <= most].max())


def threshold(scores: Floats, members: Bools) -> float:
    """The score from which on to say "in", so that TPR - FPR is largest."""
    fpr, tpr = roc(scores, members)
    values = np.append(np.inf, np.unique(scores)[::-1])
    return float(values[np.argmax(tpr - fpr)])


def advantages(scores: Floats, members: Bools) -> Floats:
    """TPR - FPR in each model, `(models,)`; each half of the clients is judged by the threshold that is best for the other."""
    even = np.arange(scores.shape[1]) % 2 == 0
    found = []
    for half in (even, ~even):
        said = scores[:, half] >= threshold(scores[:, ~half], members[:, ~half])
        inside = members[:, half]
        found.append((said & inside).sum(axis=1) / inside.sum(axis=1) - (said & ~inside).sum(axis=1) / (~inside).sum(axis=1))
    mean: Floats = np.mean(found, axis=0)
    return mean


def most_advantage(epsilon: float, delta: float) -> float:
    """(e^ε - 1 + 2δ) / (e^ε + 1): no attack on what is (ε, δ)-private has a larger TPR - FPR."""
    without_delta = math.tanh(epsilon / 2)  # the same, and for an infinite ε, too
    return without_delta + delta * (1 - without_delta)


def most_tpr(fpr: Floats, epsilon: float, delta: float) -> Floats:
    """The highest TPR at each FPR (Kairouz, Oh & Viswanath 2015, ICML, theorem 2.1)."""
    bound: Floats = np.minimum(math.exp(epsilon) * fpr + delta, 1 - math.exp(-epsilon) * (1 - delta - fpr))
    return np.clip(bound, 0, 1)


@dataclass(frozen=True)
class Figure:
    """One figure of each model."""

    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the models."""
        return float(np.mean(self.each))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return float(np.std(self.each, ddof=1) / math.sqrt(len(self.each)))


@dataclass(frozen=True)
class Attacked:
    """What one attack finds in the models of one row; the last is of all models' scores together."""

    auc: Figure
    advantage: Figure
    tpr_at_low_fpr: float


@dataclass(frozen=True)
class Row:
    """Models with the same noise: how good they are, and each client's loss in them, of which `members` were in.

    `losses` and `members` are `(models, clients)`; `noise` is in clips, `spent` is ε at `delta`.
    """

    name: str
    noise: float
    spent: float
    delta: float
    accuracy: Figure
    losses: Floats = field(repr=False)
    members: Bools = field(repr=False)

    @property
    def bound(self) -> float:
        """No advantage is expected above this."""
        return most_advantage(self.spent, self.delta)

    def scores(self, attack: str) -> Floats:
        """By this attack, `(models, clients)`."""
        return ATTACKS[attack](self.losses, self.members)

    def attacked(self, attack: str) -> Attacked:
        """What this attack finds."""
        scores = self.scores(attack)
        areas = Figure(tuple(auc(*one) for one in zip(scores, self.members, strict=True)))
        gained = Figure(tuple(advantages(scores, self.members).tolist()))
        return Attacked(areas, gained, tpr_at(LOW_FPR, scores, self.members))


class Candidates:
    """Clients with their shards, of whom some take part, and the model that they train."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._update = folder / "update"
        self._names = [f"client-{number}" for number in range(options.clients)]
        paths = deal("digits", self._names, folder)
        random = np.random.default_rng(0)
        self._shards = [partly_random(TASK.examples(paths[name]), options.random_labels, random) for name in self._names]
        self._test = TASK.examples(paths["test"])
        self._model = TASK.initial_model(0)
        standardise_by_ranges(self._model)
        self._manifest = describe(self._model)
        self._first: NDArray[np.float32] = flat(self._model, self._manifest)

    def train(self, members: Bools, noise: float | None, seed: int, advance: Callable[[], None]) -> tuple[Floats, float]:
        """Train with these `members` `(clients,)` and this noise (0: only clipping, None: neither).

        Gives the last model's loss on each client's images, `(clients,)`, and its accuracy.
        """
        weights, state = self._first, State()
        for number in range(self._options.rounds):
            total = self._sum(noise)
            for client in np.flatnonzero(members):
                self._add(total, weights, int(client), number, seed)
            if isinstance(total, PrivateSum):
                total.release()
            weights, state = step(SERVER, weights, total.mean(), state)
            advance()
        load(self._model, self._manifest, weights)
        return np.array([self._measured(LOSS, shard) for shard in self._shards]), self._measured("accuracy", self._test)

    def _sum(self, noise: float | None) -> WeightedSum | PrivateSum:
        """As many are expected as the coins give on the average: the true number depends on each client."""
        if noise is None:
            return WeightedSum(self._manifest.size, 1)
        terms = Terms(self._options.clip, noise or 1.0, self._options.clients // 2)
        return PrivateSum(self._manifest.size, terms, gaussian() if noise else silent)

    def _add(self, total: WeightedSum | PrivateSum, weights: NDArray[np.float32], client: int, number: int, seed: int) -> None:
        name = self._names[client]
        load(self._model, self._manifest, weights)
        fit(TASK, self._model, self._shards[client], TRAINING, seed_for(seed, number, name))
        (flat(self._model, self._manifest) - weights).astype("<f4").tofile(self._update)
        total.fold(Part(f"{number}/{name}", name, PartState.ACCEPTED, examples=1), self._update)

    def _measured(self, metric: str, examples: Any) -> float:
        value = value_of(evaluate(TASK, self._model, examples), metric)
        assert value is not None, "it is always measured"
        return value


def partly_random(examples: Any, share: float, random: np.random.Generator) -> TensorDataset:
    """The same images, this share of whose labels is drawn anew from all classes."""
    x, y = examples.tensors
    drawn = torch.from_numpy(random.integers(CLASSES, size=len(y)))
    return TensorDataset(x, torch.where(torch.from_numpy(random.random(len(y)) < share), drawn, y))


def compare(options: argparse.Namespace) -> list[Row]:
    """A row for each ε, and the two without noise."""
    planned = rows_of(argparse.Namespace(**vars(options), cohort=options.clients))
    coins = np.array([np.random.default_rng(seed).random(options.clients) < 0.5 for seed in range(options.seeds)])
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="choral-membership-") as folder,
        progress("rounds", len(planned) * options.seeds * options.rounds) as advance,
    ):
        candidates = Candidates(options, Path(folder))
        for name, noise, spent in planned:
            trained = [candidates.train(members, noise, seed, advance) for seed, members in enumerate(coins)]
            losses, accuracies = zip(*trained, strict=True)
            rows.append(Row(name, noise or 0.0, spent, options.delta, Figure(accuracies), np.array(losses), coins))
    return rows


def draw(rows: Sequence[Row], options: argparse.Namespace, path: Path) -> None:
    """Each attack's ROC curves, of all models' scores together, with what each ε allows."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(picture)
    shades = ["#1b7837", "#e08214", *colormaps["Purples"](np.linspace(0.95, 0.5, len(rows) - 2))]
    grid = np.geomspace(1e-3, 1, 400)
    sides = picture.subplots(1, len(ATTACKS), sharey=True)
    for axes, attack in zip(sides, ATTACKS, strict=True):
        for row, color in zip(rows, shades, strict=True):
            label = f"{row.name}: AUC {100 * row.attacked(attack).auc.mean:.0f} %"
            axes.plot(*roc(row.scores(attack), row.members), color=color, label=label)
            if math.isfinite(row.spent):
                axes.plot(grid, most_tpr(grid, row.spent, row.delta), "--", color=color, linewidth=0.9)
        axes.plot(grid, grid, color="grey", linewidth=0.8, label="a guess")
        axes.plot([], [], "--", color="grey", linewidth=0.9, label="at most, by ε and δ")
        axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.1), title=f"attack by {attack}")
        axes.set_xlabel("FPR: share of those who were not in, but are said to be")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right")
    sides[0].set_ylabel("TPR: share of those who were in, and are said to be")
    picture.suptitle(
        f"Who took part: {options.clients} clients, half of them in, {options.seeds} models of {options.rounds} rounds each, "
        f"{100 * options.random_labels:g} % of labels random"
    )
    picture.savefig(path, dpi=130)


def told(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For programs."""

    def figures(attacked: Attacked) -> dict[str, Any]:
        return {
            "auc": attacked.auc.mean,
            "aucs": attacked.auc.each,
            "advantage": attacked.advantage.mean,
            "advantages": attacked.advantage.each,
            "tpr_at_low_fpr": attacked.tpr_at_low_fpr,
        }

    return [
        {
            "name": row.name,
            "noise": row.noise,
            "spent": row.spent if math.isfinite(row.spent) else None,  # JSON has no infinity
            "bound": row.bound,
            "accuracy": row.accuracy.mean,
            "accuracies": row.accuracy.each,
            "attacks": {attack: figures(row.attacked(attack)) for attack in ATTACKS},
        }
        for row in rows
    ]


def show(rows: Sequence[Row]) -> None:
    """For people."""
    print(
        f"{'':10} {'noise':>6} {'ε':>7} {'accuracy':>9}  {'attack':10} {'AUC':>14} {'TPR at 1 % FPR':>15}"
        f" {'advantage':>15} {'at most':>8}"
    )
    for row in rows:
        about = f"{row.name:10} {row.noise:6.3g} {row.spent:7.4g} {100 * row.accuracy.mean:7.1f} %"
        for attack in ATTACKS:
            found = row.attacked(attack)
            area = f"{100 * found.auc.mean:.1f} ± {100 * found.auc.error:.1f} %"
            advantage = f"{found.advantage.mean:.3f} ± {found.advantage.error:.3f}"
            low = f"{100 * found.tpr_at_low_fpr:.1f} %"
            print(f"{about}  {attack:10} {area:>14} {low:>15} {advantage:>15} {row.bound:8.4f}")
            about = " " * len(about)


def share(word: str) -> float:
    """What reads a number from 0 to 1 from the command line."""
    number = float(word)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{word} is not from 0 to 1")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=at_least(40), default=300)  # of fewer, the coin may leave no half without members
    parser.add_argument("--rounds", type=at_least(1), default=40)
    parser.add_argument("--seeds", type=at_least(2), default=8)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 2.0, 1.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--clip", type=float, default=0.1)
    parser.add_argument("--random-labels", type=share, default=0.25)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(options)
    if options.plot is not None:
        draw(rows, options, options.plot)
    if options.json:
        print(json.dumps(told(rows)))
    else:
        show(rows)


if __name__ == "__main__":
    tidily(main)
