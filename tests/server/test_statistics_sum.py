from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
from choral.statistics import Moments
from choral_server.rounds import Part, PartState
from choral_server.statistics_sum import StatisticsSum


def _merged(folder: Path, order: tuple[str, ...], shards: dict[str, np.ndarray]) -> Moments:
    total = StatisticsSum()
    for client in order:
        path = folder / f"{client}.upload"
        path.write_bytes(Moments.of(shards[client]).to_vector().astype("<f8").tobytes())
        total.fold(Part(f"run/0/{client}", client, PartState.ACCEPTED), path)
    return total.moments()


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shards = {client: generator.normal(10, 3, (rows, 2)) for client, rows in zip("dbca", (7, 100, 3, 31), strict=True)}
    merged = [_merged(tmp_path, order, shards).to_vector() for order in permutations(shards)]
    assert len({vector.tobytes() for vector in merged}) == 1
    pooled = np.concatenate(list(shards.values()))
    np.testing.assert_allclose(merged[0], [141, *pooled.mean(axis=0), *(pooled.var(axis=0) * 141)], rtol=1e-12)
