from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from choral.errors import ConfigError, DataError
from choral.tasks import boston_housing, breast_cancer, digits, shards
from choral.tasks.shards import deal

SIZES = {"boston_housing": (404, 102), "breast_cancer": (456, 113), "digits": (1438, 359)}
TASKS = {"boston_housing": boston_housing.task, "breast_cancer": breast_cancer.task, "digits": digits.task}


def _rows(path: Path) -> list[tuple[float, ...]]:
    return [tuple(row) for row in pd.read_csv(path).to_numpy()]


def test_boston_housing_has_the_404_and_102_rows_of_the_original_split() -> None:
    train, test = shards.boston_housing()
    assert (len(train), len(test)) == (404, 102)
    assert list(train.columns) == list(test.columns) == [*boston_housing.FEATURES, "MEDV"]
    assert np.isfinite(pd.concat([train, test]).to_numpy()).all()


def test_the_shipped_file_is_the_one_whose_digest_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = (resources.files("choral.tasks") / "data" / "boston_housing.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == shards.BOSTON_SHA256
    assert shards.BOSTON_SHA256 in (resources.files("choral.tasks") / "data" / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(shards, "BOSTON_SHA256", hashlib.sha256(content + b"\n").hexdigest())
    with pytest.raises(DataError, match=r"boston_housing\.csv: is not the file that Choral ships"):
        shards.boston_housing()


@pytest.mark.parametrize("name", SIZES)
def test_all_rows_are_dealt_and_none_twice(name: str, tmp_path: Path) -> None:
    clients = ["alice", "bob", "carol"]
    paths = deal(name, clients, tmp_path / "shards")
    assert sorted(paths) == ["alice", "bob", "carol", "test"]
    parts = [_rows(paths[client]) for client in clients]
    train, test = shards.SOURCES[name]()
    assert (len(train), len(test)) == SIZES[name]
    assert sorted(row for part in parts for row in part) == sorted(map(tuple, train.to_numpy()))
    assert sorted(_rows(paths["test"])) == sorted(map(tuple, test.to_numpy()))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_row_is_in_two_shards(tmp_path: Path) -> None:
    paths = deal("boston_housing", ["alice", "bob"], tmp_path)
    alice, bob, test = (set(_rows(paths[name])) for name in ("alice", "bob", "test"))
    assert (len(alice), len(bob), len(test)) == (202, 202, 102)  # no two rows of this data are equal
    assert not alice & bob
    assert not (alice | bob) & test


def test_the_deal_is_a_function_of_the_seed(tmp_path: Path) -> None:
    first, same, other = (
        deal("boston_housing", ["alice", "bob"], tmp_path / name, seed)["alice"].read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == same
    assert first != other


def test_each_client_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    paths = deal("boston_housing", ["alice", "bob"], tmp_path)
    assert paths == {name: tmp_path / name / "shard.csv" for name in ("alice", "bob")} | {"test": tmp_path / "test.csv"}


@pytest.mark.parametrize("name", SIZES)
def test_the_task_loads_what_is_dealt_and_its_network_takes_it(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    examples = task.examples(deal(name, ["alice"], tmp_path)["test"])
    x, y = examples.tensors  # type: ignore[attr-defined]
    assert len(x) == len(y) == SIZES[name][1]
    prediction = task.initial_model(0)(x).detach()
    assert task.loss(prediction, y).isfinite()
    assert all(np.isfinite(float(metric(prediction, y))) for metric in task.metrics.values())


def test_one_client_per_row_is_the_most(tmp_path: Path) -> None:
    everyone = [f"c{number}" for number in range(404)]
    paths = deal("boston_housing", everyone, tmp_path)
    assert all(len(_rows(paths[client])) == 1 for client in everyone[:5])
    for clients in ([], [*everyone, "one-more"]):
        with pytest.raises(ConfigError, match="for 404 rows of boston_housing: give between 1 and 404"):
            deal("boston_housing", clients, tmp_path)


def test_an_unknown_data_set_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'iris' is not bundled; choose one of boston_housing, breast_cancer, digits"):
        deal("iris", ["alice"], tmp_path)
