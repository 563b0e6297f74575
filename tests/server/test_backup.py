from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import stat
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from choral.config import parse
from choral.errors import ArtifactsGone, ConfigError, OutOfSpace
from choral.metrics import Metric
from choral.plan import Kind
from choral_server.artifacts import Artifacts, FolderArtifacts, open_artifacts
from choral_server.backups import reading, restoring, taking
from choral_server.backups.contents import Summary, known_schemas
from choral_server.backups.restoring import restore
from choral_server.backups.taking import back_up
from choral_server.checkpoints import Checkpoints
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.history_key import key_for
from choral_server.lease import Lease
from choral_server.objective import Progress
from choral_server.records import ClientRecord, EventRecord, RunRecord, RunState, VersionRecord
from choral_server.rounds import Part, PartState, Round, RoundState
from choral_server.store import Store
from choral_server.tables import LEASES, METADATA
from choral_server.troubles import Troubles
from server.databases import Postgres
from server.home import write_version

NOON = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
LATER = NOON + timedelta(days=2, microseconds=-123456)
MEASURED = (
    Metric("loss", 0.1 + 0.2, 2**40),
    Metric("worst", math.inf, 1),
    Metric("unknown", math.nan, 1),
    Metric("größe \0", 5e-324, 1),
)
RUN = RunRecord(
    "run",
    "small",
    "1",
    100,
    NOON,
    state=RunState.IN_ROUND,
    rounds_done=3,
    next_round=5,
    latest=3,
    has_statistics=True,
    abandoned=1,
    progress=Progress(best=1, value=0.1 + 0.2, stale=2),
    opened_at=NOON,
)
STOPPED = RunRecord("run-2", "small", "1", 5, NOON, state=RunState.STOPPED, reason="stopped by an operator", next_round=1)
FRESH = RunRecord("run-3", "small", "1", 5, NOON, state=RunState.WAITING, reason="waiting for clients: 0 of 2 attend")
ALICE = ClientRecord("alice", True, 202, "0.1.0", "10.0.0.7:40000", NOON, accepted=3, quarantine="a\0b 'quoted' \\ é")
ACCEPTED = Part("run/4/alice", "alice", PartState.ACCEPTED, "", 202, MEASURED, (), bytes(range(32)))
ROUNDS = (
    Round("run", 3, Kind.TRAINING, 2, 1, 1, {"run/3/bob": Part("run/3/bob", "bob", PartState.DECLINED)}, NOON, RoundState.DONE),
    Round("run", 4, Kind.TRAINING, 3, 2, 1, {"run/4/bob": Part("run/4/bob", "bob"), "run/4/alice": ACCEPTED}, NOON),
    Round("run-2", 0, Kind.STATISTICS, 0, 1, 1, {}, NOON, RoundState.CLOSED),
)


def weights(run: str, number: int) -> bytes:
    return f"weights of {run} {number}".encode() * (1000 + number)


def momentum(run: str, number: int) -> bytes | None:
    return f"momentum of {run} {number}".encode() if run == "run" and number >= 2 else None


def configured(state: Path, database: str | None = None, **changes: Any) -> ServerConfig:
    least = {"listen": "127.0.0.1:0", "plaintext": True, "state": str(state), "task": "small:task", "database": database}
    return parse({**least, "run": {"rounds": 3, "cohort_size": 2}, **changes}, ServerConfig, "choral.yaml")


@contextlib.asynccontextmanager
async def opened(config: ServerConfig) -> AsyncIterator[tuple[Store, Database]]:
    """As a coordinator has it open."""
    config.state.mkdir(parents=True, exist_ok=True)
    database = await Database.open(config.database_url, Troubles())
    try:
        lease = await Lease.take(database, "coordinator", 60)
        yield await Store.open(database, lease, await key_for(config.state, database), lambda: NOON), database
        await lease.give_up()
    finally:
        await database.close()


async def version(config: ServerConfig, run: str, number: int) -> VersionRecord:
    """Its files in the store, and its record."""
    checkpoints = Checkpoints(await open_artifacts(config.artifacts, config.state), config.state, run)
    reference = await write_version(checkpoints, number, weights(run, number), momentum(run, number))
    return VersionRecord(run, reference, checkpoints.location(number), NOON, test=MEASURED if number == 1 else ())


async def fill(config: ServerConfig) -> None:
    """Three runs, one of them in a round; version 0 of the first has been pruned."""
    async with opened(config) as (store, _):
        versions = [await version(config, "run", number) for number in range(4)]
        versions += [await version(config, name, 0) for name in ("run-2", "run-3")]
        events = [EventRecord(NOON, "client declined", f"event {number}", "run", number, "bob") for number in range(5)]
        await store.commit(RUN, STOPPED, FRESH, *versions, ALICE, replace(ALICE, name="bob", quarantine=""), *ROUNDS, *events)
    artifacts = await open_artifacts(config.artifacts, config.state)
    await artifacts.delete("runs/run/versions/000000.safetensors")


async def rows(config: ServerConfig) -> dict[str, list[dict[str, Any]]]:
    """All rows by table."""

    async def work(connection: Any) -> dict[str, list[dict[str, Any]]]:
        tables = [table for table in METADATA.sorted_tables if table is not LEASES]
        found = {}
        for table in tables:
            query = sa.select(table).order_by(*table.primary_key)
            found[table.name] = [row._asdict() for row in await connection.execute(query)]
        return found

    database = await Database.open(config.database_url, Troubles())
    try:
        return await database.read(work)
    finally:
        await database.close()


async def files(config: ServerConfig) -> dict[str, bytes]:
    """All that is in the store."""
    artifacts = await open_artifacts(config.artifacts, config.state)
    return {key: await artifacts.get(key) for key in await artifacts.list("runs/")}


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


NewDatabase = Callable[[str], str | None]


@pytest.fixture
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """By kind, a database in which there is nothing yet; SQLite's is in the state folder."""

    def make(kind: str) -> str | None:
        if kind == "sqlite":
            return None
        server: Postgres = request.getfixturevalue("postgres")
        return server.new_database()

    return make


@pytest.fixture
def here(tmp_path: Path) -> ServerConfig:
    return configured(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> ServerConfig:
    return configured(tmp_path / "there")


@pytest.fixture
async def taken(here: ServerConfig, tmp_path: Path) -> Path:
    """A backup."""
    await fill(here)
    await back_up(here, tmp_path / "taken.tar", NOON)
    return tmp_path / "taken.tar"


# There and back


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
@pytest.mark.parametrize("source", ["sqlite", "postgresql"])
async def test_all_comes_back(source: str, target: str, new_database: NewDatabase, tmp_path: Path) -> None:
    before = configured(tmp_path / "before", new_database(source))
    after = configured(tmp_path / "after", new_database(target))
    await fill(before)
    file = tmp_path / "backup.tar"

    told = await back_up(before, file, NOON)
    assert told == Summary(file, NOON, 3, 5, file.stat().st_size)
    restored = await restore(after, file, LATER)
    assert (restored.runs, restored.versions, restored.taken_at) == (3, 5, NOON)
    assert restored.size_bytes == sum(map(len, (await files(before)).values()))
    assert restored.notes == (
        "run run: round 4 was under way and is abandoned",
        "run run-2: round 0 was under way and is abandoned",
    )

    assert await files(after) == await files(before)
    was, now = await rows(before), await rows(after)
    assert now["clients"] == was["clients"]
    assert repr(now["versions"]) == repr(was["versions"]).replace(str(before.state), str(after.state))  # NaN is not itself
    nonces = [row["nonce"] for row in now["runs"]]
    assert not set(nonces) & {row["nonce"] for row in was["runs"]}  # what clients may still have belongs to another run
    fresh = [row | {"nonce": nonce} for row, nonce in zip(was["runs"], nonces, strict=True)]
    assert now["runs"] == [fresh[0] | {"state": "waiting"}, *fresh[1:]]

    for found, expected in zip(now["rounds"], was["rounds"], strict=True):
        ended = expected["state"] == "done"
        assert found == expected | ({} if ended else {"state": "abandoned", "reason": "restored from a backup"})
    parts = {row["assignment"]: row for row in now["assignments"]}
    earlier = {row["assignment"]: row for row in was["assignments"]}
    why = "round 4 was given up: restored from a backup"
    assert parts["run/3/bob"] == earlier["run/3/bob"]
    assert repr(parts["run/4/alice"]) == repr(earlier["run/4/alice"])
    assert parts["run/4/bob"] == earlier["run/4/bob"] | {"state": "cancelled", "reason": why}

    assert now["events"][:5] == was["events"]
    told_of = [(event["what"], event["told"], event["run"], event["round"], event["at"]) for event in now["events"][5:]]
    assert told_of == [
        *[("run restored", "from the backup of 2025-06-01 12:00:00 UTC", name, None, LATER) for name in ("run", "run-2", "run-3")],
        ("round abandoned", "restored from a backup", "run", 4, LATER),
        ("round abandoned", "restored from a backup", "run-2", 0, LATER),
    ]
    names = {path.name: path.readlink().name for path in (after.state / "runs/run/versions").iterdir() if path.is_symlink()}
    assert names == {"latest.safetensors": "000003.safetensors", "best.safetensors": "000001.safetensors"}


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
async def test_a_coordinator_goes_on_with_what_was_restored(
    target: str, taken: Path, new_database: NewDatabase, tmp_path: Path
) -> None:
    config = configured(tmp_path / "after", new_database(target))
    await restore(config, taken, LATER)
    async with opened(config) as (store, _):  # nobody has the lease any more
        assert list(store.runs) == ["run", "run-2", "run-3"]
        assert store.runs["run"].progress == RUN.progress
        assert await store.unfinished("run") is None
        await store.commit(EventRecord(LATER, "afterwards"))
        newest = (await store.events(1))[0]
        assert newest.what == "afterwards"
        checkpoints = Checkpoints(FolderArtifacts(config.state), config.state, "run")
        latest = await store.version("run", 3)
        assert latest is not None
        assert (await checkpoints.fetch(3, latest.version)).read_bytes() == weights("run", 3)
        state = await checkpoints.state(3)
        assert state is not None
        assert state.read_bytes() == momentum("run", 3)
    sequences = [row["sequence"] for row in (await rows(config))["events"]]
    assert sequences == sorted(set(sequences))
    assert len(sequences) == 11


async def test_a_backup_of_what_was_restored_is_as_good(taken: Path, there: ServerConfig, tmp_path: Path) -> None:
    await restore(there, taken, LATER)
    again, third = tmp_path / "again.tar", configured(tmp_path / "third")
    await back_up(there, again, LATER)
    restored = await restore(third, again, LATER + timedelta(hours=1))
    assert restored.notes == ()
    assert await files(third) == await files(there)
    numbers = [row["next_round"] for row in (await rows(third))["runs"]]
    assert numbers == [row["next_round"] for row in (await rows(there))["runs"]]


async def test_more_rows_than_are_read_at_a_time(
    here: ServerConfig, there: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(here)
    for module in (taking, reading):
        monkeypatch.setattr(module, "ROWS_AT_A_TIME", 2)
    await back_up(here, tmp_path / "backup.tar", NOON)
    await restore(there, tmp_path / "backup.tar", LATER)
    assert (await rows(there))["events"][:5] == (await rows(here))["events"]


async def test_from_an_object_store_to_a_folder_and_back(bucket_url: str, here: ServerConfig, tmp_path: Path) -> None:
    remote = configured(tmp_path / "remote", artifacts=bucket_url)
    await fill(remote)
    await back_up(remote, tmp_path / "one.tar", NOON)
    await restore(here, tmp_path / "one.tar", LATER)
    assert await files(here) == await files(remote)
    await back_up(here, tmp_path / "two.tar", LATER)

    back = configured(tmp_path / "back", artifacts=bucket_url.replace("some/prefix", "another"))
    await restore(back, tmp_path / "two.tar", LATER)
    assert await files(back) == await files(remote)
    places = {row["checkpoint"] for row in (await rows(back))["versions"] if row["run"] == "run"}
    bucket = bucket_url.partition("/some/")[0]
    assert places == {f"{bucket}/another/runs/run/versions/{number:06d}.safetensors" for number in range(4)}
    latest = back.state / "runs/run/versions/latest.safetensors"  # the copy that is served
    assert latest.read_bytes() == weights("run", 3)


# The file


async def test_only_the_owner_can_read_the_file_and_it_has_no_password(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.new_database().replace("choral@", "choral:hush@")
    config = configured(tmp_path / "state", url)
    await fill(config)
    (tmp_path / "state" / "server.key").write_text("very secret")
    file = tmp_path / "backup.tar"
    mask = os.umask(0)
    try:
        await back_up(config, file, NOON)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert b"hush" not in file.read_bytes()
    with tarfile.open(file) as tar:
        names = tar.getnames()
        about = json.load(tar.extractfile("backup.json"))  # type: ignore[arg-type]
    assert about.items() >= {"format": 1, "schema": known_schemas()[0], "taken_at": NOON.isoformat()}.items()
    assert about["database"] == url.replace("hush", "***")
    assert names[0] == "backup.json"
    assert names[-1] == "contents.json"
    assert {name.partition("/")[0] for name in names} == {"backup.json", "runs", "tables", "history.key", "contents.json"}
    assert "tables/leases.jsonl" not in names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "state"]


async def test_what_is_backed_up_is_of_one_moment(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds done, events and versions grow together while backups are taken."""
    config = configured(tmp_path / "state", database_url)
    monkeypatch.setattr(taking, "ROWS_AT_A_TIME", 3)
    taken: list[Path] = []
    async with opened(config) as (store, _):
        run = replace(FRESH, name="run")
        await store.commit(run, await version(config, "run", 0))

        async def work() -> None:
            for number in range(1, 10_000):
                published = await version(config, "run", number)
                event = EventRecord(NOON, "round done", round=number)
                await store.commit(replace(run, rounds_done=number, latest=number), published, event)

        working = asyncio.create_task(work())
        for number in range(5):
            taken.append(tmp_path / f"{number}.tar")
            told = await back_up(config, taken[-1], NOON)
            assert told.notes == ()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
    done = []
    for file in taken:
        content = unpacked(file)
        (kept,) = map(json.loads, content["tables/runs.jsonl"].splitlines())
        done.append(kept["rounds_done"])
        assert len(content["tables/events.jsonl"].splitlines()) == done[-1]
        assert len(content["tables/versions.jsonl"].splitlines()) == done[-1] + 1
        assert sum(name.endswith(".safetensors") and "optimizer" not in name for name in content) == done[-1] + 1
    assert done == sorted(done)
    assert done[-1] > 0


async def test_a_version_that_is_pruned_meanwhile_is_left_out(here: ServerConfig, there: ServerConfig, tmp_path: Path) -> None:
    await fill(here)
    folder = here.state / "runs/run/versions"

    def prune(done: int, total: int) -> None:
        for path in folder.glob("000002*"):
            path.unlink()

    told = await back_up(here, tmp_path / "backup.tar", NOON, prune)
    assert told.notes == ("run run: version 2 was pruned meanwhile and is left out",)
    assert told.versions == 4
    await restore(there, tmp_path / "backup.tar", LATER)
    assert sorted(path.name for path in (there.state / "runs/run/versions").glob("0*")) == [
        "000001.safetensors",
        "000003.optimizer.safetensors",
        "000003.safetensors",
    ]
    assert [row["number"] for row in (await rows(there))["versions"] if row["run"] == "run"] == [0, 1, 2, 3]


async def test_a_damaged_version_that_is_not_needed_is_left_out(here: ServerConfig, there: ServerConfig, tmp_path: Path) -> None:
    await fill(here)
    (here.state / "runs/run/versions/000002.safetensors").write_bytes(b"half")
    told = await back_up(here, tmp_path / "backup.tar", NOON)
    assert told.notes == ("run run: version 2 is damaged and is left out",)
    await restore(there, tmp_path / "backup.tar", LATER)
    assert not list((there.state / "runs/run/versions").glob("000002*"))


class _Hurried(FolderArtifacts):
    """Just before the store is looked at, the coordinator publishes another version and prunes the one that was the newest."""

    def __init__(self, config: ServerConfig, store: Store, times: int) -> None:
        super().__init__(config.state)
        self._config = config
        self._kept = store
        self._times = times

    async def list(self, prefix: str) -> list[str]:
        found = await super().list(prefix)
        if prefix == "runs/run/versions/" and self._times > 0:
            self._times -= 1
            run = self._kept.runs["run"]
            await self._kept.commit(replace(run, latest=run.latest + 1), await version(self._config, "run", run.latest + 1))
            for path in (self._config.state / prefix).glob(f"{run.latest:06d}*"):
                path.unlink()
        return found


@pytest.mark.parametrize("times", [1, 99])
async def test_a_coordinator_that_prunes_faster_than_is_copied(
    times: int, here: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(here)
    async with opened(here) as (store, _):
        hurried = _Hurried(here, store, times)

        async def theirs(url: str | None, folder: Path) -> Artifacts:
            return hurried

        monkeypatch.setattr(taking, "open_artifacts", theirs)
        file = tmp_path / "backup.tar"
        if times == 1:
            await back_up(here, file, NOON)
            assert unpacked(file)["runs/run/versions/000004.safetensors"] == weights("run", 4)
        else:
            with pytest.raises(
                ConfigError, match=r"keep_versions: versions are pruned faster .*keep more of them, or pause the run"
            ):
                await back_up(here, file, NOON)
            assert list(tmp_path.iterdir()) == [here.state]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("how", ["is missing", "is damaged"])
async def test_without_the_newest_or_best_there_is_no_backup(how: str, number: int, here: ServerConfig, tmp_path: Path) -> None:
    await fill(here)
    file, path = tmp_path / "backup.tar", here.state / f"runs/run/versions/{number:06d}.safetensors"
    file.write_text("an earlier one")
    path.unlink()
    if how == "is damaged":
        path.write_bytes(weights("run", number)[:-1] + b"x")
    with pytest.raises(ConfigError) as caught:
        await back_up(here, file, NOON)
    assert str(caught.value) == f"run run: version {number} {how} ({path}): restore it from an earlier backup"
    assert file.read_text() == "an earlier one"
    assert sorted(tmp_path.iterdir()) == [file, here.state]


# What cannot be backed up


async def test_no_database(here: ServerConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"choral.db does not exist: give the configuration of a coordinator that has run"):
        await back_up(here, tmp_path / "backup.tar", NOON)
    assert list(tmp_path.iterdir()) == []


async def test_a_database_in_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the memory of the coordinator"):
        await back_up(configured(tmp_path, "sqlite://"), tmp_path / "backup.tar", NOON)
    with pytest.raises(ConfigError, match="in the memory of the coordinator"):
        await restore(configured(tmp_path, "sqlite://"), tmp_path / "backup.tar", NOON)
    assert list(tmp_path.iterdir()) == []


async def test_nothing_to_back_up(database_url: str, tmp_path: Path) -> None:
    config, file = configured(tmp_path / "state", database_url), tmp_path / "backup.tar"
    if (path := database_url.removeprefix("sqlite:///")) != database_url:
        Path(path).touch()
    with pytest.raises(ConfigError, match="holds nothing of Choral's"):
        await back_up(config, file, NOON)
    async with opened(config):
        pass
    with pytest.raises(ConfigError, match="holds no run"):
        await back_up(config, file, NOON)
    assert not file.exists()


async def test_a_database_of_an_older_release(here: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(here)
    present = known_schemas()[0]
    monkeypatch.setattr(taking, "known_schemas", lambda: ["0099", present])
    with pytest.raises(ConfigError, match=rf"was made by an older release \(its schema is {present}, this one's 0099\)"):
        await back_up(here, tmp_path / "backup.tar", NOON)
    assert list(tmp_path.iterdir()) == [here.state]


async def test_a_place_that_cannot_be_written(here: ServerConfig, tmp_path: Path) -> None:
    await fill(here)
    with pytest.raises(ConfigError, match="is a folder: give the name of a file"):
        await back_up(here, tmp_path, NOON)
    with pytest.raises(ConfigError, match="nowhere does not exist: make that folder"):
        await back_up(here, tmp_path / "nowhere" / "backup.tar", NOON)
    with pytest.raises(OutOfSpace, match=r"cannot be written \(File name too long\)"):
        await back_up(here, tmp_path / ("x" * 250), NOON)
    assert list(tmp_path.iterdir()) == [here.state]


# What cannot be restored


def unpacked(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def packed(file: Path, content: dict[str, bytes]) -> Path:
    """A backup with this content, whose digests are right."""
    contents = {"files": {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}}
    with tarfile.open(file, "w") as tar:
        for name, data in {**content, "contents.json": json.dumps(contents).encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def changed(content: dict[str, bytes], file: str, /, **fields: object) -> dict[str, bytes]:
    """The first row, or the only value, in a file with other fields."""
    first, *others = content[file].split(b"\n") if file.endswith("jsonl") else [content[file]]
    return {**content, file: b"\n".join([json.dumps(json.loads(first) | fields).encode(), *others])}


def escaping(content: dict[str, bytes]) -> dict[str, bytes]:
    """With a version of a run that is none, whose file would come to lie outside the state folder."""
    rows = [json.loads(line) for line in content["tables/versions.jsonl"].splitlines()]
    kept = {hashlib.sha256(file).hexdigest(): file for file in content.values()}
    row = next(row for row in rows if row["digest"] in kept)
    weights = kept[row["digest"]]
    strange = json.dumps(row | {"run": "../../etc"}).encode() + b"\n"
    name = f"runs/../../etc/versions/{row['number']:06d}.safetensors"
    return {**content, name: weights, "tables/versions.jsonl": content["tables/versions.jsonl"] + strange}


TAMPERED: list[tuple[str, Callable[[dict[str, bytes]], dict[str, bytes]]]] = [
    (
        r"in format 2, and this release \(.*\) reads up to 1: restore it with that release",
        lambda c: changed(c, "backup.json", format=2),
    ),
    (r"with schema 9999, which this release .* does not know", lambda c: changed(c, "backup.json", schema="9999")),
    (r"is damaged \(it has no release", lambda c: {**c, "backup.json": b"{}"}),
    (r"is damaged", lambda c: {**c, "backup.json": b"[]"}),
    (r"is no backup: give a file that `choral backup` wrote", lambda c: without(c, "backup.json")),
    (r"is damaged \(it has no tables/events.jsonl", lambda c: without(c, "tables/events.jsonl")),
    (r"is damaged \(version 3 of run run is not in it", lambda c: without(c, "runs/run/versions/000003.safetensors")),
    (r"is damaged \(version 1 of run run is not in it", lambda c: without(c, "runs/run/versions/000001.safetensors")),
    (r"is damaged \(.*000003.safetensors is another", lambda c: {**c, "runs/run/versions/000003.safetensors": b"other"}),
    (r"is damaged \('../../etc' is no name of a run", lambda c: changed(c, "tables/runs.jsonl", name="../../etc")),
    (r"is damaged \(a row of clients has other columns", lambda c: changed(c, "tables/clients.jsonl", more=1)),
    (r"is damaged \(it holds a version of '../../etc', and no such run", lambda c: escaping(c)),
    (r"is damaged \(it holds no run", lambda c: {**c, "tables/runs.jsonl": b""}),
    (r"is damaged", lambda c: changed(c, "tables/runs.jsonl", started_at="yesterday")),
]


@pytest.mark.parametrize(("told", "change"), TAMPERED)
async def test_a_file_that_is_not_right(
    told: str, change: Callable[[dict[str, bytes]], dict[str, bytes]], taken: Path, there: ServerConfig
) -> None:
    content = unpacked(taken)
    del content["contents.json"]
    packed(taken, change(content))
    with pytest.raises(ConfigError, match=told):
        await restore(there, taken, LATER)
    assert not there.state.exists()


async def test_a_file_of_an_older_release(taken: Path, there: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "known_schemas", lambda: ["0099", *known_schemas()])
    with pytest.raises(ConfigError, match=r"has 0099: restore it with that release, then let this one's coordinator"):
        await restore(there, taken, LATER)
    assert not there.state.exists()


@pytest.mark.parametrize("content", [b"", b"choral", b"\0" * 20_480])
async def test_a_file_that_is_no_backup(content: bytes, there: ServerConfig, tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="is no backup: give a file that `choral backup` wrote"):
        await restore(there, file, LATER)
    assert not there.state.exists()


async def test_a_file_that_is_not_there(there: ServerConfig, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.tar", tmp_path):
        with pytest.raises(ConfigError, match=rf"{path} cannot be read"):
            await restore(there, path, LATER)
    assert not there.state.exists()


async def test_a_file_that_was_cut_off(taken: Path, there: ServerConfig) -> None:
    """Wherever that is; what is lost of the padding at the end is no loss."""
    whole = taken.read_bytes()
    with tarfile.open(taken) as tar:
        last = tar.getmembers()[-1]
    needed = last.offset_data + last.size
    for length in (1, 511, 512, 1000, needed // 3, needed // 2, last.offset, last.offset_data, needed - 1):
        taken.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"is damaged|is no backup"):
            await restore(there, taken, LATER)
        assert not there.state.exists()


async def test_a_file_with_another_byte_in_it(taken: Path, there: ServerConfig) -> None:
    """In every file of it."""
    whole = taken.read_bytes()
    with tarfile.open(taken) as tar:
        members = [member for member in tar if member.name != "contents.json"]
    for member in members:
        at = member.offset_data + member.size // 2
        taken.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=r"is damaged|does not know|in format"):
            await restore(there, taken, LATER)
        assert not there.state.exists()


async def test_a_database_that_is_not_empty(taken: Path, database_url: str, tmp_path: Path) -> None:
    config = configured(tmp_path / "used", database_url)
    async with opened(config) as (store, _):
        await store.commit(RunRecord("mine", "small", "1", 1, NOON), await version(config, "mine", 0))
    before = await rows(config), await files(config)
    with pytest.raises(
        ConfigError, match=r"is not empty \(it holds 1 runs\), and a backup overwrites nothing: give a new database"
    ):
        await restore(config, taken, LATER)
    assert (await rows(config), await files(config)) == before


async def test_a_restoration_is_done_once(taken: Path, there: ServerConfig) -> None:
    await restore(there, taken, LATER)
    before = await rows(there)
    with pytest.raises(ConfigError, match="is not empty"):
        await restore(there, taken, LATER)
    assert repr(await rows(there)) == repr(before)


async def test_a_state_folder_in_use(taken: Path, there: ServerConfig) -> None:
    there.state.mkdir()
    with (there.state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=f"state: {there.state} is in use by a coordinator: stop it, or give another folder"):
            await restore(there, taken, LATER)
    assert [path.name for path in there.state.iterdir()] == ["lock"]
    await restore(there, taken, LATER)  # which lets go of it too
    await back_up(there, taken, LATER)


async def test_a_database_in_use(taken: Path, database_url: str, tmp_path: Path) -> None:
    """By a coordinator that has another state folder and has not begun a run yet."""
    config = configured(tmp_path / "state", database_url)
    async with opened(config):
        with pytest.raises(ConfigError, match="is in use by coordinator coordinator, whose lease lasts another"):
            await restore(config, taken, LATER)
    assert not any((await rows(config)).values())
    assert await files(config) == {}


async def test_another_file_in_the_place_of_a_version(taken: Path, there: ServerConfig) -> None:
    path = there.state / "runs/run/versions/000003.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=rf"{path} is there already and another than in the backup: move it away"):
        await restore(there, taken, LATER)
    assert await files(there) == {"runs/run/versions/000003.safetensors": b"mine"}
    assert not any((await rows(there)).values())
    path.unlink()
    path.with_name("000001.optimizer.safetensors").write_bytes(b"state of nothing")  # the backup's version has none
    with pytest.raises(ConfigError, match=r"000001.optimizer.safetensors is there already"):
        await restore(there, taken, LATER)


async def test_versions_newer_than_the_backup_are_not_written_over(taken: Path, there: ServerConfig) -> None:
    newer = there.state / "runs/run/versions/000004.safetensors"
    newer.parent.mkdir(parents=True)
    newer.write_bytes(b"trained since")
    with pytest.raises(ConfigError, match=rf"{newer} is newer than the backup, in which the newest version of run run is 3: move"):
        await restore(there, taken, LATER)
    assert await files(there) == {"runs/run/versions/000004.safetensors": b"trained since"}
    assert not any((await rows(there)).values())


async def test_the_same_files_in_the_place_of_the_versions(taken: Path, here: ServerConfig, there: ServerConfig) -> None:
    """The database alone was lost."""
    shutil.copytree(here.state / "runs", there.state / "runs", symlinks=True)
    await restore(there, taken, LATER)
    assert await files(there) == await files(here)


# Interrupted


class _Failing(FolderArtifacts):
    """A store that takes some files and then no more."""

    def __init__(self, folder: Path, puts: int) -> None:
        super().__init__(folder)
        self._puts = puts

    async def put(self, key: str, content: bytes) -> None:
        if self._puts == 0:
            raise ArtifactsGone("the store is gone")
        self._puts -= 1
        await super().put(key, content)


@pytest.mark.parametrize("puts", range(7))
async def test_interrupted_while_versions_are_written(
    puts: int, taken: Path, here: ServerConfig, there: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(url: str | None, folder: Path) -> Artifacts:
        return _Failing(folder, puts)

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "open_artifacts", failing)
        with pytest.raises(ArtifactsGone):
            await restore(there, taken, LATER)
    assert len(await files(there)) == puts
    assert not any((await rows(there)).values())
    await restore(there, taken, LATER)
    assert await files(there) == await files(here)


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
async def test_interrupted_while_rows_are_written(
    target: str, taken: Path, new_database: NewDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path / "after", new_database(target))

    def dies(*arguments: object) -> Iterator[Any]:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "consequences", dies)
        with pytest.raises(RuntimeError, match="interrupted"):
            await restore(config, taken, LATER)
    assert not any((await rows(config)).values())
    assert not (config.state / "runs/run/versions/latest.safetensors").is_symlink()
    await restore(config, taken, LATER)
    assert len((await rows(config))["runs"]) == 3


async def test_a_commit_whose_answer_is_lost(taken: Path, there: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the transaction is done again, and finds that it was done."""
    write = Database.write

    async def twice(self: Database, work: Any, *then: Any) -> Any:
        await write(self, work, *then)
        return await write(self, work, *then)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", twice)
        restored = await restore(there, taken, LATER)
    assert len(restored.notes) == 2
    content = await rows(there)
    assert (len(content["runs"]), len(content["events"])) == (3, 10)


async def test_progress_goes_up_to_all_of_it(taken: Path, here: ServerConfig, there: ServerConfig, tmp_path: Path) -> None:
    for doing in (
        lambda told: back_up(here, tmp_path / "more.tar", NOON, lambda *at: told.append(at)),
        lambda told: restore(there, taken, LATER, lambda *at: told.append(at)),
    ):
        told: list[tuple[int, int]] = []
        await doing(told)
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1] > 0
