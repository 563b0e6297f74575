"""Gradient inversion by hand, and `choral demo attack` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from choral.errors import ConfigError, InvalidMessage, TaskError
from choral.manifest import Entry, EntryKind, Manifest
from choral.secagg import wide
from choral.secagg.fixed_point import fixed_point
from choral.secagg.masks import Mask
from choral.secagg.roster import Terms
from choral.secagg.summand import Summand
from choral_deploy import attack
from choral_deploy.attack import Federation, guess, run
from choral_deploy.attack_report import AttackReport
from choral_deploy.inversion import FirstLayer, NothingToInvert, read_masked, read_plain
from choral_deploy.secure_sum import secure_sum
from safetensors.numpy import save

ATTACK = [sys.executable, "-m", "choral_deploy.cli", "demo", "attack"]
FLOAT32 = 1e-4
"""Weights are up to 0.28, so that a change is off by up to 2^-26 ≈ 1.5e-8. Most changes are 1e-4 to 1e-3, of the weights and of the
biases: 1.5e-4 to 1.5e-5 of one unit's word for one feature, and less of what all units say of all features."""

MANIFEST = Manifest(
    (
        Entry("0.mean", "F32", (2,), 0, EntryKind.STATISTIC),
        Entry("0.scale", "F32", (2,), 0, EntryKind.STATISTIC),
        Entry("1.weight", "F32", (3, 2), 0, EntryKind.AVERAGED),
        Entry("1.bias", "F32", (3,), 6, EntryKind.AVERAGED),
        Entry("2.weight", "F32", (1, 3), 9, EntryKind.AVERAGED),
    )
)
VERSION = save({"0.mean": np.array([10, 20], np.float32), "0.scale": np.array([2, 4], np.float32)})
"""With x = (14, 16) the first layer gets (2, −1)."""


@pytest.fixture
def layer() -> FirstLayer:
    return FirstLayer.of(VERSION, MANIFEST)


def update(weight: list[list[float]], bias: list[float]) -> np.ndarray:
    return np.array([*np.ravel(weight), *bias, 7, 7, 7], np.float64)


def test_one_example_is_read_from_the_units_that_have_moved(layer: FirstLayer) -> None:
    moved = update([[4, -2], [0, 0], [-1, 0.5]], [2, 0, -0.5])  # δ = (2, 0, −½)
    assert layer.invert(moved).tolist() == [14, 16]


def test_units_count_by_how_far_they_have_moved(layer: FirstLayer) -> None:
    """Two units, with Δb = 3 and 1, say 2 and 12 of the first feature: (9 · 2 + 1 · 12) / 10 = 3, which is 10 + 2 · 3."""
    assert layer.invert(update([[6, 0], [12, 0], [0, 0]], [3, 1, 0])).tolist() == [16, 20]


def test_of_a_sum_those_inputs_are_found_of_which_two_units_say_the_same(layer: FirstLayer) -> None:
    """The third unit mixes two examples."""
    found = layer.agreeing(update([[4, -2], [-1, 0.5], [2, 9]], [2, -0.5, 1]))
    assert [one.tolist() for one in found] == [[14, 16]]
    assert layer.agreeing(update([[4, -2], [-1, 0.6], [2, 9]], [2, -0.5, 1])) == []


@pytest.mark.parametrize("read", [FirstLayer.invert, FirstLayer.agreeing])
def test_a_bias_that_has_not_moved_says_nothing(layer: FirstLayer, read: Callable[[FirstLayer, np.ndarray], object]) -> None:
    still = update([[0, 0], [0, 0], [0, 0]], [0, 0, 0])
    with pytest.raises(NothingToInvert, match=r"1\.bias has not moved"):
        read(layer, still)
    assert guess(layer, still).tolist() == [10, 20]


def test_an_error_of_zero_is_exact_and_of_one_is_the_mean(layer: FirstLayer) -> None:
    true = np.array([0.0, 20.0])  # zero, and at the mean: neither may be divided by
    assert layer.error(true, true) == 0
    assert layer.error(layer.mean, true) == 1
    assert layer.error(np.array([0.0, 40.0]), true) == 1  # 20 / 4 beside 10 / 2


def test_a_model_without_a_first_layer_to_read_is_named() -> None:
    with pytest.raises(TaskError, match="no linear layer with a bias"):
        FirstLayer.of(VERSION, Manifest((*MANIFEST.entries[:3], MANIFEST.entries[4])))


def test_payloads_of_another_length_are_refused() -> None:
    numbers = fixed_point(2, 1.0)
    assert read_plain(np.arange(12, dtype="<f4").tobytes(), MANIFEST).tolist() == list(range(12))
    assert read_masked(numbers.encode(np.full(12, -0.25)).tobytes(), numbers, MANIFEST).tolist() == [-0.25] * 12
    assert read_masked(bytes(48 + 32), numbers, MANIFEST).size == 12  # behind the update there are other numbers
    for length in (0, 47):
        with pytest.raises(InvalidMessage):
            read_masked(bytes(length), numbers, MANIFEST)
    for length in (0, 47, 52):
        with pytest.raises(InvalidMessage):
            read_plain(bytes(length), MANIFEST)


def test_the_sum_is_right_and_no_upload_is_what_was_masked() -> None:
    vectors = {name: np.full(1000, number, np.uint32) for number, name in enumerate(["alice", "bob", "carol"], start=2**31)}
    summands = {name: Summand(vector.copy(), wide.encode([2.5, 1.0])) for name, vector in vectors.items()}
    summed = secure_sum(Terms("run", 1, bytes(32), bytes(32)), summands)
    assert set(np.frombuffer(summed.total, np.uint32, 1000).tolist()) == {(3 * 2**31 + 3) % 2**32}
    assert wide.decode(np.frombuffer(summed.total, np.uint64, offset=4000).reshape(-1, 4)) == [7.5, 3.0]
    for name, vector in vectors.items():
        assert np.count_nonzero(np.frombuffer(summed.uploads[name], np.uint32, 1000) == vector) < 3  # by chance one in 2^32 is


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the command has it: on a busy machine torch's threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> AttackReport:
    return run(5, 0, tmp_path_factory.mktemp("attack"))


def test_a_plain_upload_gives_its_example_away_and_a_masked_one_does_not(report: AttackReport) -> None:
    assert report.plain_error < FLOAT32
    assert max(report.layer.error(one.plain, one.true) for one in report.victims) < FLOAT32
    assert report.masked_error > 0.8  # 1 is a guess; the noise about it is 0.02


def test_it_is_the_mask_that_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "VICTIMS", 4)
    monkeypatch.setattr(Mask, "add_to", lambda self, values: None)
    monkeypatch.setattr(Mask, "add_to_wide", lambda self, values: None)
    report = run(5, 0, tmp_path)
    assert report.masked_error < 1e-3  # what the fixed point leaves of it


def test_a_sum_of_few_gives_examples_away_and_one_of_more_fewer(report: AttackReport, tmp_path: Path) -> None:
    assert report.sum_error > 0.5  # what the inversion makes of it is no one's example
    assert report.sum_found == sum(len(one.given_away) for one in report.victims) / 100 > 0.1
    assert all(report.layer.error(found, true) < 0.01 for one in report.victims for true, found in one.given_away)
    assert run(20, 0, tmp_path).sum_found < report.sum_found / 2


def test_all_but_the_masks_follows_from_the_seed(report: AttackReport, tmp_path: Path) -> None:
    again = run(5, 0, tmp_path)
    assert (again.plain_error, again.sum_error, again.sum_found) == (report.plain_error, report.sum_error, report.sum_found)
    for one, same in zip(report.victims, again.victims, strict=True):
        assert (one.plain == same.plain).all()
        assert (one.masked != same.masked).all()


def test_a_victim_whose_update_says_nothing_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = bytes(4 * Federation.of(0).worker(0).manifest.size)
    monkeypatch.setattr(attack, "VICTIMS", 4)
    monkeypatch.setattr(attack.Federation, "update", lambda self, home, plan: nothing)
    numbers = wide.encode([0.0] * 3)
    summand = Summand(np.zeros(len(nothing) // 4, np.uint32), numbers)
    monkeypatch.setattr(attack.Federation, "summand", lambda self, home, plan: deepcopy(summand))
    report = run(2, 0, tmp_path)
    assert (report.plain_error, report.sum_error, report.sum_found) == (1, 1, 0)


@pytest.mark.parametrize(
    ("clients", "seed", "told"),
    [(1, 0, "--clients 1: give 2 to 100"), (101, 0, "--clients 101"), (5, -1, "--seed -1"), (5, 0, "is a file")],
)
def test_what_cannot_be_asked_for_is_named(clients: int, seed: int, told: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if told == "is a file":
        out.touch()
    with pytest.raises(ConfigError, match=re.escape(told)):
        run(clients, seed, out)
    assert out.is_file() == (told == "is a file")
    assert not out.is_dir()


def test_as_json(report: AttackReport, tmp_path: Path) -> None:
    done = subprocess.run([*ATTACK, "--json", "--seed", "3", "--out", tmp_path], check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert (told["victims"], told["clients"], told["seed"]) == (20, 5, 3)
    assert told["plain_error"] < FLOAT32 < 0.5 < told["masked_error"]
    assert {"sum_error", "sum_found"} < told.keys()
    assert told["plain_error"] != report.plain_error  # of another seed
    assert Path(told["picture"]).read_bytes().startswith(b"\x89PNG\r\n")
    assert Path(told["picture"]) == tmp_path / "attack.png"


def test_as_a_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [*ATTACK, "--out", tmp_path], check=True, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
    )
    rooms = next(line for line in done.stdout.splitlines() if line.startswith("│ RM"))
    true, plain, masked, *_ = (float(cell) for cell in rooms.split("│")[2:6])
    assert true == plain != masked
    assert str(tmp_path / "attack.png") in done.stdout


def test_flags_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    """`choral demo` has flags of the same names."""
    lost = [*ATTACK[:-1], "--clients", "3", "--seed", "1", "attack"]
    done = subprocess.run(lost, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "choral: --clients, --seed: what stands before attack is for the demo itself; write it after attack\n"


def test_a_wrong_flag_ends_it_without_a_traceback() -> None:
    done = subprocess.run([*ATTACK, "--clients", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "choral: --clients 1: give 2 to 100; the sum of one is its update\n"
