"""The versions of a run, in a folder and in an object store with copies on the local disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from choral.errors import ArtifactsGone, ConfigError
from choral.messages import VersionRef
from choral_server.artifacts import Artifacts, FolderArtifacts, open_artifacts
from choral_server.checkpoints import BEST, LATEST, Checkpoints
from safetensors.torch import load_file, save
from server.home import write_version
from server.object_store import ObjectStore

Make = Callable[..., Checkpoints]


def _content(value: float) -> bytes:
    return save({"0.weight": torch.full((2, 3), value), "steps": torch.tensor(7)}, {"version": "1"})


def _kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def _state(checkpoints: Checkpoints, number: int) -> bytes | None:
    path = await checkpoints.state(number)
    return path.read_bytes() if path is not None else None


def _named(checkpoints: Checkpoints, name: str) -> Path:
    return checkpoints.path(0).with_name(f"{name}.safetensors")


@pytest.fixture(params=["folder", "s3"])
async def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    url = request.getfixturevalue("bucket_url") if request.param == "s3" else None
    return await open_artifacts(url, tmp_path)


@pytest.fixture
def make(artifacts: Artifacts, tmp_path: Path) -> Make:
    """The versions of a run, as a process that starts finds them."""
    return lambda keep=None, run="run": Checkpoints(artifacts, tmp_path, run, keep)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the versions are on the local disk."""
    return tmp_path / "runs/run/versions"


async def test_a_version_opens_without_choral(make: Make, folder: Path) -> None:
    checkpoints = make()
    await write_version(checkpoints, 3, _content(1.5))
    checkpoints.point(LATEST, 3)
    for path in (folder / "000003.safetensors", folder / "latest.safetensors"):
        state = load_file(path)
        assert torch.equal(state["0.weight"], torch.full((2, 3), 1.5))
        assert torch.equal(state["steps"], torch.tensor(7))


@pytest.mark.parametrize("size", [0, 100, 300_000], ids=["none", "little", "much"])  # the last in a thread
async def test_a_reference_is_number_digest_and_size(make: Make, artifacts: Artifacts, size: int) -> None:
    checkpoints, content = make(), bytes(size)
    reference = await write_version(checkpoints, 12, content)
    assert reference == VersionRef(12, hashlib.sha256(content).digest(), size)
    assert (await checkpoints.fetch(12, reference)).read_bytes() == content
    assert await artifacts.get("runs/run/versions/000012.safetensors") == content
    assert checkpoints.location(12) == artifacts.location("runs/run/versions/000012.safetensors")


async def test_runs_do_not_mix(make: Make) -> None:
    await write_version(make(run="run"), 1, b"one", b"its state")
    await write_version(make(run="run-2"), 1, b"two")
    await make(run="run-2", keep=1).prune({2}, 2)
    assert (await make().fetch(1)).read_bytes() == b"one"
    assert await _state(make(), 1) == b"its state"


async def test_names_move_and_stay_valid_when_the_folder_moves(make: Make, tmp_path: Path) -> None:
    checkpoints = make()
    for number in (0, 1):
        await write_version(checkpoints, number, _content(number))
        checkpoints.point(LATEST, number)
    checkpoints.point(BEST, 0)
    assert _named(checkpoints, LATEST).resolve() == checkpoints.path(1).resolve()
    assert _named(checkpoints, BEST).resolve() == checkpoints.path(0).resolve()
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert load_file(tmp_path / "moved/run/versions/latest.safetensors")["0.weight"][0, 0] == 1.0


async def test_a_name_that_cannot_move_is_no_reason_to_stop(make: Make, folder: Path) -> None:
    checkpoints = make()
    await write_version(checkpoints, 0, b"x")
    (folder / "latest.safetensors").mkdir()
    checkpoints.point(LATEST, 0)
    checkpoints.point(BEST, 0)
    assert (folder / "best.safetensors").read_bytes() == b"x"


async def test_nothing_is_left_aside(make: Make, folder: Path) -> None:
    checkpoints = make()
    for number in (0, 0, 1):
        await write_version(checkpoints, number, _content(number))
        checkpoints.point(LATEST, number)
    assert _kept(folder) == ["000000.safetensors", "000001.safetensors", "latest.safetensors"]


async def test_what_a_killed_process_left_aside_goes(make: Make, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / ".000001.safetensors.aside").write_bytes(b"half a ver")
    (folder / ".latest.aside").symlink_to("000000.safetensors")
    make()
    assert _kept(folder) == []


# What comes back


async def test_the_local_copy_serves_and_can_be_lost(bucket_url: str, tmp_path: Path, folder: Path) -> None:
    artifacts = await open_artifacts(bucket_url, tmp_path)
    checkpoints, key, copy = (
        Checkpoints(artifacts, tmp_path, "run"),
        "runs/run/versions/000001.safetensors",
        folder / "000001.safetensors",
    )
    reference = await write_version(checkpoints, 1, b"a version")
    await artifacts.put(key, b"not looked at")
    for expected in (None, reference):
        assert (await checkpoints.fetch(1, expected)).read_bytes() == b"a version"
    await artifacts.put(key, b"a version")
    for expected in (None, reference):
        copy.unlink()
        folder.rmdir()
        assert await checkpoints.fetch(1, expected) == copy
        assert copy.read_bytes() == b"a version"
    copy.write_bytes(b"A version")  # damaged, and as long
    assert (await checkpoints.fetch(1, reference)).read_bytes() == b"a version"


async def test_a_damaged_version_is_refused_and_named(make: Make, artifacts: Artifacts, folder: Path) -> None:
    checkpoints = make()
    reference = await write_version(checkpoints, 1, b"a version")
    for damaged in (b"A version", b"a versio", b""):
        await artifacts.put("runs/run/versions/000001.safetensors", damaged)
        (folder / "000001.safetensors").write_bytes(damaged)  # the same file, or the copy
        with pytest.raises(ConfigError) as refused:
            await checkpoints.fetch(1, reference)
        assert str(refused.value) == f"version 1 is damaged ({checkpoints.location(1)}): restore it from a backup"


async def test_a_version_that_is_not_there_is_named(make: Make) -> None:
    checkpoints = make()
    await write_version(checkpoints, 1, b"a version")
    with pytest.raises(ConfigError) as refused:
        await checkpoints.fetch(2)
    assert str(refused.value) == (
        f"version 2 is missing ({checkpoints.location(2)} does not exist): restore a backup, or give another run.name"
    )


async def test_the_optimizers_state_stands_beside_its_version(make: Make, artifacts: Artifacts) -> None:
    checkpoints = make()
    await write_version(checkpoints, 1, b"weights", b"velocity")
    await write_version(checkpoints, 2, b"weights")
    assert await _state(make(), 1) == b"velocity"
    assert await _state(make(), 2) is None
    assert await _state(make(), 3) is None
    assert await artifacts.list("runs/") == [
        "runs/run/versions/000001.optimizer.safetensors",
        "runs/run/versions/000001.safetensors",
        "runs/run/versions/000002.safetensors",
    ]


async def test_a_version_written_again_has_no_state_of_the_first_attempt(make: Make) -> None:
    """As when a process is killed before it publishes, and the next one has another strategy."""
    await write_version(make(), 1, b"weights", b"velocity")
    await write_version(make(), 1, b"weights")
    assert await _state(make(), 1) is None
    assert make().here(1)[1] is None


# What is kept


@pytest.mark.parametrize(
    ("keep", "wanted", "left"),
    [
        (None, set(), [0, 1, 2, 3, 4]),
        (1, {4}, [4]),
        (2, {4}, [3, 4]),
        (2, {1, 4}, [1, 3, 4]),  # the best is kept, however old
        (1, {0, 4}, [0, 4]),
        (10**12, {4}, [0, 1, 2, 3, 4]),
    ],
)
async def test_pruning_keeps_the_newest_and_what_is_wanted(
    make: Make, artifacts: Artifacts, folder: Path, keep: int | None, wanted: set[int], left: list[int]
) -> None:
    checkpoints = make(keep)
    for number in range(5):
        await write_version(checkpoints, number, b"weights", b"state" if number % 2 else None)
    checkpoints.point(LATEST, 4)
    await checkpoints.prune(wanted, 4)
    weights = [f"{number:06d}.safetensors" for number in left]
    states = [f"{number:06d}.optimizer.safetensors" for number in left if number % 2]
    assert await artifacts.list("runs/run/versions/") == sorted(f"runs/run/versions/{name}" for name in weights + states)
    assert _kept(folder) == sorted([*weights, *states, "latest.safetensors"])


async def test_pruning_takes_nothing_beyond_the_latest(make: Make) -> None:
    """What a crash left there is written anew; and were the database older than the versions, they would all be there."""
    checkpoints = make(2)
    for number in range(1, 6):
        await write_version(checkpoints, number, b"x", b"y")
    await checkpoints.prune({3}, 3)
    assert await checkpoints.numbers() == [2, 3, 4, 5]


async def test_copies_of_versions_that_are_gone_from_the_store_go_too(make: Make, artifacts: Artifacts, folder: Path) -> None:
    """As when the process is killed between the two, or the store has a rule of its own for old objects."""
    checkpoints = make(1)
    for number in (0, 1):
        await write_version(checkpoints, number, b"x")
    await artifacts.delete("runs/run/versions/000000.safetensors")
    await checkpoints.prune({1}, 1)
    assert _kept(folder) == ["000001.safetensors"]


async def test_pruning_goes_on_beyond_six_digits(make: Make, folder: Path) -> None:
    checkpoints = make(1)
    for number in (999_999, 1_000_000):
        await write_version(checkpoints, number, b"x")
    await checkpoints.prune({1_000_000}, 1_000_000)
    assert _kept(folder) == ["1000000.safetensors"]


async def test_what_is_not_ours_stays(make: Make, artifacts: Artifacts, folder: Path) -> None:
    checkpoints = make(1)
    await write_version(checkpoints, 1, b"x")
    await artifacts.put("runs/run/versions/notes.txt", b"not ours")
    (folder / "mine.txt").write_bytes(b"nor this")
    await checkpoints.prune({2}, 2)
    assert await artifacts.get("runs/run/versions/notes.txt") == b"not ours"
    assert (folder / "mine.txt").exists()


# What breaks


class Breaking(FolderArtifacts):
    """A store that is gone after one change."""

    changes = 0

    async def put_file(self, key: str, path: Path) -> None:
        self._change()
        await super().put_file(key, path)

    async def delete(self, key: str) -> None:
        self._change()
        await super().delete(key)

    def _change(self) -> None:
        if self.changes:
            raise ArtifactsGone("gone")
        self.changes += 1


async def test_a_version_that_is_half_written_is_not_there(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ArtifactsGone):
        await write_version(Checkpoints(Breaking(tmp_path), tmp_path, "run"), 1, b"weights", b"state")
    assert [name for name in _kept(folder) if not name.endswith(".aside")] == ["000001.optimizer.safetensors"]


async def test_a_version_that_is_half_deleted_is_not_there(tmp_path: Path, folder: Path) -> None:
    whole = Checkpoints(FolderArtifacts(tmp_path), tmp_path, "run", keep=1)
    for number in (0, 1):
        await write_version(whole, number, b"weights", b"state")
    with pytest.raises(ArtifactsGone):
        await Checkpoints(Breaking(tmp_path), tmp_path, "run", keep=1).prune({1}, 1)
    assert _kept(folder) == ["000000.optimizer.safetensors", "000001.optimizer.safetensors", "000001.safetensors"]
    await whole.prune({1}, 1)
    assert _kept(folder) == ["000001.optimizer.safetensors", "000001.safetensors"]


async def test_a_store_that_is_gone_says_so_and_what_is_here_is_here(
    object_store: ObjectStore, bucket_url: str, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(await open_artifacts(bucket_url, tmp_path), tmp_path, "run", keep=1)
    reference = await write_version(checkpoints, 1, b"weights", b"state")
    object_store.stop()
    try:
        for work in (write_version(checkpoints, 2, b"x"), checkpoints.fetch(2), checkpoints.state(1), checkpoints.prune({1}, 1)):
            with pytest.raises(ArtifactsGone):
                await work
        assert (await checkpoints.fetch(1, reference)).read_bytes() == b"weights"
    finally:
        object_store.start()


async def test_a_local_disk_that_takes_no_copy_is_like_a_store_that_is_gone(bucket_url: str, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    checkpoints = Checkpoints(await open_artifacts(bucket_url, tmp_path), tmp_path, "run")
    with pytest.raises(ArtifactsGone, match=r"000001.safetensors cannot be written \(.*\)"):
        await write_version(checkpoints, 1, b"weights")
    (tmp_path / "runs").unlink()
    await write_version(checkpoints, 1, b"weights")
    assert checkpoints.path(1).read_bytes() == b"weights"
