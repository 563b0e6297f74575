from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from choral.errors import ConfigError
from choral.messages import VersionRef
from choral.metrics import Metric
from choral.plan import Kind
from choral_server.objective import Progress
from choral_server.rounds import Part, Round
from choral_server.store import ClientRecord, Record, RunRecord, RunState, Store, VersionRecord, newest

NOON = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
RUN = RunRecord("run", "boston_housing", "1", 100, NOON)
ALICE = ClientRecord("alice", True, 202, "0.1.0", "10.0.0.7:40000", NOON)


def _version(number: int) -> VersionRecord:
    return VersionRecord("run", VersionRef(number, b"d" * 32, 9), Path(f"{number}.safetensors"), NOON)


def _round(number: int) -> Round:
    return Round("run", number, Kind.TRAINING, number, 1, 1, {"a": Part("a", "alice")}, NOON)


@pytest.mark.parametrize("state", RunState)
def test_a_run_survives_a_restart(tmp_path: Path, state: RunState) -> None:
    record = RunRecord(
        name="run-2",
        task="boston_housing",
        task_version="1.5",
        rounds_planned=100,
        started_at=NOON,
        state=state,
        reason="the deadline – passed",
        rounds_done=7,
        next_round=9,
        latest=8,
        has_statistics=True,
        paused=True,
        progress=Progress(best=6, value=15.25, stale=2),
        next_round_at=NOON + timedelta(hours=1),
    )
    Store(tmp_path).save(record)
    # when the next round opens is worked out anew from the schedule
    assert Store(tmp_path).load_run("run-2") == replace(record, next_round_at=None)


def test_a_new_run_survives_a_restart(tmp_path: Path) -> None:
    Store(tmp_path).save(RUN)
    assert Store(tmp_path).load_run("run") == RUN
    assert [path.name for path in (tmp_path / "runs/run").iterdir()] == ["run.json"]


def test_the_newest_state_is_on_disk_when_save_returns(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for done in range(3):
        store.save(replace(RUN, rounds_done=done))
        assert Store(tmp_path).load_run("run") == replace(RUN, rounds_done=done)
        assert store.runs["run"].rounds_done == done


def test_waiting_for_another_moment_is_not_worth_writing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    path = tmp_path / "runs/run/run.json"
    path.unlink()
    later = replace(RUN, next_round_at=NOON)
    store.save(later)
    assert not path.exists()
    assert store.runs["run"] == later
    store.save(replace(later, rounds_done=1))
    assert path.exists()


def test_a_run_that_never_was_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path / "new").load_run("run") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "7",
        lambda text: text.replace('"waiting"', '"dreaming"'),
        lambda text: text.replace('"latest"', '"newest"'),
        lambda text: text.replace('"2025-06-01', '"yesterday'),
        lambda text: text.replace('"stale"', '"stail"'),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "task"}),
        lambda text: "\udcff" + text,
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: object) -> None:
    store, path = Store(tmp_path), tmp_path / "runs/run/run.json"
    store.save(RUN)
    text = path.read_text(encoding="utf-8")
    damaged = damage(text)  # type: ignore[operator]
    assert damaged != text
    path.write_text(damaged, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"is damaged \(.*\): give the run another name, or restore the file") as refused:
        Store(tmp_path).load_run("run")
    assert str(refused.value).startswith(f"{path}: ")


def test_records_replace_their_predecessors(tmp_path: Path) -> None:
    store = Store(tmp_path)
    measured = replace(_version(1), test=(Metric("mse", 15.0, 102),))
    store.save(_round(1), _round(2), replace(_round(1), duration_s=2.0), _version(1), measured, ALICE, replace(ALICE, accepted=1))
    assert store.rounds == {("run", 1): replace(_round(1), duration_s=2.0), ("run", 2): _round(2)}
    assert store.versions == {("run", 1): measured}
    assert store.clients == {"alice": replace(ALICE, accepted=1)}


def test_only_the_newest_thousand_rounds_and_versions_are_held(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(1003):
        store.save(_round(number), _version(number))
    assert [number for _, number in store.rounds] == list(range(3, 1003))
    assert [number for _, number in store.versions] == list(range(3, 1003))


def test_newest_first() -> None:
    assert newest([1, 2, 3, 4], 2) == [4, 3]
    assert newest([1, 2], 5) == [2, 1]
    assert newest(iter([]), 5) == []


# Watching


async def _next(watch: AsyncIterator[Record]) -> Record:
    async with asyncio.timeout(30):
        return await anext(watch)


async def _take(watch: AsyncIterator[Record], count: int) -> list[Record]:
    return [await _next(watch) for _ in range(count)]


async def _rest(watch: AsyncIterator[Record]) -> list[Record]:
    async with asyncio.timeout(30):
        return [record async for record in watch]


async def test_a_watch_begins_with_what_there_is_and_goes_on_with_each_change(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN, ALICE, _round(1), _version(1))
    watch = store.watch()
    assert [await _next(watch) for _ in range(2)] == [RUN, ALICE]
    for record in (_round(2), _version(2), replace(ALICE, accepted=1), replace(RUN, rounds_done=1)):
        store.save(record)
        assert await _next(watch) == record


async def test_a_change_wakes_who_waits_for_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    watch = store.watch()
    await _next(watch)
    waiting = asyncio.ensure_future(_next(watch))
    await asyncio.wait([waiting], timeout=0)
    assert not waiting.done()
    store.save(ALICE)
    assert await waiting == ALICE


async def test_a_slow_reader_gets_the_newest_state_of_each_thing_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    watch = store.watch()
    assert await _next(watch) == RUN
    for number in range(1, 4):
        done = replace(_round(number), duration_s=float(number))
        store.save(replace(RUN, rounds_done=number), _round(number), done, replace(ALICE, accepted=number), _version(number))
    store.save(replace(ALICE, name="bob"))
    assert await _take(watch, 9) == [
        replace(_round(1), duration_s=1.0),
        _version(1),
        replace(_round(2), duration_s=2.0),
        _version(2),
        replace(RUN, rounds_done=3),
        replace(_round(3), duration_s=3.0),
        replace(ALICE, accepted=3),
        _version(3),
        replace(ALICE, name="bob"),
    ]
    store.end_watches()
    assert await _rest(watch) == []


async def test_records_of_the_same_name_but_another_kind_or_run_do_not_hide_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    watch = store.watch()
    assert await _next(watch) == RUN
    different = [replace(RUN, rounds_done=1), replace(ALICE, name="run"), _round(1), _version(1), replace(_round(1), run="run-2")]
    store.save(*different)
    assert await _take(watch, 5) == different


async def test_readers_do_not_take_from_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    first, second = store.watch(), store.watch()
    assert await _next(first) == await _next(second) == RUN
    store.save(ALICE)
    assert await _next(first) == ALICE
    store.save(replace(ALICE, accepted=1))
    assert await _next(first) == await _next(second) == replace(ALICE, accepted=1)


async def test_a_reader_far_behind_loses_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("choral_server.store._UNREAD", 3)
    store = Store(tmp_path)
    store.save(RUN)
    watch = store.watch()
    assert await _next(watch) == RUN
    store.save(*map(_round, range(5)))
    assert await _take(watch, 3) == [_round(2), _round(3), _round(4)]


async def test_the_end_comes_after_what_has_not_been_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    idle, reading = store.watch(), store.watch()
    assert await _next(idle) == await _next(reading) == RUN
    waiting = asyncio.ensure_future(_rest(idle))
    await asyncio.wait([waiting], timeout=0)
    last = replace(RUN, state=RunState.FINISHED)
    store.save(last)
    store.end_watches()
    assert await waiting == [last]
    assert await _rest(reading) == [last]  # who was not yet back for more when the end came


async def test_an_end_without_news_ends_who_waits(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    watch = store.watch()
    assert await _next(watch) == RUN
    waiting = asyncio.ensure_future(_rest(watch))
    await asyncio.wait([waiting], timeout=0)
    store.end_watches()
    assert await waiting == []


async def test_a_reader_who_stops_is_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(RUN)
    watch = store.watch()
    await _next(watch)
    assert len(store._watchers) == 1
    await watch.aclose()  # type: ignore[attr-defined]
    assert len(store._watchers) == 0
    store.save(ALICE)
