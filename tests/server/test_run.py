"""Runs over a real database and real checkpoints: what comes next, what is published, and what a restart finds."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choral.errors import ConfigError, LeaseLost, UnknownVersion
from choral.messages import VersionRef
from choral.metrics import Metric
from choral.plan import Kind, Training
from choral.standardize import Standardize
from choral.statistics import Moments
from choral.task import Task
from choral_server.aggregate import WeightedSum
from choral_server.artifacts import open_artifacts
from choral_server.checkpoints import Make
from choral_server.database import Database
from choral_server.history_key import key_for
from choral_server.lease import Lease
from choral_server.objective import Progress
from choral_server.records import RunRecord, RunState
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.run import Aggregate, Run
from choral_server.statistics_sum import StatisticsSum
from choral_server.store import Store
from choral_server.troubles import Troubles
from numpy.typing import NDArray
from safetensors.torch import load_file
from server.home import NOON, PLAIN, Home, config, home, weights
from server.object_store import ObjectStore
from torch import nn
from torch.utils.data import TensorDataset

__all__ = ["home"]

STANDARDIZED = replace(PLAIN, model=lambda: nn.Sequential(Standardize(2), nn.Linear(2, 1)))
TEST_SET = TensorDataset(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0]]))
NOTHING = [([0.0, 0.0, 0.0], 1)]
MOMENTUM = {"strategy": {"name": "fedavgm", "momentum": 0.5}}

HeldOut = tuple[str, float, int]
"""a client, the loss that it measured, and on how many examples"""


async def closed(run: Run, kind: Kind, *held_out: HeldOut, state: PartState = PartState.ACCEPTED) -> Round:
    """A closed round from the run's version, in which clients measured its loss."""
    number, version = run.record.next_round, run.version.number
    parts = {
        f"{run.record.name}/{number}/{client}": Part(
            f"{run.record.name}/{number}/{client}", client, state, examples=10, held_out=(Metric("loss", loss, examples),)
        )
        for client, loss, examples in held_out
    }
    opened = Round(run.record.name, number, kind, version, len(parts), 1, parts, NOON)
    await run.open(opened)
    return replace(opened, state=RoundState.CLOSED)


def summed(run: Run, folder: Path, updates: Sequence[tuple[Sequence[float] | NDArray[Any], int]]) -> WeightedSum:
    """Updates with their weights, as a training round adds them."""
    aggregate = run.aggregate(Kind.TRAINING, 1)
    assert isinstance(aggregate, WeightedSum)
    for number, (delta, examples) in enumerate(updates):
        path = folder / "one.upload"
        path.write_bytes(np.asarray(delta, "<f4").tobytes())
        aggregate.fold(Part(str(number), str(number), PartState.ACCEPTED, examples=examples), path)
    return aggregate


async def trained(
    run: Run, home: Home, updates: Sequence[tuple[Sequence[float] | NDArray[Any], int]] = NOTHING, *held_out: HeldOut
) -> Round:
    """What a training round does to a run."""
    return await run.settle(await closed(run, Kind.TRAINING, *held_out), summed(run, home.folder, updates), NOON)


async def statistics(run: Run, home: Home, examples: dict[str, NDArray[Any]]) -> None:
    """What a statistics round does to a run."""
    aggregate = run.aggregate(Kind.STATISTICS, 1)
    assert isinstance(aggregate, StatisticsSum)
    for client, rows in examples.items():
        path = home.folder / f"{client}.upload"
        path.write_bytes(Moments.of(rows).to_vector().astype("<f8").tobytes())
        aggregate.fold(Part(client, client, PartState.ACCEPTED), path)
    await run.settle(await closed(run, Kind.STATISTICS), aggregate, NOON)


async def evaluated(run: Run, *held_out: HeldOut) -> None:
    """What an evaluation round does to a run."""
    aggregate: Aggregate = run.aggregate(Kind.EVALUATION, 1)
    assert aggregate is None
    await run.settle(await closed(run, Kind.EVALUATION, *held_out), aggregate, NOON)


def made_from(run: Run, aggregate: WeightedSum) -> Make:
    """What writes the next version."""

    async def make(path: Path, state: Path) -> bytes:
        return run.make_version(Kind.TRAINING, aggregate, path, state)

    return make


def tensors(run: Run) -> dict[str, Any]:
    """What is in its newest version."""
    return {name: tensor.tolist() for name, tensor in load_file(run.checkpoints.path(run.version.number)).items()}


def named(run: Run, name: str) -> Path:
    return run.checkpoints.path(0).with_name(f"{name}.safetensors")


# A run, from its first version on


async def test_a_new_run_begins_with_the_tasks_weights(home: Home) -> None:
    run = await home.open(config({"name": "june", "seed": 7}))
    assert run.record == RunRecord("june", "plane", "1", 3, NOON, nonce=run.record.nonce)
    assert run.version.number == 0
    path = home.folder / "runs/june/versions/000000.safetensors"
    expected = PLAIN.initial_model(7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())
    assert (home.folder / "runs/june/versions/latest.safetensors").resolve() == path.resolve()
    await home.restart()
    assert home.store.runs == {"june": run.record}
    assert await home.store.version("june", 0) == run.current
    assert (run.current.checkpoint, run.current.published_at) == (str(path), NOON)
    assert (run.over, run.active) == (False, True)


async def test_hyper_parameters_are_the_tasks_with_the_configured_changes(home: Home) -> None:
    run = await home.open(config({"training": {"epochs": 4}}))
    assert run.training == Training(epochs=4, batch_size=8, learning_rate=0.001)


async def test_a_version_is_plain_federated_averaging(home: Home) -> None:
    """Against the mean of the clients' models, weighted by examples."""
    run = await home.open()
    before = weights(run)
    alice, bob = np.array([1.0, -2.0, 0.5], np.float32), np.array([-3.0, 2.0, 0.0], np.float32)
    await trained(run, home, [(alice, 30), (bob, 10)])
    expected = ((before + alice) * 30.0 + (before + bob) * 10.0) / 40.0
    np.testing.assert_allclose(weights(run), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(weights(run) - before, [0.0, -1.0, 0.375], rtol=0, atol=1e-6)
    stored = load_file(run.checkpoints.path(1))
    assert np.concatenate([stored["weight"].numpy().ravel(), stored["bias"].numpy()]).tolist() == weights(run).tolist()
    assert (run.version.number, run.record.latest, run.record.rounds_done) == (1, 1, 1)


async def test_a_weight_is_capped(home: Home) -> None:
    run = await home.open(config({"weight_cap": 10}))
    before = weights(run)
    await trained(run, home, [([1.0, 1.0, 1.0], 10), ([0.0, 0.0, 0.0], 1_000_000)])
    np.testing.assert_allclose(weights(run) - before, [0.5] * 3, atol=1e-6)


async def test_a_settled_round_is_stored_as_done_with_its_version(home: Home) -> None:
    run = await home.open()
    done = await trained(run, home, NOTHING, ("alice", 0.5, 10))
    assert done.state is RoundState.DONE
    await home.restart()
    assert await home.store.round("run", 0) == done
    assert await home.store.unfinished("run") is None
    assert await home.store.version("run", 1) == run.current
    content = run.checkpoints.path(1).read_bytes()
    assert run.version == VersionRef(1, hashlib.sha256(content).digest(), len(content))


async def test_statistics_come_first_and_fill_the_model(home: Home) -> None:
    run = await home.open(task=STANDARDIZED)
    assert run.next_kind() is Kind.STATISTICS
    before = weights(run)
    a, b = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[8.0, 0.0]])
    await statistics(run, home, {"bob": b, "alice": a})
    state = load_file(run.checkpoints.path(1))
    assert state["0.mean"].tolist() == [4.0, 0.0]
    assert state["0.scale"].tolist() == [pytest.approx((26 / 3) ** 0.5), 1.0]
    assert weights(run).tolist() == before.tolist()
    assert (run.version.number, run.record.rounds_done, run.record.has_statistics) == (1, 0, True)
    assert run.next_kind() is Kind.TRAINING


async def test_what_comes_next(home: Home) -> None:
    run = await home.open(config({"rounds": 2}))
    for _ in range(2):
        assert run.next_kind() is Kind.TRAINING
        await trained(run, home)
    assert run.next_kind() is Kind.EVALUATION  # the last version, by the clients
    await evaluated(run, ("alice", 1.0, 5))
    assert run.version.number == 2
    assert run.next_kind() is None
    assert run.outcome() == "2 rounds completed"


async def test_an_evaluation_that_nobody_answered_is_not_repeated(home: Home) -> None:
    run = await home.open(config({"rounds": 1}))
    await trained(run, home)
    await evaluated(run)
    assert run.next_kind() is None
    assert run.record.progress == Progress()


async def test_an_evaluation_that_was_abandoned_is_not_repeated_for_the_same_version(home: Home) -> None:
    run = await home.open(config({"rounds": 1}))
    await trained(run, home)
    await closed(run, Kind.EVALUATION)  # and nothing comes of it
    assert run.next_kind() is None
    await run.roll_back(0, NOON)
    assert run.next_kind() is Kind.EVALUATION


async def test_without_measurements_by_clients_there_is_no_evaluation_round(home: Home) -> None:
    run = await home.open(config({"rounds": 1}, evaluation={"clients": False}))
    assert not run.clients_measure
    await trained(run, home)
    assert run.next_kind() is None


# What is measured


async def test_early_stopping(home: Home) -> None:
    run = await home.open(config({"rounds": 9, "objective": {"patience_rounds": 2}}))
    for loss in (3.0, 1.0, 2.0, 1.5):  # of versions 0 to 3, each measured in the round that starts from it
        assert run.next_kind() is Kind.TRAINING
        await trained(run, home, NOTHING, ("alice", loss, 1))
    assert run.record.progress == Progress(best=1, value=1.0, stale=2)
    assert run.next_kind() is Kind.EVALUATION
    await evaluated(run, ("alice", 4.0, 1))
    assert run.next_kind() is None
    assert run.outcome() == "stopped early after 4 rounds: loss has not improved on version 1"


async def test_the_test_set_judges_if_there_is_one(home: Home) -> None:
    run = await home.open(config(evaluation={"test_set": "test.csv"}), test_set=TEST_SET)
    assert run.has_test_set
    weight, _, bias = weights(run).tolist()
    loss = pytest.approx((weight + bias) ** 2, rel=1e-5)
    measured = await run.measure()
    assert measured == (Metric("loss", loss, 1),)
    assert run.record.progress == Progress(best=0, value=loss)
    assert await run.measure() == ()  # once for each version
    await trained(run, home, [([-weight, 0.0, -bias], 1)], ("alice", 1e-9, 10))
    assert run.record.progress == Progress(best=0, value=loss)
    await run.measure()
    assert run.record.progress == Progress(best=1, value=pytest.approx(0.0, abs=1e-9))
    await home.restart()
    second, first = await home.store.versions("run", 9)
    assert (first.test, first.clients) == (measured, (Metric("loss", 1e-9, 10),))
    assert (second.test, second.clients) == ((Metric("loss", pytest.approx(0.0, abs=1e-9), 1),), ())


async def test_what_was_measured_before_a_restart_is_not_measured_again(home: Home) -> None:
    settings = config(evaluation={"test_set": "test.csv"})
    await (await home.open(settings, test_set=TEST_SET)).measure()
    await home.restart()
    again = await home.open(settings, test_set=TEST_SET)
    assert await again.measure() == ()
    await trained(again, home)
    await home.restart()
    assert len(await (await home.open(settings, test_set=TEST_SET)).measure()) == 1  # it died in between


@pytest.mark.parametrize("test_set", [TEST_SET, None])
async def test_clients_judge_if_it_is_wanted_or_there_is_no_test_set(home: Home, test_set: TensorDataset | None) -> None:
    wanted = config({"objective": {"on": "clients"}}, evaluation={"test_set": "test.csv"})
    run = await home.open(wanted if test_set is not None else config(), test_set=test_set)
    assert bool(await run.measure()) is (test_set is not None)
    await trained(run, home, NOTHING, ("alice", 1.0, 30), ("bob", 5.0, 10))
    assert run.record.progress == Progress(best=0, value=2.0)


async def test_measurements_are_kept_with_the_version_they_are_of(home: Home) -> None:
    run = await home.open()
    await trained(run, home, NOTHING, ("alice", 1.0, 30), ("bob", 5.0, 10))
    await home.restart()
    newest, measured = await home.store.versions("run", 9)
    assert (newest.version.number, newest.clients) == (1, ())
    assert (measured.version.number, measured.clients, measured.test) == (0, (Metric("loss", 2.0, 40),), ())
    assert measured.checkpoint == str(run.checkpoints.path(0))


async def test_only_accepted_results_are_measurements(home: Home) -> None:
    run = await home.open()
    await run.settle(await closed(run, Kind.EVALUATION, ("alice", 1.0, 30), state=PartState.REFUSED), None, NOON)
    assert run.record.progress == Progress()
    assert run.current.clients == ()


# What is kept


async def test_best_is_named_and_kept_when_old_versions_go(home: Home) -> None:
    run = await home.open(config({"rounds": 9, "keep_versions": 2}))
    for loss in (4.0, 1.0, 3.0, 2.0, 5.0):  # of versions 0 to 4
        await trained(run, home, [([1.0, 0.0, 0.0], 1)], ("alice", loss, 10))
    assert run.record.progress == Progress(best=1, value=1.0, stale=3)
    assert named(run, "best").resolve() == run.checkpoints.path(1).resolve()
    assert named(run, "latest").resolve() == run.checkpoints.path(5).resolve()
    kept = sorted(path.name for path in run.checkpoints.path(0).parent.iterdir())
    assert kept == [*(f"00000{number}.safetensors" for number in (1, 4, 5)), "best.safetensors", "latest.safetensors"]
    load_file(named(run, "best"))


async def test_best_is_kept_if_it_is_the_first_version(home: Home) -> None:
    run = await home.open(config({"rounds": 9, "keep_versions": 1}))
    for loss in (1.0, 2.0, 3.0):
        await trained(run, home, [([1.0, 0.0, 0.0], 1)], ("alice", loss, 10))
    assert run.record.progress.best == 0
    assert set(load_file(named(run, "best"))) == {"weight", "bias"}


# Publishing is one commit, and waits for what it needs


async def test_nothing_is_published_that_could_not_be_stored(home: Home) -> None:
    run = await home.open()
    version = run.version
    round = await closed(run, Kind.TRAINING, ("alice", 0.5, 1))
    opened = run.record
    rival = await Database.open(f"sqlite:///{home.folder / 'choral.db'}", Troubles())
    try:
        await Lease.take(rival, "here", 3600.0)
        with pytest.raises(LeaseLost):
            await run.settle(round, summed(run, home.folder, [([1.0, 1.0, 1.0], 1)]), NOON)
        assert (run.record, run.version) == (opened, version)
        other = await Store.open(rival, await Lease.take(rival, "here", 3600.0), await key_for(home.folder, rival))
        assert other.runs["run"] == opened
        assert [record.version for record in await other.versions("run", 9)] == [version]
    finally:
        await rival.close()


async def test_publishing_waits_for_a_folder_that_cannot_be_written(home: Home) -> None:
    run = await home.open()
    blocked = run.checkpoints.path(1)
    blocked.mkdir()
    settling = asyncio.create_task(trained(run, home, [([1.0, 0.0, 0.0], 1)]))
    assert await home.next_trouble() == "artifacts"
    assert home.troubles.present["artifacts"] == f"{blocked} cannot be written (Is a directory)"
    assert (run.version.number, run.record.latest, home.store.runs["run"].latest) == (0, 0, 0)
    blocked.rmdir()
    await settling
    assert home.troubles.present == {}
    assert (run.version.number, run.record.latest) == (1, 1)


async def test_what_an_operator_changes_meanwhile_is_not_lost(home: Home) -> None:
    run = await home.open()
    blocked = run.checkpoints.path(1)
    blocked.mkdir()
    settling = asyncio.create_task(trained(run, home))
    await home.next_trouble()
    await run.save(paused=True, reason="pauses when this round ends")
    blocked.rmdir()
    await settling
    assert (run.record.paused, run.record.reason, run.record.rounds_done) == (True, "pauses when this round ends", 1)
    assert home.store.runs["run"] == run.record


async def test_an_object_store_that_is_gone_is_waited_for(home: Home, object_store: ObjectStore, bucket_url: str) -> None:
    home.artifacts = await open_artifacts(bucket_url, home.folder)
    run = await home.open(config({"keep_versions": 1}))
    object_store.stop()
    try:
        settling = asyncio.create_task(trained(run, home, [([1.0, 0.0, 0.0], 1)]))
        assert await home.next_trouble() == "artifacts"
        assert run.version.number == 0
    finally:
        await asyncio.to_thread(object_store.start)
    await settling
    assert home.troubles.present == {}
    assert run.version.number == 1
    assert run.current.checkpoint == f"{bucket_url.partition('?')[0]}/runs/run/versions/000001.safetensors"
    assert object_store.keys(bucket_url) == ["some/prefix/runs/run/versions/000001.safetensors"]


async def test_when_the_next_round_comes_is_told_and_not_written(home: Home) -> None:
    run = await home.open()
    await run.save(next_round_at=NOON)
    assert home.store.runs["run"].next_round_at == NOON
    await run.save(state=RunState.PAUSED, paused=True)
    assert run.record.next_round_at == NOON
    await home.restart()
    assert (home.store.runs["run"].state, home.store.runs["run"].next_round_at) == (RunState.PAUSED, None)


# Restarts


async def test_a_restart_goes_on_from_the_latest_version(home: Home) -> None:
    before = await home.open(task=STANDARDIZED)
    await statistics(before, home, {"alice": np.array([[1.0, 0.0], [3.0, 4.0]])})
    await trained(before, home, [([1.0, 2.0, 3.0], 5)])
    await evaluated(before, ("alice", 0.5, 10))
    await before.save(state=RunState.IN_ROUND)
    after = await home.reopen(task=STANDARDIZED)
    assert (after.version, after.current) == (before.version, before.current)
    assert tensors(after) == tensors(before)
    assert after.record == replace(before.record, state=RunState.WAITING)
    assert home.store.runs == {"run": after.record}
    assert (after.record.rounds_done, after.record.next_round, after.record.latest) == (1, 3, 2)
    assert after.record.progress == Progress(best=2, value=0.5)
    assert after.next_kind() is Kind.TRAINING
    await trained(after, home)
    assert after.version.number == 3


async def test_a_version_written_but_not_yet_published_is_made_again(home: Home) -> None:
    """As when the process is killed between the two."""
    killed = await home.open()
    first = weights(killed)
    aggregate = summed(killed, home.folder, [([1.0, 1.0, 1.0], 1)])
    await killed.checkpoints.publish(await killed.checkpoints.draft(1, made_from(killed, aggregate)))
    after = await home.reopen()
    assert (after.version.number, after.record.rounds_done) == (0, 0)
    assert weights(after).tolist() == first.tolist()
    await trained(after, home, [([2.0, 2.0, 2.0], 1)])
    assert after.version.number == 1
    np.testing.assert_allclose(weights(await home.reopen()), first + 2, atol=1e-6)


async def test_latest_is_the_version_of_the_record_after_a_kill_before_it_was_pointed_at(home: Home) -> None:
    killed = await home.open()
    await trained(killed, home, [([1.0, 0.0, 0.0], 1)])
    killed.checkpoints.point("latest", 0)  # the link as it is between commit and naming
    after = await home.reopen()
    assert after.version.number == 1
    assert named(after, "latest").resolve() == after.checkpoints.path(1).resolve()


async def test_with_an_object_store_the_state_folder_can_be_lost(home: Home, bucket_url: str) -> None:
    home.artifacts = await open_artifacts(bucket_url, home.folder)
    before = await home.open(config(MOMENTUM))
    await trained(before, home, [([1.0, 0.0, 0.0], 1)], ("alice", 0.5, 1))
    (home.folder / "runs").rename(home.folder / "lost")
    after = await home.reopen(config(MOMENTUM))
    assert weights(after).tolist() == weights(before).tolist()
    assert (named(after, "latest").read_bytes(), after.version) == (after.checkpoints.path(1).read_bytes(), before.version)
    await trained(after, home)
    np.testing.assert_allclose(weights(after) - weights(before), [0.5, 0.0, 0.0], atol=1e-6)


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
async def test_in_which_state_a_restart_finds_a_run(home: Home, state: RunState, opens_as: RunState) -> None:
    await (await home.open()).save(state=state, reason="as it was")
    after = await home.reopen()
    assert after.record.state is opens_as
    assert after.record.reason == ("as it was" if state is RunState.STOPPED else "")
    assert after.active is (opens_as is RunState.WAITING)


@pytest.mark.parametrize("state", RunState)
async def test_when_a_run_is_over_and_when_it_is_active(home: Home, state: RunState) -> None:
    run = await home.open()
    await run.save(state=state)
    assert run.over is (state in {RunState.FINISHED, RunState.STOPPED})
    assert run.active is (state not in {RunState.FINISHED, RunState.STOPPED, RunState.FAILED})


async def test_a_restart_remembers_when_the_last_round_opened(home: Home) -> None:
    """Or a coordinator that is started again would run a nightly round by day."""
    at = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
    await (await home.open()).save(opened_at=at)
    assert (await home.reopen()).record.opened_at == at


async def test_what_an_operator_or_misfortune_did_is_remembered(home: Home) -> None:
    await (await home.open()).save(paused=True, abandoned=4)
    after = await home.reopen()
    assert (after.record.paused, after.record.abandoned) == (True, 4)


async def test_a_finished_run_stays_finished_unless_more_rounds_are_configured(home: Home) -> None:
    run = await home.open(config({"rounds": 1}))
    await trained(run, home)
    await run.save(state=RunState.FINISHED, reason="1 rounds completed")
    assert (await home.reopen(config({"rounds": 1}))).over
    more = await home.reopen(config({"rounds": 2}))
    assert (more.over, more.record.rounds_planned, more.next_kind()) == (False, 2, Kind.TRAINING)
    await more.save(state=RunState.STOPPED)
    assert (await home.reopen(config({"rounds": 9}))).over  # an operator ended it


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (replace(PLAIN, name="other"), r"^run run trains task plane 1, not other 1: give run\.name another value$"),
        (replace(PLAIN, version="2"), r"^run run trains task plane 1, not plane 2: give run\.name another value$"),
        (replace(PLAIN, model=lambda: nn.Linear(3, 1)), r"000000\.safetensors: is not of task plane 1: tensor weight is"),
    ],
)
async def test_the_run_of_another_task_is_refused(home: Home, task: Task, told: str) -> None:
    await (await home.open()).save(state=RunState.PAUSED, paused=True)
    with pytest.raises(ConfigError, match=told):
        await home.reopen(task=task)
    await home.restart()
    assert home.store.runs["run"].state is RunState.PAUSED
    assert (await home.open()).version.number == 0


async def test_a_missing_checkpoint_is_named(home: Home) -> None:
    path = (await home.open()).checkpoints.path(0)
    path.unlink()
    with pytest.raises(ConfigError) as refused:
        await home.reopen()
    assert str(refused.value) == f"version 0 is missing ({path} does not exist): restore a backup, or give another run.name"


async def test_a_damaged_checkpoint_is_named(home: Home) -> None:
    path = (await home.open()).checkpoints.path(0)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError) as refused:
        await home.reopen()
    assert str(refused.value) == f"version 0 is damaged ({path}): restore it from a backup"


async def test_versions_that_the_database_does_not_know_are_not_written_over(home: Home) -> None:
    """The database was lost, or is another: what was trained must not go with it."""
    await trained(await home.open(), home)
    await home.end()
    (home.folder / "choral.db").unlink()
    await home.start()
    before = {path: path.read_bytes() for path in home.folder.rglob("*.safetensors")}
    with pytest.raises(
        ConfigError, match=r"000001\.safetensors is there, and the database knows no such run: restore a backup, give"
    ):
        await home.open()
    assert {path: path.read_bytes() for path in home.folder.rglob("*.safetensors")} == before
    assert (await home.open(config({"name": "other"}))).version.number == 0


async def test_a_run_without_its_newest_version_in_the_database_says_so(home: Home) -> None:
    run = await home.open()
    await home.store.commit(replace(run.record, latest=7))
    with pytest.raises(ConfigError, match=r"^run run: the database has no version 7: restore a backup$"):
        await home.reopen()


# Server momentum: v ← v/2 + Δ, w ← w + v


async def test_the_optimizers_state_survives_a_restart(home: Home) -> None:
    run = await home.open(config(MOMENTUM))
    start = weights(run)
    for change, moved in ((1.0, 1.0), (1.0, 2.5), (0.0, 3.25), (-1.0, 2.625)):
        await trained(run, home, [([change, 0.0, -change], 1)])
        np.testing.assert_allclose(weights(run) - start, [moved, 0.0, -moved], atol=1e-6)
        run = await home.reopen(config(MOMENTUM))


async def test_a_version_killed_before_its_commit_does_not_move_the_state(home: Home) -> None:
    killed = await home.open(config(MOMENTUM))
    start = weights(killed)
    await trained(killed, home, [([1.0, 0.0, 0.0], 1)])
    await killed.checkpoints.draft(2, made_from(killed, summed(killed, home.folder, [([5.0, 0.0, 0.0], 1)])))
    run = await home.reopen(config(MOMENTUM))
    await trained(run, home, [([1.0, 0.0, 0.0], 1)])
    np.testing.assert_allclose(weights(run) - start, [2.5, 0.0, 0.0], atol=1e-6)


async def test_with_another_strategy_the_state_is_dropped(home: Home) -> None:
    run = await home.open(config(MOMENTUM))
    start = weights(run)
    await trained(run, home, [([1.0, 0.0, 0.0], 1)])
    run = await home.reopen()
    await trained(run, home)
    assert await run.checkpoints.state(2) is None
    run = await home.reopen(config(MOMENTUM))
    await trained(run, home)
    np.testing.assert_allclose(weights(run) - start, [1.0, 0.0, 0.0], atol=1e-6)


# Going back


async def test_going_back_publishes_an_earlier_model_with_its_optimizers_state(home: Home) -> None:
    run = await home.open(config({**MOMENTUM, "rounds": 9}))
    start = weights(run)
    for _ in range(3):
        await trained(run, home, [([1.0, 0.0, 0.0], 1)])
    later = NOON + timedelta(hours=3)
    await run.roll_back(1, later)
    np.testing.assert_allclose(weights(run) - start, [1.0, 0.0, 0.0], atol=1e-6)
    assert (run.version.number, run.record.latest, run.record.rounds_done) == (4, 4, 3)
    assert run.current.published_at == later
    one, four = (load_file(run.checkpoints.path(number)) for number in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in one)
    [event] = await home.store.events(9)
    assert (event.what, event.run, event.at) == ("rolled back", "run", later)
    assert event.told == "the model is again that of version 1, as version 4"
    assert named(run, "latest").resolve() == run.checkpoints.path(4).resolve()
    run = await home.reopen(config({**MOMENTUM, "rounds": 9}))
    assert run.version.number == 4
    await trained(run, home)
    np.testing.assert_allclose(weights(run) - start, [1.5, 0.0, 0.0], atol=1e-6)


async def test_going_back_to_what_never_was_changes_nothing(home: Home) -> None:
    run = await home.open()
    await trained(run, home, [([1.0, 0.0, 0.0], 1)])
    before = weights(run)
    with pytest.raises(UnknownVersion, match=r"^run run has no version 7: `choral versions list` shows those there are$"):
        await run.roll_back(7, NOON)
    assert (run.version.number, weights(run).tolist()) == (1, before.tolist())
    assert await home.store.events(9) == []


async def test_going_back_to_what_is_not_kept_any_more_changes_nothing(home: Home) -> None:
    run = await home.open(config({"keep_versions": 1}))
    await trained(run, home, [([1.0, 0.0, 0.0], 1)])
    before = weights(run)
    with pytest.raises(UnknownVersion, match=r"^version 0 is not kept any more .*: the newest that are, are 1$"):
        await run.roll_back(0, NOON)
    assert (run.version.number, weights(run).tolist()) == (1, before.tolist())
    await trained(run, home)
    assert weights(run).tolist() == before.tolist()


async def test_going_back_behind_the_statistics_lets_them_be_measured_again(home: Home) -> None:
    """Or clients would train on raw features."""
    run = await home.open(task=STANDARDIZED)
    await statistics(run, home, {"alice": np.array([[1.0, 0.0], [3.0, 4.0]])})
    await trained(run, home)
    await run.roll_back(1, NOON)
    assert run.next_kind() is Kind.TRAINING
    await run.roll_back(0, NOON)
    assert run.next_kind() is Kind.STATISTICS
    assert (await home.reopen(task=STANDARDIZED)).next_kind() is Kind.STATISTICS


# Further runs


async def test_further_runs_are_numbered_and_the_newest_is_resumed(home: Home) -> None:
    settings = config({"name": "june"})
    await (await home.open(settings)).save(state=RunState.STOPPED)
    for name in ("june-2", "june-3"):
        run = await home.runs(settings).further(NOON, 0, None)
        assert run.record == RunRecord(name, "plane", "1", 3, NOON, nonce=run.record.nonce)
        assert run.version.number == 0
        await run.save(state=RunState.STOPPED)
    await trained(run, home)
    after = await home.reopen(settings)
    assert (after.record.name, after.version.number) == ("june-3", 1)
    assert list(home.store.runs) == ["june", "june-2", "june-3"]
    assert sorted(path.name for path in (home.folder / "runs").iterdir()) == ["june", "june-2", "june-3"]


async def test_a_further_run_has_its_own_number_of_rounds_also_after_a_restart(home: Home) -> None:
    await (await home.open()).save(state=RunState.STOPPED)
    assert (await home.runs().further(NOON, 12, None)).record.rounds_planned == 12
    assert (await home.reopen()).record.rounds_planned == 12


async def test_a_further_run_continues_from_its_parents_model_if_wanted(home: Home) -> None:
    parent = await home.open(task=STANDARDIZED)
    await statistics(parent, home, {"alice": np.array([[1.0, 0.0], [3.0, 4.0]])})
    await trained(parent, home, [([1.0, 2.0, 3.0], 5)])
    continued = await home.runs(task=STANDARDIZED).further(NOON, 0, parent)
    assert tensors(continued) == tensors(parent)
    assert (continued.version.number, continued.record.rounds_done, continued.next_kind()) == (0, 0, Kind.TRAINING)
    afresh = await home.runs(task=STANDARDIZED).further(NOON, 0, None)
    assert afresh.next_kind() is Kind.STATISTICS
    assert weights(afresh).tolist() != weights(parent).tolist()


async def test_a_further_run_begins_at_rest(home: Home) -> None:
    """The momentum of its parent belongs to the parent's clients."""
    parent = await home.open(config(MOMENTUM))
    await trained(parent, home, [([1.0, 0.0, 0.0], 1)])
    continued = await home.runs(config(MOMENTUM)).further(NOON, 0, parent)
    before = weights(continued)
    await trained(continued, home)
    assert weights(continued).tolist() == before.tolist()


async def test_a_parent_without_statistics_leaves_them_to_be_measured(home: Home) -> None:
    parent = await home.open(task=STANDARDIZED)
    await parent.save(state=RunState.STOPPED)
    assert (await home.runs(task=STANDARDIZED).further(NOON, 0, parent)).next_kind() is Kind.STATISTICS
