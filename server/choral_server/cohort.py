"""Who takes part in a round: a pure function of seed, round and who is there; or, where privacy rests on it, by chance."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from choral.privacy.accounting import Sampling


def choose(seed: int, round: int, present: Iterable[str], size: int) -> tuple[str, ...]:
    """`size` names (all, if fewer are there), uniformly at random, sorted by name. The order of `present` does not matter.

    Each name draws a number by hashing; the lowest are chosen.
    """
    drawn = sorted(present, key=lambda name: hashlib.sha256(f"{seed}/{round}/{name}".encode()).digest())
    return tuple(sorted(drawn[:size]))


@dataclass(frozen=True, slots=True)
class Draw:
    """Who was drawn: `expected` clients on the average, of a `population` of those who were there."""

    clients: tuple[str, ...]
    expected: int
    population: int


def drawn(sampling: Sampling, present: Sequence[str], size: int) -> Draw:
    """Poisson: each with probability `size` over all; fixed: `size` of them; by the operating system's randomness."""
    random, population = secrets.SystemRandom(), len(present)
    expected = min(size, population)
    if sampling is Sampling.POISSON:
        clients = [name for name in present if random.randrange(population) < expected]  # exactly that probability
    else:
        clients = random.sample(present, expected)
    return Draw(tuple(sorted(clients)), expected, population)


def dealt(order: str, clients: Iterable[str], groups: int) -> dict[str, int]:
    """Each client's group, from 0; none has two more than another. `order` decides, a name for the round that nobody chose."""
    drawn = sorted(clients, key=lambda name: hashlib.sha256(f"{order}/{name}".encode()).digest())
    return {name: place % groups for place, name in enumerate(drawn)}


def selected(cohort_size: int, over_selection: float) -> int:
    """How many to ask so that `cohort_size` answer: a share more, rounded up (Bonawitz et al. 2019, MLSys, section 9)."""
    return math.ceil(round(cohort_size * (1 + over_selection), 9))
