"""Who shares masks with whom, and how many shares must come together: enough to survive dropouts, too many for those who lie.

Everybody's secrets are held by the neighbours and by oneself. With everybody for a neighbour, t = ⌊2n/3⌋ + 1 of n shares survives
⌈n/3⌉ - 1 dropouts, and stands against as many who are corrupt (Bonawitz et al. 2017, §6.2). Of many clients, a random graph of k
neighbours needs fewer masks, for assumptions that are weaker and a probability that is chosen (Bell et al. 2020, §3): of n clients,
`CORRUPT` obey the coordinator, `DROPOUTS` go away in the middle of the round, and for all clients together

    2^-SECURITY_BITS      bounds that some client has so many corrupt holders that the rest, told two different lists of survivors,
                          would give away both its secrets: 2t - m or more of m holders; and that those who are honest can be parted
                          into groups, whose sums would be known: of a ring, k/2 in a row are corrupt but for the m - t whom
                          the coordinator may call gone before a neighbour of theirs objects
    2^-CORRECTNESS_BITS   bounds that of some client's holders fewer than t stay, and the round is lost

The graph follows from the roster. A coordinator may try many rosters of its own people: 2^40 of them leave 2^-40.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from choral.errors import ConfigError

COMPLETE_UP_TO = 100  # clients
CORRUPT, DROPOUTS = 0.2, 0.1  # of all clients, beyond that
SECURITY_BITS, CORRECTNESS_BITS = 80, 20
_DOMAIN = b"choral secagg 1 graph"


@dataclass(frozen=True, slots=True)
class Shape:
    """Of `clients`, each has so many `neighbours`; `threshold` of the `neighbours` + 1 shares of a secret give it back."""

    clients: int
    neighbours: int
    threshold: int

    @property
    def holders(self) -> int:
        """Of each secret: the neighbours, and whose it is."""
        return self.neighbours + 1

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbour."""
        return self.neighbours == self.clients - 1

    @property
    def dropouts(self) -> int:
        """How many of a client's holders may go away."""
        return self.holders - self.threshold


def complete(clients: int) -> Shape:
    """Everybody with everybody. Raises ConfigError: fewer than two, of which the sum is the one's update."""
    if clients < 2:
        raise ConfigError(
            f"a cohort of {clients}: a sum hides nothing unless it has two terms at the least, and three to hide well"
        )
    return Shape(clients, clients - 1, max(2, 2 * clients // 3 + 1))


@lru_cache(maxsize=256)
def shape_of(clients: int, share: float = 0.0) -> Shape:
    """The graph for so many clients: everybody with everybody, or of many the sparsest that keeps to the bounds above.

    A `share` of the holders makes the threshold higher than it need be. Raises ConfigError: it is no share, or they are too many.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"a threshold of {share:g}: it is a share of those who hold shares of a secret, 1 at the most")
    if clients <= COMPLETE_UP_TO:
        shape = complete(clients)
        return replace(shape, threshold=max(shape.threshold, math.ceil(round(share * shape.holders, 9))))
    if share > 0:
        raise ConfigError(
            f"a threshold of {share:g} with {clients} clients: beyond {COMPLETE_UP_TO} it follows from the bounds on security and "
            "dropouts: leave it out, or ask fewer clients"
        )
    return _sparsest(clients)


def _sparsest(clients: int) -> Shape:
    for neighbours in range(2, clients - 1, 2):
        if (shape := _shape(clients, neighbours)) is not None:
            return shape
    return complete(clients)


def _shape(clients: int, neighbours: int) -> Shape | None:
    """With the smallest threshold that is safe, if it is also one that survives the dropouts."""
    holders = neighbours + 1
    low, high = holders // 2 + 1, holders
    while low < high:  # the larger the threshold, the safer
        middle = (low + high) // 2
        of_middle = Shape(clients, neighbours, middle)
        if max(exposure(of_middle), isolation(of_middle)) <= 2.0**-SECURITY_BITS:
            high = middle
        else:
            low = middle + 1
    shape = Shape(clients, neighbours, low)
    secure = max(exposure(shape), isolation(shape)) <= 2.0**-SECURITY_BITS
    return shape if secure and failure(shape) <= 2.0**-CORRECTNESS_BITS else None


def exposure(shape: Shape) -> float:
    """Bounds the probability that some client's holders can be brought to give away both its secrets."""
    corrupt = math.ceil(CORRUPT * shape.clients)
    return shape.clients * tail(shape.clients - 1, corrupt, shape.neighbours, 2 * shape.threshold - shape.holders)


def failure(shape: Shape) -> float:
    """Bounds the probability that of some client's neighbours so many go away that too few holders stay."""
    gone = math.ceil(DROPOUTS * shape.clients)
    return shape.clients * tail(shape.clients - 1, gone, shape.neighbours, shape.dropouts)


def isolation(shape: Shape) -> float:
    """Bounds the probability that those who are honest and stay can be parted into groups that share no masks."""
    corrupt, half = math.ceil(CORRUPT * shape.clients), shape.neighbours // 2
    return shape.clients * tail(shape.clients, corrupt, half, half - shape.dropouts)


def tail(population: int, marked: int, drawn: int, least: int) -> float:
    """P[at least `least` of `drawn` are marked], without replacement (hypergeometric); exact but for the last division."""
    if least <= 0:
        return 1.0
    most = min(marked, drawn)
    ways = sum(math.comb(marked, hits) * math.comb(population - marked, drawn - hits) for hits in range(least, most + 1))
    return ways / math.comb(population, drawn)


def neighbours_of(shape: Shape, roster: bytes) -> list[tuple[int, ...]]:
    """The neighbours of each client, by number from 0, ascending; `roster` is the digest of who takes part, with what keys.

    Clients stand in a ring in an order that the digest gives, each beside k/2 on both sides (a Harary graph, 1962).
    """
    count = shape.clients
    if shape.complete:
        return [tuple(other for other in range(count) if other != one) for one in range(count)]
    order = sorted(range(count), key=lambda one: hashlib.sha256(_DOMAIN + roster + one.to_bytes(4, "big")).digest())
    steps = [step for distance in range(1, shape.neighbours // 2 + 1) for step in (distance, -distance)]
    ring = {one: tuple(sorted(order[(at + step) % count] for step in steps)) for at, one in enumerate(order)}
    return [ring[one] for one in range(count)]
