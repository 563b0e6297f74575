"""Metrics and statistics with noise: bounded, unbiased, and no more telling than was promised."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from choral.metrics import Metric
from choral.privacy.noise import Noise, gaussian
from choral.statistics import Moments
from choral_server.private_means import PrivateStatistics, noised_mean, noised_metrics
from choral_server.rounds import Part, PartState
from numpy.typing import NDArray
from scipy import stats

SILENT: Noise = lambda count: np.zeros(count, np.int64)  # noqa: E731
SURELY = 1e-9
RANGES = {"loss": (0.0, 10.0), "accuracy": (0.0, 1.0)}
FEATURES = [(0.0, 100.0), (-1.0, 1.0)]
rng = np.random.default_rng(3)


def part(client: str, **values: float) -> Part:
    return Part(f"run/0/{client}", client, PartState.ACCEPTED, held_out=tuple(Metric(n, v, 5) for n, v in values.items()))


def test_a_mean_moves_by_no_more_than_one_client_may() -> None:
    size = 6
    for vector in (np.full(size, 1e300), np.full(size, -np.inf), np.full(size, np.nan), np.ones(size), rng.normal(size=size)):
        moved = noised_mean([vector], size, 1.0, 1, SILENT)
        assert np.linalg.norm(moved) <= math.sqrt(size)


def test_its_noise_is_what_was_promised() -> None:
    size = 20_000
    noise = noised_mean([], size, 1.5, 4, gaussian()) * 4 / (1.5 * math.sqrt(size))
    assert SURELY < stats.chi2.cdf(np.square(noise).sum(), size) < 1 - SURELY


def test_metrics_are_means_over_clients_within_their_ranges() -> None:
    parts = [part("a", loss=2.0, accuracy=0.5), part("b", loss=4.0, accuracy=1.0), part("c", loss=1e9), part("d")]
    told = {metric.name: metric for metric in noised_metrics(parts, RANGES, 0.5, 4, SILENT)}
    assert told["loss"].value == pytest.approx((2 + 4 + 10 + 5) / 4, abs=1e-4)  # beyond the range, and the middle of it
    assert told["accuracy"].value == pytest.approx((0.5 + 1 + 0.5 + 0.5) / 4, abs=1e-4)
    assert {metric.examples for metric in told.values()} == {4}


def test_metrics_stay_in_their_ranges_whatever_the_noise() -> None:
    for _ in range(50):
        for metric in noised_metrics([part("a", loss=9.0)], RANGES, 100.0, 1, gaussian()):
            assert RANGES[metric.name][0] <= metric.value <= RANGES[metric.name][1]


class Clients:
    """Who has sent statistics."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fold(self, into: PrivateStatistics, *shards: NDArray[np.float64]) -> None:
        for number, shard in enumerate(shards):
            path = self._folder / f"{number}"
            Moments.of(shard).to_vector().astype("<f8").tofile(path)
            into.fold(Part(f"run/0/{number}", f"c{number}", PartState.ACCEPTED), path)


@pytest.fixture
def clients(tmp_path: Path) -> Clients:
    return Clients(tmp_path)


def test_with_little_noise_statistics_are_those_of_all_clients(clients: Clients) -> None:
    shards = [np.column_stack([rng.normal(30 + k, 9, 200), rng.uniform(-0.5, 0.5, 200)]) for k in range(8)]
    made = PrivateStatistics(FEATURES, 0.05, 8, SILENT)
    clients.fold(made, *shards)
    moments, true = made.moments(), Moments.of(np.concatenate(shards))
    assert moments.mean == pytest.approx(true.mean, abs=0.2)
    assert moments.deviation == pytest.approx(true.deviation, rel=0.02)


def test_with_much_noise_they_are_those_of_numbers_spread_evenly(clients: Clients) -> None:
    made = PrivateStatistics(FEATURES, 1e4, 2, gaussian())
    clients.fold(made, np.array([[1.0, 0.9], [2.0, 0.8]]))
    moments = made.moments()
    assert moments.mean == pytest.approx([50, 0], abs=5)
    assert moments.deviation == pytest.approx([50 / math.sqrt(3), 1 / math.sqrt(3)], rel=0.1)


@pytest.mark.parametrize("far", [1e30, -1e30])
def test_one_client_cannot_carry_them_beyond_the_range(clients: Clients, far: float) -> None:
    made = PrivateStatistics(FEATURES, 0.05, 1, SILENT)
    clients.fold(made, np.array([[far, far], [far, -far]]))
    moments = made.moments()
    assert ((np.array(FEATURES)[:, 0] <= moments.mean) & (moments.mean <= np.array(FEATURES)[:, 1])).all()
    assert np.isfinite(moments.deviation).all()


def test_asked_again_they_are_the_same(clients: Clients) -> None:
    made = PrivateStatistics(FEATURES, 1.0, 2, gaussian())
    clients.fold(made, np.ones((2, 2)))
    assert (made.moments().mean == made.moments().mean).all()


def test_what_is_constant_can_still_be_divided_by(clients: Clients) -> None:
    made = PrivateStatistics(FEATURES, 0.05, 3, SILENT)
    clients.fold(made, *[np.full((4, 2), 0.5)] * 3)
    assert (made.moments().deviation >= 0.05 * np.array([50, 1]) * 0.999).all()


def test_nobody_at_all(clients: Clients) -> None:
    moments = PrivateStatistics(FEATURES, 1.0, 4, gaussian()).moments()
    assert np.isfinite(moments.mean).all()
    assert (moments.deviation > 0).all()
