"""Attacks on scores made by hand come to figures that are known, and the benchmark finds who took part where nothing hides it."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from choral.privacy.accounting import Accountant, Release, epsilon
from membership import advantages, auc, by_reference, most_advantage, most_tpr, roc, share, tpr_at  # type: ignore[import-not-found]

BENCHMARK = str(Path(__file__).parents[2] / "benchmarks" / "membership.py")
MEMBERS = np.array([True, True, False, False])


@pytest.mark.parametrize(
    ("scores", "area"),
    [([4, 3, 2, 1], 1.0), ([1, 2, 3, 4], 0.0), ([7, 7, 7, 7], 0.5), ([2, 1, 1, 0], 0.875), ([4, 1, 3, 2], 0.5)],
)
def test_auc_is_how_often_a_member_is_higher_and_half_where_scores_are_equal(scores: list[float], area: float) -> None:
    assert auc(np.array(scores, float), MEMBERS) == area


def test_the_curve_has_a_point_for_each_score() -> None:
    fpr, tpr = roc(np.array([3.0, 1.0, 1.0, 0.0]), MEMBERS)
    assert fpr.tolist() == [0, 0, 0.5, 1]
    assert tpr.tolist() == [0, 0.5, 1, 1]


def test_tpr_counts_only_what_is_found_within_the_fpr() -> None:
    scores, members = np.array([9.0, 8, 7, 6, 5, 4]), np.array([True, False, True, False, True, False])
    assert [tpr_at(most, scores, members) for most in (0.0, 0.32, 0.34, 1.0)] == [1 / 3, 1 / 3, 2 / 3, 1]


def test_a_threshold_is_used_on_clients_on_whom_it_was_not_chosen() -> None:
    members = np.array([[True, True, False, False]] * 2)
    assert advantages(np.array([[4.0, 3, 2, 1]] * 2), members).tolist() == [0.5, 0.5]  # best for 4 and 2 is 4: too high for 3
    assert advantages(np.array([[4.0, 4, 1, 1]] * 2), members).tolist() == [1, 1]
    assert advantages(np.array([[4.0, 1, 1, 4]] * 2), members).tolist() == [-0.5, -0.5]  # 4 is wrong twice; then, nobody
    assert advantages(np.full((2, 4), 7.0), members).tolist() == [0, 0]


def test_a_loss_is_compared_with_that_in_the_other_models_without_the_client() -> None:
    losses = np.array([[1.0, 5.0], [4.0, 1.0], [8.0, 3.0]])
    members = np.array([[True, False], [False, True], [False, True]])
    scores = by_reference(losses, members)
    assert scores[:, 0].tolist() == [6 - 1, 8 - 4, 4 - 8]
    assert scores[:, 1].tolist() == [2 - 5, 5 - 1, 5 - 3]  # in both of the others it was in: they are all there is
    for model in range(3):
        turned = members.copy()
        turned[model] = ~turned[model]
        assert by_reference(losses, turned)[model].tolist() == scores[model].tolist()  # that is what is to be guessed


def test_the_bound_is_the_farthest_that_the_curve_can_be_from_the_diagonal() -> None:
    assert most_advantage(math.log(3), 0) == pytest.approx(0.5)
    assert most_advantage(0, 0.01) == pytest.approx(0.01)
    assert most_advantage(math.inf, 1e-5) == 1
    fpr = np.linspace(0, 1, 100_001)
    for spent in (0.5, 2.0, 8.0):
        assert most_advantage(spent, 0.01) == pytest.approx((math.exp(spent) - 1 + 0.02) / (math.exp(spent) + 1))
        assert (most_tpr(fpr, spent, 0.01) - fpr).max() == pytest.approx(most_advantage(spent, 0.01), abs=1e-4)


def test_members_are_found_in_a_model_that_has_learned_them_by_heart_and_not_behind_much_noise(tmp_path: Path) -> None:
    sizes = ["--clients", "40", "--rounds", "10", "--seeds", "2", "--random-labels", "1", "--epsilon", "0.1"]
    command = [sys.executable, BENCHMARK, *sizes, "--plot", str(tmp_path / "plot.png"), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    plain, clipped, private = json.loads(ran.stdout)
    assert [row["name"] for row in (plain, clipped, private)] == ["plain", "no noise", "ε = 0.1"]
    assert private["spent"] == pytest.approx(epsilon({Release(private["noise"]): 10}, 1e-5, Accountant.PLD))
    assert private["spent"] <= 0.1
    assert [row["bound"] for row in (plain, clipped)] == [1, 1]
    assert private["bound"] == pytest.approx(most_advantage(private["spent"], 1e-5))
    for row in (plain, clipped, private):
        assert len(row["accuracies"]) == 2
        for found in row["attacks"].values():
            assert len(found["aucs"]) == len(found["advantages"]) == 2
            assert found["auc"] == pytest.approx(np.mean(found["aucs"]))
            assert -1 <= found["advantage"] <= 1
    assert plain["attacks"]["loss"]["auc"] > 0.9
    assert private["attacks"]["loss"]["auc"] < 0.85  # of a guess, five standard errors above what is expected
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_share_is_from_0_to_1() -> None:
    assert share("0.25") == 0.25
    for word in ("2", "-0.1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{word} is not from 0 to 1"):
            share(word)
