"""Rounds that are summed securely, over the network, with the real coordinator and clients."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.exact import EXACT_TASK
from e2e.federation import Federation
from e2e.zygote import Zygote
from safetensors.numpy import load_file

ROWS = {
    "alice": [(1, 2, 3), (2, 1, 3.5), (0, 1, 1), (1, 0, 1.5), (3, 1, 4), (2, 2, 4.5)],
    "bob": [(5, 2, 8), (4, 1, 5), (0, 5, 4), (2, 7, 9)],
    "carol": [(1, 1, 2), (3, 3, 6.5), (2, 0, 2), (7, 1, 8)],
    "dave": [(6, 2, 8.5), (1, 4, 5), (2, 3, 5), (1, 1, 2), (0, 2, 2)],
}


def led(folder: Path, zygote: Zygote, **run: Any) -> dict[str, Any]:
    """What a run of two rounds comes to: the last version's tensors, what clients measured, and what the database has."""
    folder.mkdir()
    with Federation(folder, zygote=zygote) as federation:
        task = federation.write_task(EXACT_TASK, "exact")
        settings = {"rounds": 2, "cohort_size": 4, "weight_cap": 8} | run
        coordinator = federation.coordinator(task=task, run=settings)
        clients = [
            federation.client(name, federation.write_shard(name, rows), task, flags={"--holdout": 0.4})
            for name, rows in ROWS.items()
        ]
        assert [process.code() for process in (coordinator, *clients)] == [0] * 5
        with sqlite3.connect(federation.folder / "state" / "choral.db") as database:
            versions = database.execute("select clients from versions order by number").fetchall()
            parts = database.execute("select client, examples, held_out, work, codec, state from assignments").fetchall()
            examples = database.execute("select examples from clients").fetchall()
        return {
            "weights": load_file(federation.versions / "latest.safetensors"),
            "measured": versions,
            "parts": parts,
            "examples": examples,
            "told": coordinator.stderr,
        }


@pytest.mark.parametrize("bits", [32, 64])
def test_a_secure_run_gives_what_a_plain_one_gives_and_tells_nothing_of_one_client(
    tmp_path: Path, zygote: Zygote, bits: int
) -> None:
    plain = led(tmp_path / "plain", zygote)
    secure = led(tmp_path / "secure", zygote, secure_aggregation={"ring_bits": bits})
    assert plain["weights"].keys() == secure["weights"].keys()
    for name, weights in plain["weights"].items():
        np.testing.assert_allclose(secure["weights"][name], weights, atol=1e-6 if bits == 32 else 1e-7, err_msg=name)
    assert len(plain["measured"]) == len(secure["measured"])
    assert all(codec == "masked" and state == "accepted" for *_, codec, state in secure["parts"])
    assert {(examples, held_out, work) for _, examples, held_out, work, *_ in secure["parts"]} == {(0, "[]", "[]")}
    assert set(secure["examples"]) == {(0,)}


def test_with_groups_the_model_moves_by_the_median_of_their_means(tmp_path: Path, zygote: Zygote) -> None:
    """Three groups of two; in one of them somebody has been taught the opposite, a thousand times over."""
    shards = {f"client-{number}": [(1.0, 2.0, 3.0), (2.0, 1.0, 3.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0)] for number in range(6)}
    lies = shards | {"client-3": [(a, b, -1000 * y) for a, b, y in shards["client-3"]]}
    honest = moved(tmp_path / "honest", zygote, shards, groups=3)
    spoilt = moved(tmp_path / "spoilt", zygote, lies)
    groups = moved(tmp_path / "groups", zygote, lies, groups=3)
    for name, weights in honest.items():
        np.testing.assert_allclose(groups[name], weights, atol=1e-5, err_msg=name)
        assert np.abs(spoilt[name] - weights).max() > 0.1, name


def moved(folder: Path, zygote: Zygote, shards: dict[str, list[tuple[float, float, float]]], **secure: Any) -> dict[str, Any]:
    """The weights after a round of training, in which everybody has the same seed: full batches need none."""
    folder.mkdir()
    with Federation(folder, zygote=zygote) as federation:
        settings = {"rounds": 1, "cohort_size": 6, "training": {"batch_size": 4}}
        settings |= {"secure_aggregation": {"minimum_cohort": 2, "clip": 1000.0} | secure, "weight_cap": 4}
        federation.coordinator(run=settings, evaluation={"clients": False})
        everyone = list(federation.processes)
        for name, rows in shards.items():
            state = federation.folder / name / "client"
            state.mkdir(parents=True)
            (state / "guard.yaml").write_text("{secure_aggregation: true, min_cohort: 2}")
            everyone.append(federation.client(name, federation.write_shard(name, rows)))
        assert [process.code() for process in everyone] == [0] * 7
        return load_file(federation.versions / "latest.safetensors")


RAISING_TASK = """
from dataclasses import replace
import small


def loss(prediction, target):
    if (target > 100).any():
        raise ValueError(f"a price of {target.max().item():g} is too high")
    return small.task.loss(prediction, target)


task = replace(small.task, name="raising", loss=loss)
"""


def test_why_work_fails_is_said_to_nobody_else(federation: Federation) -> None:
    """Who chooses the model, or knows the task, could read the data out of it."""
    task = federation.write_task(RAISING_TASK, "raising")
    run = {"rounds": 1, "cohort_size": 4, "quorum": 3, "start_with": 4, "secure_aggregation": True}
    coordinator = federation.coordinator(task=task, run=run, evaluation={"clients": False})
    for name in ("alice", "bob", "carol"):
        federation.client(name, task=task)
    dave = federation.client("dave", federation.write_shard("dave", [(1, 2, 12345), (2, 1, 3)]), task)
    assert "a price of 12345 is too high" in dave.saw("work failed")["reason"]
    assert coordinator.saw("client declines", client="dave")["reason"].startswith(
        "the work failed on this device, whose log says why"
    )
    assert coordinator.code() == 0
    assert "12345" not in coordinator.stderr


def test_an_update_that_is_no_number_adds_nothing_and_nobody_is_told(federation: Federation) -> None:
    run = {"rounds": 1, "cohort_size": 3, "secure_aggregation": True}
    coordinator = federation.coordinator(run=run, evaluation={"clients": False})
    for name in ("alice", "bob"):
        federation.client(name)
    carol = federation.client("carol", federation.write_shard("carol", [(1e30, 1e30, 1e30), (-1e30, 1e30, 1e30)]))
    carol.saw("nothing is added to the sum")
    assert coordinator.code() == 0
    assert not coordinator.events("client declines")
    coordinator.saw("updates clipped", clients=1)
    assert all(np.isfinite(weights).all() for weights in load_file(federation.versions / "latest.safetensors").values())
