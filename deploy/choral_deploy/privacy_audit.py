"""`choral privacy audit`: clients that are there or not by the toss of a coin, and how well the models betray which.

Canaries are clients whose update is as long as the clip, each in a direction of its own: nobody is easier to find. They go through
the code with which the coordinator clips, adds and noises, round after round, and are looked for in what it releases. What a guess
gets right refutes every ε below a bound (`choral.privacy.auditing`); a bound above the promise means that the promise is broken.

Where devices add the noise, canaries go through the code with which they do: into a sum, with as few of them as the noise is
divided among; or each alone, where one that is out sends the opposite of what it would send.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from choral.errors import ConfigError
from choral.plan import Kind, Plan, PrivatePlan, SecurePlan, Training
from choral.privacy.accounting import Accountant, Release, Sampling, epsilon
from choral.privacy.auditing import least_epsilon
from choral.privacy.noise import Noise, discrete_gaussian, gaussian
from choral.privacy.skellam import as_gaussian
from choral.privacy.told import scale_for, told_of
from choral.secagg.summand import layout_of
from choral_client.noised_part import NOTHING, part_of, summand
from choral_server.noised_sum import NoisedSum
from choral_server.private_sum import PrivateSum, Terms
from choral_server.rounds import Part, PartState
from numpy.typing import NDArray
from rich.progress import track

SKELLAM, LOCAL = "skellam", "local"
_CLIP, _TOO_LONG = 1.0, 1000.0
_GUESSED = 0.1  # share of the canaries that are guessed to be in, and as many to be out: those of which one is surest


@dataclass(frozen=True)
class Audited:
    """What was promised, and what was found: with `confidence`, ε is no less than `epsilon_at_least`."""

    canaries: int
    rounds: int
    noise: float
    delta: float
    epsilon_promised: float
    guesses: int
    right: int
    epsilon_at_least: float
    confidence: float
    holds: bool

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))

    def print(self) -> None:
        """For people."""
        from rich.console import Console

        told = (
            f"{self.rounds} rounds with noise {self.noise:g} promise ε = {self.epsilon_promised:.4g} at δ = {self.delta:g}.\n"
            f"Of {self.canaries} clients that were there or not by the toss of a coin, {self.right} of the {self.guesses} that "
            f"look surest were guessed right.\nSo ε is at least {self.epsilon_at_least:.3g}, with "
            f"{100 * self.confidence:g} % confidence: "
        )
        Console().print(
            told + ("[green]the promise stands." if self.holds else "[bold red]the promise is broken."), highlight=False
        )


def audit(canaries: int, rounds: int, noise: float, delta: float, confidence: float, source: str) -> Audited:
    """Run it; `source` is gaussian, discrete, skellam, local, or none. Raises ConfigError: what is asked for makes no audit."""
    if not 0 < delta < 1 or not 0.5 <= confidence < 1:
        raise ConfigError(f"--delta {delta:g}, --confidence {confidence:g}: give 0 < delta < 1 and 0.5 ≤ confidence < 1")
    summed = source == SKELLAM
    release = Release(as_gaussian(noise) if summed else noise, Sampling.NONE, canaries, canaries, summed)
    promised = epsilon({release: rounds}, delta, Accountant.PLD)
    there = np.array([secrets.randbits(1) for _ in range(canaries)], dtype=bool)
    scores = np.zeros(canaries)
    with tempfile.TemporaryDirectory(prefix="choral-audit-") as folder:
        for _ in track(range(rounds), "auditing", transient=True, disable=rounds < 2):
            scores += _released(there, noise, source, Path(folder))
    guesses, right = _guessed(scores, there)
    least = least_epsilon(canaries, guesses, right, delta, confidence)
    return Audited(canaries, rounds, noise, delta, promised, guesses, right, least, confidence, least <= promised)


def _released(there: NDArray[np.bool_], noise: float, source: str, folder: Path) -> NDArray[np.float64]:
    """What one round gives: of each canary the element that only it moves."""
    if source == SKELLAM:
        return _summed(there, noise, folder)
    if source == LOCAL:
        return np.array([_alone(bool(one), noise) for one in there])
    made = PrivateSum(there.size, Terms(_CLIP, noise, there.size), _source(source))
    for number in map(int, np.flatnonzero(there)):
        path = folder / "update"
        _update(there.size, number).tofile(path)
        made.fold(_part(number), path)
    made.release()
    return made.mean()


def _summed(there: NDArray[np.bool_], noise: float, folder: Path) -> NDArray[np.float64]:
    """Mode distributed: the noise is divided among those who are there, and no more of them are. The sum needs no masks."""
    size, present = there.size, max(1, int(there.sum()))
    terms = PrivatePlan(noise, present, _CLIP)
    told = told_of(Kind.TRAINING, terms, size, masked=True)
    scale = scale_for(told, present, present, 32)
    secure = SecurePlan("audit", present, present, 0.0, scale.clip, scale.fraction_bits, 32, 1)
    plan = Plan(Kind.TRAINING, "audit", "1", Training(), 0, evaluate=False, secure=secure, noised=True, private=terms)
    layout = layout_of(plan, size, None, ())
    made = NoisedSum(layout, scale, told, plan, (), size)
    for number in map(int, np.flatnonzero(there)):
        update, path = _update(size, number), folder / "summand"
        path.write_bytes(b"".join(summand(part_of(plan, size, 0), layout, lambda update=update: iter((update,)), NOTHING).pieces()))  # type: ignore[misc]
        made.fold(_part(number), path)
    return made.mean()


def _alone(there: bool, noise: float) -> float:
    """Mode local: what one client sends."""
    terms = PrivatePlan(noise, 1, _CLIP)
    plan = Plan(Kind.TRAINING, "audit", "1", Training(), 0, evaluate=False, noised=True, private=terms)
    update = _update(1, 0) * np.float32(1 if there else -1)
    return float(next(part_of(plan, 1, 0).update_as_told(lambda: iter((update,))))[0])


def _update(size: int, number: int) -> NDArray[np.float32]:
    """That of one canary: far too long, in a direction of its own."""
    update = np.zeros(size, "<f4")
    update[number] = _TOO_LONG
    return update


def _part(number: int) -> Part:
    return Part(f"audit/0/{number}", f"canary-{number}", PartState.ACCEPTED, examples=1)


def _guessed(scores: NDArray[np.float64], there: NDArray[np.bool_]) -> tuple[int, int]:
    """How many were guessed, and how many of them right: the highest scores to be there, the lowest not to be."""
    each, order = max(1, int(_GUESSED * scores.size)), np.argsort(scores)
    return 2 * each, int(there[order[-each:]].sum() + (~there[order[:each]]).sum())


def _source(name: str) -> Noise:
    sources = {"gaussian": gaussian, "discrete": discrete_gaussian}
    return sources[name]() if name in sources else lambda count: np.zeros(count, np.int64)
