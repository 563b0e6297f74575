"""What a client is asked to do: frozen values that travel with each assignment."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from choral.canonical import canonical
from choral.config import Settings


class Kind(enum.Enum):
    """What a round is for."""

    STATISTICS = "statistics"
    TRAINING = "training"
    EVALUATION = "evaluation"


class Training(Settings):
    """Hyper-parameters of the local loop (McMahan et al. 2017, AISTATS, algorithm 1: E, B and η)."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] = 1
    """passes over the local examples each round; 0 sends the model back unchanged"""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """examples per optimizer step"""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.001
    """the optimizer's step size"""


@dataclass(frozen=True, slots=True)
class SecurePlan:
    """How the results of a round are summed so that the coordinator sees the sum alone (`secagg`).

    `run` names the run as no other is named; `least_clients` to `most_clients` are in the sum; of the holders of a secret the share
    `threshold` must reveal, 0: as few as is safe. An update's entries are clipped to `clip`, its Euclidean norm to `max_norm` (0:
    not at all), and its weight is its examples over `weight_cap`, at most 1; in steps of 2^-`fraction_bits`, modulo 2^`ring_bits`.
    """

    run: str
    least_clients: int
    most_clients: int
    threshold: float
    clip: float
    fraction_bits: int
    ring_bits: int
    weight_cap: int
    max_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class PrivatePlan:
    """Noise that each client adds before anything leaves it (`privacy.told`).

    `noise` is the standard deviation, over what one client can move, of the noise of `clients` clients together: 1, and each adds
    all of it. Updates are shortened to the Euclidean norm `clip`. Of a training round's privacy `clip_share` goes to how many were
    shortened, and `metrics_share` to what was measured. `ranges` are the smallest and largest value of each number that is told
    beside the update: metrics in the task's order, or features.
    """

    noise: float
    clients: int
    clip: float
    clip_share: float = 0.0
    metrics_share: float = 0.0
    ranges: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ExamplePlan:
    """Training that hides each single example (DP-SGD, Abadi et al. 2016, CCS): noise on sums of gradients clipped to `clip`.

    `noise` is its standard deviation over `clip`. A client's examples may lose no more than `epsilon` at `delta` in all. `ranges`
    are those of the features, where their statistics are asked for.
    """

    noise: float
    clip: float
    epsilon: float
    delta: float
    ranges: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One assignment's work. The same plan on the same data gives the same update, bit for bit, but for noise."""

    kind: Kind
    task: str
    task_version: str
    training: Training
    seed: int
    evaluate: bool
    cohort: int = 0
    """how many results the round is to be made of; 0: the coordinator does not say"""
    secure: SecurePlan | None = None
    """how results are summed; None: each is sent as it is"""
    noised: bool = False
    """whether noise is added to the sum: whether the work comes to a number must then not be seen by whether a result comes"""
    private: PrivatePlan | None = None
    """the noise that this client adds; None: none"""
    examples: ExamplePlan | None = None
    """how training hides single examples; None: it does not"""


def digest_of(plan: Plan) -> bytes:
    """SHA-256 of what all clients of a round are asked alike: the plan without its seed."""
    common: dict[str, Any] = {
        "kind": plan.kind.value,
        "task": plan.task,
        "task_version": plan.task_version,
        "training": plan.training.model_dump(),
        "evaluate": plan.evaluate,
        "cohort": plan.cohort,
    }
    if plan.noised:
        common["noised"] = True
    for name, terms in (("secure", plan.secure), ("private", plan.private), ("examples", plan.examples)):
        if terms is not None:
            common[name] = asdict(terms)
    return hashlib.sha256(b"choral plan 1" + canonical(common).encode()).digest()


def seed_for(run_seed: int, version: int, client: str) -> int:
    """The seed, 63 bits, of one client's work on one version: repeated work repeats its randomness, other work does not."""
    digest = hashlib.sha256(f"{run_seed}/{version}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
