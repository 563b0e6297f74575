"""The bundled data sets, dealt into one CSV per client and a test set: what a demo needs and real clients already have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from choral.errors import ConfigError, DataError

BOSTON_SHA256 = "56867c0e6b6f95da949959a855ec7e507137d6dc8b1ad32c260b23ae59300975"


def deal(name: str, clients: Sequence[str], folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write `<client>/shard.csv` for each client, in equal random parts of the training rows, and `test.csv`; returns the paths.

    The test set is called "test" in the result. Raises ConfigError: no such data set, or more clients than rows.
    """
    if name not in SOURCES:
        raise ConfigError(f"data set {name!r} is not bundled; choose one of {', '.join(SOURCES)}")
    train, test = SOURCES[name]()
    if not 1 <= len(clients) <= len(train):
        raise ConfigError(f"{len(clients)} clients for {len(train)} rows of {name}: give between 1 and {len(train)}")
    order = np.random.default_rng(seed).permutation(len(train))
    paths = {"test": folder / "test.csv"}
    folder.mkdir(parents=True, exist_ok=True)
    test.to_csv(paths["test"], index=False)
    for client, rows in zip(clients, np.array_split(order, len(clients)), strict=True):
        paths[client] = folder / client / "shard.csv"
        paths[client].parent.mkdir(parents=True, exist_ok=True)
        train.iloc[rows].to_csv(paths[client], index=False)
    return paths


def boston_housing() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The 404 training and 102 test rows of the original split. Raises DataError: the packaged file was changed."""
    file = resources.files("choral.tasks") / "data" / "boston_housing.csv"
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != BOSTON_SHA256:
        raise DataError(f"{file}: is not the file that Choral ships (its SHA-256 differs): reinstall choral")
    with file.open("rb") as stream:
        frame = pd.read_csv(stream)
    train = frame["split"] == "train"
    return frame[train].drop(columns="split"), frame[~train].drop(columns="split")


def _from_sklearn(loader: str) -> Callable[[], tuple[pd.DataFrame, pd.DataFrame]]:
    def source() -> tuple[pd.DataFrame, pd.DataFrame]:
        try:
            from sklearn import datasets
        except ImportError as error:
            raise ConfigError(f"data set {loader} comes with scikit-learn: pip install 'choral[examples]'") from error
        x, y = getattr(datasets, f"load_{loader}")(return_X_y=True)
        frame = pd.DataFrame(x, columns=[f"x{index}" for index in range(x.shape[1])]).assign(target=y)
        test = np.random.default_rng(0).permutation(len(frame)) < len(frame) // 5
        return frame[~test], frame[test]

    return source


SOURCES: dict[str, Callable[[], tuple[pd.DataFrame, pd.DataFrame]]] = {
    "boston_housing": boston_housing,
    "breast_cancer": _from_sklearn("breast_cancer"),
    "digits": _from_sklearn("digits"),
}
