"""The benchmark runs with clients that lie, and prints what it promises."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from poisoning import Found, row, tell

ROOT = Path(__file__).parents[2]


def test_an_attack_and_what_a_defence_makes_of_it_are_printed() -> None:
    arguments = ["--rounds", "2", "--attack", "garbage", "--defence", "sum alone", "--defence", "groups", "--json"]
    command = [sys.executable, ROOT / "benchmarks" / "poisoning.py", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    alone, groups = json.loads(ran.stdout)
    assert (alone["attack"], alone["defence"], groups["defence"]) == ("garbage", "sum alone", "groups")
    assert (alone["accuracy"], alone["done"], alone["abandoned"], alone["groups_left_out"]) == (None, 0, 2, 0)
    assert "nobody can see which" in alone["reason"]
    assert (groups["done"], groups["abandoned"], groups["groups_left_out"], groups["reason"]) == (2, 0, 2, "")
    assert 0 < groups["accuracy"] <= 1
    assert groups["accuracies"] == [groups["accuracy"]]


def test_the_table_says_what_became_of_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = Found(2, {3: 0.75}, {0}, {1: "of a lie"}, 4, 3)
    none = Found(1, abandoned={0: "of lies"})
    rows = [row("garbage", "groups", [found]), row("times -10", "sum alone", [none])]
    tell(rows, argparse.Namespace(json=False, clients=9, liars=1, rounds=2, seeds=1))
    _, _, first, second, *reasons = capsys.readouterr().out.splitlines()
    assert first.split() == ["garbage", "groups", "75.00%", "1", "1", "4"]
    assert second.split() == ["times", "-10", "sum", "alone", "no", "version", "0", "1", "0"]
    assert reasons == [
        "garbage, groups: rounds were abandoned because of a lie",
        "times -10, sum alone: rounds were abandoned because of lies",
    ]
