from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from choral_server.checkpoints import BEST, LATEST, Checkpoints
from safetensors.torch import load_file, save


def _content(value: float) -> bytes:
    return save({"0.weight": torch.full((2, 3), value), "steps": torch.tensor(7)}, {"version": "1"})


def _kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_version_opens_without_choral(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "versions")
    checkpoints.write(3, _content(1.5))
    checkpoints.point(LATEST, 3)
    for path in (tmp_path / "run/versions/000003.safetensors", tmp_path / "run/versions/latest.safetensors"):
        state = load_file(path)
        assert torch.equal(state["0.weight"], torch.full((2, 3), 1.5))
        assert torch.equal(state["steps"], torch.tensor(7))


def test_a_reference_is_number_digest_and_size(tmp_path: Path) -> None:
    checkpoints, content = Checkpoints(tmp_path), _content(1.0)
    reference = checkpoints.write(12, content)
    assert (reference.number, reference.digest, reference.size_bytes) == (12, hashlib.sha256(content).digest(), len(content))
    assert checkpoints.reference(12) == reference
    assert Checkpoints(tmp_path).reference(12) == reference
    assert checkpoints.path(12).read_bytes() == content


def test_names_move_and_stay_valid_when_the_folder_moves(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "before")
    for number in (0, 1):
        checkpoints.write(number, _content(number))
        checkpoints.point(LATEST, number)
    checkpoints.point(BEST, 0)
    assert checkpoints.name(LATEST).resolve() == checkpoints.path(1).resolve()
    assert checkpoints.name(BEST).resolve() == checkpoints.path(0).resolve()
    (tmp_path / "before").rename(tmp_path / "after")
    assert load_file(Checkpoints(tmp_path / "after").name(LATEST))["0.weight"][0, 0] == 1.0


def test_nothing_is_left_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in (0, 0, 1):
        checkpoints.write(number, _content(number))
        checkpoints.point(LATEST, number)
    assert _kept(tmp_path) == ["000000.safetensors", "000001.safetensors", "latest.safetensors"]


def test_what_a_killed_process_left_aside_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".000001.part").write_bytes(b"half a ver")
    (tmp_path / ".latest.part").symlink_to("000000.safetensors")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(1, _content(1.0))
    checkpoints.point(LATEST, 1)
    checkpoints.prune({1})
    assert _kept(tmp_path) == ["000001.safetensors", "latest.safetensors"]


@pytest.mark.parametrize(
    ("keep", "wanted", "left"),
    [
        (None, set(), [0, 1, 2, 3, 4]),
        (1, {4}, [4]),
        (2, {4}, [3, 4]),
        (2, {1, 4}, [1, 3, 4]),  # the best is kept, however old
        (1, {0, 4}, [0, 4]),
        (9, {4}, [0, 1, 2, 3, 4]),
    ],
)
def test_pruning_keeps_the_newest_and_what_is_wanted(tmp_path: Path, keep: int | None, wanted: set[int], left: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for number in range(5):
        checkpoints.write(number, _content(number))
    checkpoints.point(LATEST, 4)
    checkpoints.prune(wanted)
    assert _kept(tmp_path) == [*(f"{number:06d}.safetensors" for number in left), "latest.safetensors"]


def test_pruning_goes_on_beyond_six_digits(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for number in (999_999, 1_000_000):
        checkpoints.write(number, b"x")
    checkpoints.prune({1_000_000})
    assert _kept(tmp_path) == ["1000000.safetensors"]
