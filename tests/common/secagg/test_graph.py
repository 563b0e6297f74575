"""The graph of neighbours, and that its tables keep to the bounds that are stated for them."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from itertools import combinations

import pytest
from choral.errors import ConfigError
from choral.secagg import graph
from choral.secagg.graph import Shape, complete, neighbours_of, shape_of

SIZES = [101, 150, 300, 1000, 3000]


@pytest.mark.parametrize("clients", range(2, 101))
def test_up_to_a_hundred_clients_everybody_is_everybodys_neighbour(clients: int) -> None:
    shape = shape_of(clients)
    assert shape == complete(clients)
    assert shape.complete
    assert shape.threshold == (2 * clients) // 3 + 1 or clients == 2
    if clients > 2:
        assert shape.dropouts == math.ceil(clients / 3) - 1
    corrupt = math.ceil(clients / 3) - 1
    assert 2 * shape.threshold - shape.holders > corrupt  # two lists of survivors cannot both be believed by enough


@pytest.mark.parametrize("clients", [-1, 0, 1])
def test_of_one_client_there_is_no_sum(clients: int) -> None:
    with pytest.raises(ConfigError, match=f"a cohort of {clients}: a sum hides nothing unless it has two terms"):
        shape_of(clients)


@pytest.mark.parametrize("clients", SIZES)
def test_of_many_clients_each_has_so_many_neighbours_that_the_bounds_hold(clients: int) -> None:
    shape = shape_of(clients)
    assert not shape.complete
    corrupt, gone = math.ceil(graph.CORRUPT * clients), math.ceil(graph.DROPOUTS * clients)
    exposed = clients * _tail(clients - 1, corrupt, shape.neighbours, 2 * shape.threshold - shape.holders)
    lost = clients * _tail(clients - 1, gone, shape.neighbours, shape.dropouts)
    assert exposed <= Fraction(1, 2**graph.SECURITY_BITS)
    assert lost <= Fraction(1, 2**graph.CORRECTNESS_BITS)
    half = shape.neighbours // 2
    parted = clients * _tail(clients, corrupt, half, half - shape.dropouts)
    assert parted <= Fraction(1, 2**graph.SECURITY_BITS)


def _tail(population: int, marked: int, drawn: int, least: int) -> Fraction:
    """P[X ≥ least], from the probability of each number and not from the tail's formula."""
    unlikely = sum(
        Fraction(math.comb(marked, hits) * math.comb(population - marked, drawn - hits), math.comb(population, drawn))
        for hits in range(max(0, drawn - population + marked), min(least, marked + 1, drawn + 1))
    )
    return 1 - unlikely


@pytest.mark.parametrize("clients", SIZES)
def test_with_two_neighbours_less_a_bound_would_not_hold(clients: int) -> None:
    shape = shape_of(clients)
    for threshold in range(1, shape.holders - 1):
        sparser = Shape(clients, shape.neighbours - 2, threshold)
        assert (
            graph.exposure(sparser) > 2.0**-graph.SECURITY_BITS
            or graph.failure(sparser) > 2.0**-graph.CORRECTNESS_BITS
            or graph.isolation(sparser) > 2.0**-graph.SECURITY_BITS
        )


@pytest.mark.parametrize(("population", "marked", "drawn"), [(6, 2, 3), (7, 5, 4), (5, 0, 2), (5, 5, 2)])
def test_the_tail_is_what_counting_gives(population: int, marked: int, drawn: int) -> None:
    draws = list(combinations(range(population), drawn))
    for least in range(-1, drawn + 2):
        hits = sum(sum(one < marked for one in draw) >= least for draw in draws)
        assert graph.tail(population, marked, drawn, least) == pytest.approx(hits / len(draws))


@pytest.mark.parametrize("clients", [2, 3, 10, 101, 300])
def test_neighbours_are_mutual_and_as_many_as_they_should_be(clients: int) -> None:
    shape = shape_of(clients)
    neighbours = neighbours_of(shape, bytes(32))
    for one, others in enumerate(neighbours):
        assert len(set(others)) == len(others) == shape.neighbours
        assert one not in others
        assert list(others) == sorted(others)
        assert all(one in neighbours[other] for other in others)


def test_another_roster_is_another_graph() -> None:
    shape = shape_of(200)
    assert neighbours_of(shape, bytes(32)) != neighbours_of(shape, bytes(31) + b"\x01")


def test_everybody_is_a_neighbour_as_often_as_everybody_else() -> None:
    """Over 400 rosters client 0 has each other one k/(n-1) of the time: 160 ± 10 of 400 here; beyond ± 60 hardly ever."""
    shape = Shape(51, 20, 15)
    counts = [0] * shape.clients
    for roster in range(400):
        for other in neighbours_of(shape, hashlib.sha256(str(roster).encode()).digest())[0]:
            counts[other] += 1
    assert counts[0] == 0
    assert all(abs(count - 160) < 60 for count in counts[1:])


@pytest.mark.parametrize("clients", [3, 4, 10, 50, 100, 101, 150, 300, 1000, 10_000])
def test_of_two_attempts_at_a_round_one_at_most_comes_to_something(clients: int) -> None:
    """Whoever is honest reveals once, and in each attempt a share of all must (choral_client.masking.Masking)."""
    shape = shape_of(clients)
    corrupt = graph.CORRUPT if clients > graph.COMPLETE_UP_TO else (shape.holders - shape.threshold) / shape.holders
    assert 2 * shape.threshold > (1 + corrupt) * shape.holders
