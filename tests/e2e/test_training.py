"""Two clients train Boston housing over TLS: what the coordinator writes, what clients keep, what is measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from choral.tasks import boston_housing
from choral.tasks.shards import deal
from choral_client.data import load_shard
from e2e.federation import BOSTON, Federation, Process
from safetensors.torch import load_file
from torch import nn

HOLDOUT = 0.1
SEED = 7
CHAS = boston_housing.FEATURES.index("CHAS")

AUDITED = """
import os, runpy, sys

opened = open(os.environ["OPENED"], "w", buffering=1)


def hook(event, details):
    if event == "open" and isinstance(details[0], (str, bytes, os.PathLike)):
        opened.write(os.path.abspath(os.fsdecode(details[0])) + "\\n")


sys.addaudithook(hook)
runpy.run_module("choral_deploy.cli", run_name="__main__", alter_sys=True)
"""
"""The `choral` command, with each path that the process opens on a line of the file that OPENED names."""


@dataclass(frozen=True)
class Trained:
    """A run that is over, its coordinator still there for operators."""

    federation: Federation
    shards: dict[str, Path]
    clients: dict[str, Process]

    def model(self, checkpoint: Path) -> nn.Module:
        model = boston_housing.network()
        model.load_state_dict(load_file(checkpoint))
        return model.eval()


def train(federation: Federation, order: tuple[str, ...], **options: dict[str, object]) -> Trained:
    """Three rounds of Boston housing with clients that start in this order."""
    shards = deal("boston_housing", ["alice", "bob"], federation.folder, SEED)
    (federation.folder / "others.parquet").write_bytes(b"nobody opens this")
    run = {"rounds": 3, "seed": SEED}
    evaluation = {"test_set": "test.csv"}
    coordinator = federation.coordinator(task=BOSTON, run=run, evaluation=evaluation, exit_when_done=False)
    clients: dict[str, Process] = {}
    for name in order:
        clients[name] = federation.client(name, shards[name], BOSTON, flags={"--holdout": HOLDOUT}, **options.get(name, {}))
        clients[name].saw("attending")
    coordinator.saw("run over", state="finished", reason="3 rounds completed")
    return Trained(federation, shards, clients)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with Federation(tmp_path_factory.mktemp("f")) as federation:
        yield train(federation, ("alice", "bob"))


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """The same run once more: bob comes first, and each path that alice opens is noted."""
    with Federation(tmp_path_factory.mktemp("f")) as federation:
        wrapper = federation.folder / "audited.py"
        wrapper.write_text(AUDITED)
        audited = {"launcher": [wrapper], "environment": {"OPENED": federation.folder / "opened"}}
        yield train(federation, ("bob", "alice"), alice=audited)


def test_every_version_is_a_safetensors_file_that_opens_without_choral(trained: Trained) -> None:
    folder = trained.federation.versions
    numbered = sorted(path.name for path in folder.glob("[0-9]*"))
    assert numbered == [f"{number:06d}.safetensors" for number in range(5)]  # initial, with statistics, and three trained
    names = set(boston_housing.network().state_dict())
    for path in folder.glob("[0-9]*"):
        state = load_file(path)
        assert set(state) == names
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
    weights = [load_file(folder / name)["1.weight"] for name in numbered]
    assert torch.equal(weights[0], weights[1])  # the statistics round changes buffers only
    assert all(not torch.equal(before, after) for before, after in itertools.pairwise(weights[1:]))


def test_latest_is_the_last_version_and_best_the_one_with_the_least_test_loss(trained: Trained) -> None:
    folder = trained.federation.versions
    assert (folder / "latest.safetensors").readlink() == Path("000004.safetensors")
    test_set = boston_housing.task.load(trained.federation.folder / "test.csv")
    loss = {}
    for number in range(1, 5):
        with torch.inference_mode():
            x, y = test_set.tensors
            loss[number] = nn.functional.mse_loss(trained.model(folder / f"{number:06d}.safetensors")(x), y).item()
    best = min(loss, key=loss.__getitem__)
    assert (folder / "best.safetensors").readlink() == Path(f"{best:06d}.safetensors")


def test_a_client_holds_the_latest_checkpoint_byte_for_byte(trained: Trained) -> None:
    for name in trained.clients:
        assert kept_by(name, trained) == trained.federation.latest


def kept_by(client: str, trained: Trained) -> bytes:
    """The model that a client keeps. It fetched the last version to measure it, in the round that ended the run."""
    trained.clients[client].saw("sent", round=4, verdict="accepted")
    return (trained.federation.folder / client / "client" / "model.safetensors").read_bytes()


def test_the_checkpoint_predicts_from_raw_features(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(kept_by("alice", trained))
    model = trained.model(path)
    x, y = boston_housing.task.load(trained.federation.folder / "test.csv").tensors
    assert x.abs().max() > 300  # not standardised
    with torch.inference_mode():
        mse = nn.functional.mse_loss(model(x), y).item()
    assert 0 < mse < nn.functional.mse_loss(torch.zeros_like(y), y).item()


def test_the_statistics_are_those_of_all_training_rows_together(trained: Trained) -> None:
    state = load_file(trained.federation.versions / "latest.safetensors")
    rows = [load_shard(boston_housing.task, trained.shards[name], HOLDOUT).features().numpy() for name in trained.clients]
    together = np.concatenate(rows).astype(np.float64)
    assert len(together) == 404 - 20 - 20
    mean, scale = together.mean(axis=0), together.std(axis=0)
    mean[CHAS], scale[CHAS] = 0.0, 1.0
    np.testing.assert_allclose(state["0.mean"].numpy(), mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state["0.scale"].numpy(), scale, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_weights(trained: Trained, repeated: Trained) -> None:
    once, again = (load_file(run.federation.versions / "latest.safetensors") for run in (trained, repeated))
    assert once.keys() == again.keys()
    for name, tensor in once.items():
        assert torch.equal(tensor.view(torch.int32), again[name].view(torch.int32)), name


def test_the_same_seed_gives_the_same_file(trained: Trained, repeated: Trained) -> None:
    assert trained.federation.latest == repeated.federation.latest


def test_a_client_opens_no_data_but_its_shard(repeated: Trained) -> None:
    home = repeated.federation.folder
    opened = [Path(line) for line in (home / "opened").read_text().splitlines()]
    data = {path for path in opened if path.suffix in {".csv", ".parquet"}}
    assert data == {repeated.shards["alice"]}
    here = {path for path in opened if path.is_relative_to(home)}
    own = home / "alice" / "client"
    known = {home / "audited.py", home / "alice.token", repeated.shards["alice"]}
    assert {path for path in here - known if not path.is_relative_to(own)} == set()


def test_versions_carry_what_was_measured_of_them(trained: Trained) -> None:
    versions = {int(row["version"]["number"]): row for row in trained.federation.rows("versions", "list")}
    assert sorted(versions) == [0, 1, 2, 3, 4]
    x, y = boston_housing.task.load(trained.federation.folder / "test.csv").tensors
    for number in (1, 2, 3, 4):
        test = {metric["name"]: metric for metric in versions[number]["test"]}
        with torch.inference_mode():
            prediction = trained.model(Path(versions[number]["checkpoint"]))(x)
        assert test["mse"]["value"] == pytest.approx(nn.functional.mse_loss(prediction, y).item(), rel=1e-5)
        assert test["mae"]["value"] == pytest.approx(nn.functional.l1_loss(prediction, y).item(), rel=1e-5)
        assert {int(metric["examples"]) for metric in test.values()} == {102}


def test_versions_carry_the_clients_mean_weighted_by_examples(trained: Trained) -> None:
    versions = {int(row["version"]["number"]): row for row in trained.federation.rows("versions", "list")}
    held_out = [load_shard(boston_housing.task, trained.shards[name], HOLDOUT).held_out for name in ("alice", "bob")]
    for number in (1, 2, 3, 4):  # each was the start of a round; the last one of a round that only measured
        clients = {metric["name"]: metric for metric in versions[number]["clients"]}
        model = trained.model(Path(versions[number]["checkpoint"]))
        with torch.inference_mode():
            errors = torch.cat([torch.square(model(part.tensors[0]) - part.tensors[1]) for part in held_out])
        assert int(clients["mse"]["examples"]) == len(errors) == 40
        assert clients["mse"]["value"] == pytest.approx(errors.mean().item(), rel=1e-5)


def test_rounds_show_each_clients_part(trained: Trained) -> None:
    rounds = {row["number"]: row for row in trained.federation.rows("rounds", "list")}
    assert {int(number): row["kind"] for number, row in rounds.items()} == {
        0: "ROUND_KIND_STATISTICS",
        1: "ROUND_KIND_TRAINING",
        2: "ROUND_KIND_TRAINING",
        3: "ROUND_KIND_TRAINING",
        4: "ROUND_KIND_EVALUATION",
    }
    parts = {part["client"]: part for part in trained.federation.rows("rounds", "show", 2)}
    assert {name: part["state"] for name, part in parts.items()} == {"alice": "accepted", "bob": "accepted"}
    assert {int(part["examples"]) for part in parts.values()} == {182}
    assert {metric["name"] for metric in parts["alice"]["work"]} == {"train_s", "train_loss"}
    assert {metric["name"]: int(metric["examples"]) for metric in parts["bob"]["held_out"]} == {"loss": 20, "mse": 20, "mae": 20}


def test_a_client_says_what_it_does(repeated: Trained) -> None:
    status = repeated.federation.command("client", "status", repeated.federation.folder / "bob" / "client")
    assert status.code() == 0, status.stderr
    assert json.loads(status.stdout)["doing"] == "attending"
