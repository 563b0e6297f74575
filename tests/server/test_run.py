from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choral.config import parse
from choral.errors import ConfigError
from choral.metrics import Metric
from choral.plan import Kind, Training
from choral.standardize import Standardize
from choral.statistics import Moments
from choral.table import Table
from choral.task import Task
from choral_server.aggregate import WeightedSum
from choral_server.config import ServerConfig
from choral_server.objective import Progress
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.run import Run, further_run, open_run
from choral_server.statistics_sum import StatisticsSum
from choral_server.store import RunRecord, RunState, Store
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
PLAIN = Task("plane", lambda: nn.Linear(2, 1), mse_loss, Table(["a", "b"], target="y"))
STANDARDIZED = replace(PLAIN, model=lambda: nn.Sequential(Standardize(2), nn.Linear(2, 1)))
TEST_SET = TensorDataset(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0]]))


def config(run: dict[str, Any] | None = None, **changes: Any) -> ServerConfig:
    least = {"listen": "127.0.0.1:0", "plaintext": True, "state": "unused", "task": "tests:plane"}
    return parse({**least, "run": {"rounds": 3, "cohort_size": 2, **(run or {})}, **changes}, ServerConfig, "server.yaml")


def opened(
    folder: Path,
    settings: ServerConfig | None = None,
    task: Task = PLAIN,
    test_set: TensorDataset | None = None,
    store: Store | None = None,
) -> Run:
    return open_run(settings or config(), task, test_set, store or Store(folder), NOON)


def trained(run: Run, folder: Path, updates: Sequence[tuple[Sequence[float], int]]) -> None:
    """What a training round does to a run: fold each update with its weight, make the version, publish it."""
    aggregate = run.aggregate(Kind.TRAINING)
    assert isinstance(aggregate, WeightedSum)
    for delta, examples in updates:
        path = folder / "one.upload"
        path.write_bytes(np.asarray(delta, "<f4").tobytes())
        aggregate.fold(path, examples)
    run.publish(run.make_version(aggregate), Kind.TRAINING, NOON)


def measured(run: Run, folder: Path, examples: dict[str, np.ndarray]) -> None:
    """What a statistics round does to a run."""
    aggregate = run.aggregate(Kind.STATISTICS)
    assert isinstance(aggregate, StatisticsSum)
    for client, rows in examples.items():
        path = folder / f"{client}.upload"
        path.write_bytes(Moments.of(rows).to_vector().astype("<f8").tobytes())
        aggregate.fold(path, client)
    run.publish(run.make_version(aggregate), Kind.STATISTICS, NOON)


def closed(run: Run, kind: Kind, *held_out: tuple[str, float, int], state: PartState = PartState.ACCEPTED) -> Round:
    """A round from the run's version, in which clients measured its loss."""
    parts = {
        client: Part(client, client, state, examples=10, held_out=(Metric("loss", loss, examples),))
        for client, loss, examples in held_out
    }
    number, version = run.record.next_round, run.version.number
    return Round(run.record.name, number, kind, version, len(parts), 1, parts, NOON, RoundState.DONE)


def test_a_new_run_begins_with_the_tasks_weights(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"name": "june", "seed": 7}))
    assert run.record == RunRecord("june", "plane", "1", 3, NOON)
    assert run.version.number == 0
    path = tmp_path / "runs/june/versions/000000.safetensors"
    expected = PLAIN.initial_model(7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())
    assert (tmp_path / "runs/june/versions/latest.safetensors").resolve() == path.resolve()
    assert run.checkpoints.reference(0) == run.version
    assert Store(tmp_path).load_run("june") == run.record
    assert (run.over, run.active) == (False, True)


def test_hyper_parameters_are_the_tasks_with_the_configured_changes(tmp_path: Path) -> None:
    assert opened(tmp_path, config({"training": {"epochs": 4}})).training == Training(epochs=4, batch_size=8, learning_rate=0.001)


def test_a_version_is_plain_federated_averaging(tmp_path: Path) -> None:
    """Against the mean of the clients' models, weighted by examples."""
    run = opened(tmp_path)
    before = run.model.weights
    alice, bob = np.array([1.0, -2.0, 0.5], np.float32), np.array([-3.0, 2.0, 0.0], np.float32)
    trained(run, tmp_path, [(alice, 30), (bob, 10)])
    expected = ((before + alice) * 30.0 + (before + bob) * 10.0) / 40.0
    np.testing.assert_allclose(run.model.weights, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(run.model.weights - before, [0.0, -1.0, 0.375], rtol=0, atol=1e-6)
    state = load_file(run.checkpoints.name("latest"))
    assert [*state["weight"].flatten().tolist(), *state["bias"].tolist()] == run.model.weights.tolist()


def test_the_order_of_arrival_changes_no_bit_of_a_version(tmp_path: Path) -> None:
    updates = [([0.1, 1e-5, -3.0], 7), ([1e4, 0.3, 0.7], 100), ([-1e4, 0.2, 0.9], 100)]
    runs = [opened(tmp_path / name) for name in ("there", "back")]
    trained(runs[0], tmp_path, updates)
    trained(runs[1], tmp_path, updates[::-1])
    assert runs[0].version == runs[1].version  # the digests of the files


def test_a_clients_weight_is_capped(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"weight_cap": 10}))
    before = run.model.weights
    trained(run, tmp_path, [([1.0, 1.0, 1.0], 10), ([0.0, 0.0, 0.0], 1_000_000)])
    np.testing.assert_allclose(run.model.weights - before, [0.5] * 3, atol=1e-6)


def test_statistics_come_first_and_fill_the_model(tmp_path: Path) -> None:
    run = opened(tmp_path, task=STANDARDIZED)
    assert run.next_kind() is Kind.STATISTICS
    before = run.model.weights
    a, b = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[8.0, 0.0]])
    measured(run, tmp_path, {"bob": b, "alice": a})
    state = load_file(run.checkpoints.path(1))
    assert state["0.mean"].tolist() == [4.0, 0.0]
    assert state["0.scale"].tolist() == [pytest.approx((26 / 3) ** 0.5), 1.0]
    assert run.model.weights.tolist() == before.tolist()
    assert (run.version.number, run.record.rounds_done, run.record.has_statistics) == (1, 0, True)
    assert run.next_kind() is Kind.TRAINING


def test_what_comes_next(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"rounds": 2}))
    for _ in range(2):
        assert run.next_kind() is Kind.TRAINING
        trained(run, tmp_path, [([0.0, 0.0, 0.0], 1)])
    assert run.next_kind() is Kind.EVALUATION  # the last version, by the clients
    run.measured_by_clients(closed(run, Kind.EVALUATION, ("alice", 1.0, 5)))
    assert run.next_kind() is None
    assert run.outcome() == "2 rounds completed"


def test_an_evaluation_that_nobody_answered_is_not_repeated(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"rounds": 1}))
    trained(run, tmp_path, [([0.0, 0.0, 0.0], 1)])
    run.measured_by_clients(closed(run, Kind.EVALUATION))
    assert run.next_kind() is None
    assert run.record.progress == Progress()


def test_without_measurements_by_clients_there_is_no_evaluation_round(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"rounds": 1}, evaluation={"clients": False}))
    trained(run, tmp_path, [([0.0, 0.0, 0.0], 1)])
    assert run.next_kind() is None


def test_early_stopping(tmp_path: Path) -> None:
    settings = config({"rounds": 9, "objective": {"patience_rounds": 2}}, evaluation={"test_set": "test.csv", "clients": False})
    run = opened(tmp_path, settings, test_set=TEST_SET)
    for loss in (3.0, 1.0, 2.0, 1.5):
        assert run.next_kind() is Kind.TRAINING
        trained(run, tmp_path, [([0.0, 0.0, 0.0], 1)])
        run.measured("test", run.version.number, (Metric("loss", loss, 1),))
    assert run.next_kind() is None
    assert run.outcome() == "stopped early after 4 rounds: loss has not improved on version 2"


def test_the_test_set_judges_if_there_is_one(tmp_path: Path) -> None:
    run = opened(tmp_path, config(evaluation={"test_set": "test.csv"}), test_set=TEST_SET)
    assert run.has_test_set
    weight, _, bias = run.model.weights.tolist()
    assert run.measure() == (Metric("loss", pytest.approx((weight + bias) ** 2, rel=1e-5), 1),)
    run.measured_by_clients(closed(run, Kind.TRAINING, ("alice", 0.5, 10)))
    assert run.record.progress == Progress()
    trained(run, tmp_path, [([0.0, 0.0, 0.0], 1)])
    run.measured("test", 1, (Metric("loss", 0.25, 1),))
    assert run.record.progress == Progress(best=1, value=0.25)


def test_clients_judge_if_it_is_wanted_or_there_is_no_test_set(tmp_path: Path) -> None:
    wanted = config({"objective": {"on": "clients"}}, evaluation={"test_set": "test.csv"})
    for name, settings, test_set in (("a", wanted, TEST_SET), ("b", config(), None)):
        run = opened(tmp_path / name, settings, test_set=test_set)
        run.measured("test", 0, (Metric("loss", 0.25, 1),))
        run.measured_by_clients(closed(run, Kind.TRAINING, ("alice", 1.0, 30), ("bob", 5.0, 10)))
        assert run.record.progress == Progress(best=0, value=2.0)
    assert not run.has_test_set
    assert run.measure() == ()


def test_measurements_are_kept_with_the_version_they_are_of(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = opened(tmp_path, store=store)
    run.measured("test", 0, (Metric("loss", 0.5, 9),))
    run.measured_by_clients(closed(run, Kind.TRAINING, ("alice", 1.0, 30), ("bob", 5.0, 10)))
    run.measured("test", 0, ())
    record = store.versions["run", 0]
    assert record.test == (Metric("loss", 0.5, 9),)
    assert record.clients == (Metric("loss", 2.0, 40),)
    assert record.checkpoint == run.checkpoints.path(0)


def test_only_accepted_results_are_measurements(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.measured_by_clients(closed(run, Kind.TRAINING, ("alice", 1.0, 30), state=PartState.REFUSED))
    assert run.record.progress == Progress()


def test_best_is_named_and_kept_when_old_versions_go(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"rounds": 9, "keep_versions": 2}))
    for loss in (4.0, 1.0, 3.0, 2.0, 5.0):  # of versions 0 to 4, each measured in the round that starts from it
        run.measured_by_clients(closed(run, Kind.TRAINING, ("alice", loss, 10)))
        trained(run, tmp_path, [([1.0, 0.0, 0.0], 1)])
    assert run.record.progress == Progress(best=1, value=1.0, stale=3)
    assert run.checkpoints.name("best").resolve() == run.checkpoints.path(1).resolve()
    assert run.checkpoints.name("latest").resolve() == run.checkpoints.path(5).resolve()
    kept = sorted(path.name for path in run.checkpoints.path(0).parent.iterdir())
    assert kept == [*(f"00000{number}.safetensors" for number in (1, 4, 5)), "best.safetensors", "latest.safetensors"]
    load_file(run.checkpoints.name("best"))


def test_best_is_kept_if_it_is_the_first_version(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"rounds": 9, "keep_versions": 1}))
    for loss in (1.0, 2.0, 3.0):
        run.measured_by_clients(closed(run, Kind.TRAINING, ("alice", loss, 10)))
        trained(run, tmp_path, [([1.0, 0.0, 0.0], 1)])
    assert run.record.progress.best == 0
    assert set(load_file(run.checkpoints.name("best"))) == {"weight", "bias"}


# Restarts


def test_a_restart_goes_on_from_the_latest_version(tmp_path: Path) -> None:
    before = opened(tmp_path, task=STANDARDIZED)
    measured(before, tmp_path, {"alice": np.array([[1.0, 0.0], [3.0, 4.0]])})
    trained(before, tmp_path, [([1.0, 2.0, 3.0], 5)])
    before.measured_by_clients(closed(before, Kind.TRAINING, ("alice", 0.5, 10)))
    before.save(next_round=2, state=RunState.IN_ROUND)
    store = Store(tmp_path)
    after = open_run(config(), STANDARDIZED, None, store, NOON + timedelta(hours=1))
    assert after.version == before.version
    assert after.model.to_bytes({}) == before.model.to_bytes({})
    assert after.record == replace(before.record, state=RunState.WAITING)
    assert (after.record.rounds_done, after.record.next_round, after.record.latest) == (1, 2, 2)
    assert after.record.progress == Progress(best=2, value=0.5)
    assert after.next_kind() is Kind.TRAINING
    assert list(store.versions) == [("run", 2)]
    trained(after, tmp_path, [([0.0, 0.0, 0.0], 5)])
    assert after.version.number == 3


def test_a_version_written_but_not_yet_published_is_made_again(tmp_path: Path) -> None:
    """As when the process is killed between the two."""
    killed = opened(tmp_path)
    aggregate = killed.aggregate(Kind.TRAINING)
    assert isinstance(aggregate, WeightedSum)
    (tmp_path / "x").write_bytes(np.ones(3, "<f4").tobytes())
    aggregate.fold(tmp_path / "x", 1)
    killed.make_version(aggregate)
    after = opened(tmp_path)
    assert (after.version.number, after.record.rounds_done) == (0, 0)
    assert after.model.weights.tolist() == opened(tmp_path / "fresh").model.weights.tolist()
    trained(after, tmp_path, [([2.0, 2.0, 2.0], 1)])
    assert after.version.number == 1
    assert after.checkpoints.reference(1) == after.version


def test_latest_is_the_version_of_the_record_after_a_kill_before_it_was_pointed_at(tmp_path: Path) -> None:
    killed = opened(tmp_path)
    trained(killed, tmp_path, [([1.0, 0.0, 0.0], 1)])
    killed.checkpoints.point("latest", 0)  # the link as it is between the two last steps of publish
    after = opened(tmp_path)
    assert after.version.number == 1
    assert after.checkpoints.name("latest").resolve() == after.checkpoints.path(1).resolve()


@pytest.mark.parametrize(
    ("state", "opens_as"),
    [
        (RunState.WAITING, RunState.WAITING),
        (RunState.IN_ROUND, RunState.WAITING),
        (RunState.PAUSED, RunState.WAITING),
        (RunState.FAILED, RunState.WAITING),  # whoever restarts it has mended it
        (RunState.STOPPED, RunState.STOPPED),
    ],
)
def test_in_which_state_a_restart_finds_a_run(tmp_path: Path, state: RunState, opens_as: RunState) -> None:
    opened(tmp_path).save(state=state, reason="as it was")
    after = opened(tmp_path)
    assert after.record.state is opens_as
    assert after.record.reason == ("as it was" if opens_as is state and state in {RunState.STOPPED} else "")
    assert after.active is (opens_as is RunState.WAITING)


def test_a_restart_remembers_when_the_last_round_opened(tmp_path: Path) -> None:
    """Or a coordinator that is started again would run a nightly round by day."""
    run = opened(tmp_path)
    at = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
    run.save(opened_at=at)
    assert opened(tmp_path).record.opened_at == at


def test_a_paused_run_is_still_paused_after_a_restart(tmp_path: Path) -> None:
    opened(tmp_path).save(paused=True)
    assert opened(tmp_path).record.paused


def test_a_finished_run_stays_finished_unless_more_rounds_are_configured(tmp_path: Path) -> None:
    run = opened(tmp_path, config({"rounds": 1}))
    trained(run, tmp_path, [([0.0, 0.0, 0.0], 1)])
    run.save(state=RunState.FINISHED, reason="1 rounds completed")
    assert opened(tmp_path, config({"rounds": 1})).over
    more = opened(tmp_path, config({"rounds": 2}))
    assert (more.over, more.record.rounds_planned, more.next_kind()) == (False, 2, Kind.TRAINING)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (replace(PLAIN, name="other"), r"run run in .*/runs/run trains task plane 1, not other 1: give run\.name another value"),
        (replace(PLAIN, version="2"), r"trains task plane 1, not plane 2: give run\.name another value"),
        (replace(PLAIN, model=lambda: nn.Linear(3, 1)), r"000000\.safetensors: is not of task plane 1: tensor weight is"),
    ],
)
def test_the_run_of_another_task_is_refused(tmp_path: Path, task: Task, told: str) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match=told):
        opened(tmp_path, task=task)
    assert opened(tmp_path).version.number == 0


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    run = opened(tmp_path)
    path = run.checkpoints.path(0)
    path.unlink()
    with pytest.raises(ConfigError, match=r"is missing, though run run had got that far: restore it, or give run\.name") as refused:
        opened(tmp_path)
    assert str(refused.value).startswith(f"{path}: ")


# Further runs


def test_further_runs_are_numbered_and_the_newest_is_resumed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    settings = config({"name": "june"})
    opened(tmp_path, settings, store=store).save(state=RunState.STOPPED)
    for name in ("june-2", "june-3"):
        run = further_run(settings, PLAIN, None, store, NOON, 0, None)
        assert run.record == RunRecord(name, "plane", "1", 3, NOON)
        assert run.version.number == 0
        run.save(state=RunState.STOPPED)
    trained(run, tmp_path, [([0.0, 0.0, 0.0], 1)])
    after = opened(tmp_path, settings)
    assert (after.record.name, after.version.number) == ("june-3", 1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["june", "june-2", "june-3"]


def test_a_further_run_has_its_own_number_of_rounds_also_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    opened(tmp_path, store=store).save(state=RunState.STOPPED)
    assert further_run(config(), PLAIN, None, store, NOON, 12, None).record.rounds_planned == 12
    assert opened(tmp_path).record.rounds_planned == 12


def test_a_further_run_continues_from_its_parents_model_if_wanted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parent = opened(tmp_path, task=STANDARDIZED, store=store)
    measured(parent, tmp_path, {"alice": np.array([[1.0, 0.0], [3.0, 4.0]])})
    trained(parent, tmp_path, [([1.0, 2.0, 3.0], 5)])
    continued = further_run(config(), STANDARDIZED, None, store, NOON, 0, parent)
    assert continued.model.to_bytes({}) == parent.model.to_bytes({})
    assert (continued.version.number, continued.record.rounds_done, continued.next_kind()) == (0, 0, Kind.TRAINING)
    afresh = further_run(config(), STANDARDIZED, None, store, NOON, 0, None)
    assert afresh.next_kind() is Kind.STATISTICS
    assert afresh.model.weights.tolist() != parent.model.weights.tolist()


def test_a_parent_without_statistics_leaves_them_to_be_measured(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parent = opened(tmp_path, task=STANDARDIZED, store=store)
    parent.save(state=RunState.STOPPED)
    assert further_run(config(), STANDARDIZED, None, store, NOON, 0, parent).next_kind() is Kind.STATISTICS
