"""The attack that secure aggregation is for, on what real clients upload plainly, on the same masked, and on the sum.

The federation is the hardest to defend: each client has one home of the Boston data, and takes one step of gradient descent on it.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from choral.errors import ConfigError
from choral.plan import Kind, Plan, SecurePlan, digest_of, seed_for
from choral.secagg.roster import Terms
from choral.secagg.summand import Summand
from choral.standardize import standardize_of
from choral.statistics import Moments
from choral.tasks.boston_housing import FEATURES, task
from choral.tasks.shards import boston_housing
from choral_client.data import Shard
from choral_client.work import Work
from choral_server.secure_aggregation import SecureAggregation
from safetensors.torch import save
from torch.utils.data import TensorDataset

from choral_deploy.attack_report import AttackReport, Victim
from choral_deploy.demo import names
from choral_deploy.inversion import FirstLayer, Floats, NothingToInvert, read_masked, read_plain
from choral_deploy.secure_sum import LEAST, secure_sum

VICTIMS, MOST = 20, 100  # above, a secure sum has another graph
_VERSION = 1
_EXACT = 0.01  # the error below which an example counts as found


@dataclass(frozen=True)
class Federation:
    """Clients with one home each, all homes that are there to train on, and the first version, a safetensors file."""

    homes: TensorDataset
    version: bytes
    seed: int

    @classmethod
    def of(cls, seed: int) -> Federation:
        """The version is the one that the statistics round leaves."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "homes.csv"
            boston_housing()[0].to_csv(path, index=False)
            homes = task.examples(path)
        model = task.initial_model(seed)
        standardize = standardize_of(model)
        assert isinstance(homes, TensorDataset)
        assert standardize is not None
        standardize.fill(Moments.of(homes.tensors[0].numpy()))
        return cls(homes, save(model.state_dict()), seed)

    def worker(self, home: int) -> Work:
        """The client that has that home and no other."""
        return Work(task, Shard(TensorDataset(*(tensor[home : home + 1] for tensor in self.homes.tensors)), None, 1))

    def features(self, home: int) -> Floats:
        """What the attacker is after, `(features,)`."""
        features: Floats = self.homes.tensors[0][home].numpy().astype(np.float64)
        return features

    def plan(self, client: str, cohort: int, secure: SecurePlan | None = None) -> Plan:
        """The task's own, but for one step on one example."""
        training = task.training.model_copy(update={"epochs": 1, "batch_size": 1})
        seed = seed_for(self.seed, _VERSION, client)
        return Plan(Kind.TRAINING, task.name, task.version, training, seed, False, cohort, secure)

    def update(self, home: int, plan: Plan) -> bytes:
        """What that client uploads if nothing is masked."""
        return b"".join(self.worker(home).do(plan, io.BytesIO(self.version), threading.Event()).payload)

    def summand(self, home: int, plan: Plan) -> Summand:
        """The same as it goes into a secure sum, not masked yet."""
        return self.worker(home).contribute(plan, io.BytesIO(self.version), threading.Event())


def run(clients: int, seed: int, out: Path) -> AttackReport:
    """Attack `VICTIMS` clients, each in a round of its own with `clients` in it; the picture is left in `out`.

    Raises ConfigError: there are too few or too many, the seed is none, or `out` is a file.
    """
    if not LEAST <= clients <= MOST:
        raise ConfigError(f"--clients {clients}: give {LEAST} to {MOST}; the sum of one is its update")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: give 0 or more")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    federation, rng = Federation.of(seed), np.random.default_rng(seed)
    layer = FirstLayer.of(federation.version, federation.worker(0).manifest)
    rounds = [rng.choice(len(federation.homes), clients, replace=False).tolist() for _ in range(VICTIMS)]
    victims = [_attack(federation, layer, homes, number) for number, homes in enumerate(rounds, start=1)]
    report = AttackReport.of(victims, layer, FEATURES, clients, seed, out / "attack.png")
    report.draw()
    return report


def _attack(federation: Federation, layer: FirstLayer, homes: Sequence[int], number: int) -> Victim:
    """One round of clients with these homes, of whom the first is the victim."""
    clients, settings = names(len(homes)), SecureAggregation(minimum_cohort=LEAST)
    secure = settings.plan(Kind.TRAINING, "attack", len(homes), weight_cap=1, max_norm=None)
    plans = {client: federation.plan(client, len(homes), secure) for client in clients}
    terms = Terms("attack", number, hashlib.sha256(federation.version).digest(), digest_of(plans[clients[0]]))
    numbers, manifest = settings.scale(len(homes)), federation.worker(homes[0]).manifest
    plain = federation.update(homes[0], federation.plan(clients[0], len(homes)))
    summed = secure_sum(
        terms, {client: federation.summand(home, plans[client]) for client, home in zip(clients, homes, strict=True)}
    )
    total = read_masked(summed.total, numbers, manifest)
    return Victim(
        true=federation.features(homes[0]),
        plain=guess(layer, read_plain(plain, manifest)),
        masked=guess(layer, read_masked(summed.uploads[clients[0]], numbers, manifest)),
        summed=guess(layer, total),
        given_away=_given_away(layer, total, [federation.features(home) for home in homes]),
    )


def guess(layer: FirstLayer, update: Floats) -> Floats:
    """What the attacker says; of an update that says nothing, what it knows of everybody: the mean."""
    try:
        return layer.invert(update)
    except NothingToInvert:
        return layer.mean


def _given_away(layer: FirstLayer, total: Floats, homes: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """The homes in a sum, as they are and as they are found, of those who are found by somebody who does not know them."""
    try:
        found = layer.agreeing(total)
    except NothingToInvert:
        return []
    nearest = [(home, min(found, key=lambda one: layer.error(one, home), default=layer.mean)) for home in homes]
    return [(home, one) for home, one in nearest if layer.error(one, home) < _EXACT]
