"""`choral privacy plan` and `audit`, as they are typed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from choral.config import parse
from choral.errors import ConfigError
from choral.privacy.gaussian import epsilon_of
from choral_client.privacy_book import CLIENT, Loss, PrivacyBook
from choral_deploy.cli import app
from choral_server.config import RunSettings
from typer.testing import CliRunner

MANY = ["--clients", "1000", "--cohort", "50"]


def said(*arguments: str) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["privacy", *arguments, "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    told: dict[str, Any] = json.loads(found.stdout)
    return told


def test_what_rounds_cost() -> None:
    found = said("plan", *MANY, "--rounds", "200", "--noise", "1")
    assert found["epsilon_models"] == pytest.approx(5.367864, abs=1e-6)
    assert found["epsilon_coordinator"] == pytest.approx(166.0355, abs=1e-3)


def test_how_much_noise_is_needed_and_for_how_many_rounds_it_is_enough() -> None:
    found = said("plan", *MANY, "--rounds", "200", "--epsilon", "4")
    assert 1.1 < found["noise"] < 1.2
    assert found["epsilon_models"] <= 4
    again = said("plan", *MANY, "--noise", str(found["noise"]), "--epsilon", "4")
    assert again["rounds"] == 200


@pytest.mark.parametrize("delta", ["1e-5", "0.00002", "1.5e-7"])
def test_what_it_prints_is_a_configuration(delta: str) -> None:
    found = CliRunner().invoke(app, ["privacy", "plan", *MANY, "--rounds", "20", "--epsilon", "2", "--delta", delta])
    lines = found.stdout[found.stdout.index("run:") :]
    run = parse(yaml.safe_load(lines)["run"], RunSettings, "what was printed")
    assert run.privacy is not None
    assert (run.rounds, run.cohort_size, run.privacy.delta) == (20, 50, float(delta))
    costs = said("plan", *MANY, "--rounds", "20", "--noise", str(run.privacy.noise), "--delta", delta)
    assert costs["epsilon_models"] <= run.privacy.epsilon <= 2.0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([*MANY, "--rounds", "5"], "give two of --rounds, --epsilon and --noise, and the third is found; --rounds is given"),
        ([*MANY, "--rounds", "5", "--epsilon", "1", "--noise", "1"], "give two of"),
        (["--clients", "5", "--cohort", "6", "--rounds", "1", "--noise", "1"], "--cohort 6: is more than --clients 5"),
        ([*MANY, "--noise", "1", "--epsilon", "-1"], "--epsilon -1: give a number above 0, from 0 to 1e+06"),
        ([*MANY, "--noise", "1", "--epsilon", "0.01", "--sampling", "none"], "not enough for one round with noise 1"),
        ([*MANY, "--rounds", "9", "--noise", "1", "--delta", "2"], "--delta 2: give a probability"),
        ([*MANY, "--rounds", "9", "--noise", "1", "--sampling", "fixed", "--accountant", "pld"], "take accountant rdp"),
    ],
)
def test_what_cannot_be_answered_is_said(arguments: list[str], told: str) -> None:
    found = CliRunner().invoke(app, ["privacy", "plan", *arguments])
    assert found.exit_code != 0
    assert told in str(found.exception)


@pytest.mark.parametrize("source", ["gaussian", "discrete", "skellam", "local"])
def test_an_audit_finds_nothing_where_the_promise_holds(source: str) -> None:
    found = said("audit", "--noise", "1.5", "--rounds", "1", "--source", source, "--confidence", "0.999999")
    assert found["epsilon_at_least"] <= found["epsilon_promised"] < 3
    assert found["right"] > 110  # of 200: better than a coin
    assert found["guesses"] == 200


def test_an_audit_finds_that_the_noise_is_missing() -> None:
    found = CliRunner().invoke(app, ["privacy", "audit", "--noise", "1.5", "--source", "none", "--json"])
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert told["right"] == told["guesses"]
    assert told["epsilon_at_least"] > 3 > told["epsilon_promised"]


@pytest.mark.parametrize("delta", ["1e-5", "0.00002"])
def test_what_hiding_examples_costs_is_a_configuration_too(delta: str) -> None:
    arguments = ["--examples", "400", "--rounds", "20", "--delta", delta]
    found = CliRunner().invoke(app, ["privacy", "examples", *arguments, "--epsilon", "2"])
    printed = yaml.safe_load(found.stdout[found.stdout.index("run:") :])["run"]
    run = parse({"rounds": 20, "cohort_size": 2} | printed, RunSettings, "what was printed")
    hiding = run.example_privacy
    assert hiding is not None
    again = said("examples", *arguments, "--noise", str(hiding.noise))
    assert again["epsilon"] <= hiding.epsilon <= 2.0
    assert again["steps"] == 20 * 50
    assert hiding.delta == float(delta)
    dearer = said("examples", *arguments, "--noise", str(hiding.noise), "--batch-size", "400")
    assert dearer["steps"] == 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give --noise or --epsilon: the other one is found"),
        (["--noise", "1", "--epsilon", "1"], "give --noise or --epsilon"),
        (["--noise", "-1"], "--noise -1: give a number above 0, from 0.05 to 10000"),
        (["--noise", "0.001"], "--noise 0.001: give a number above 0, from 0.05"),
        (["--epsilon", "nan"], "--epsilon nan: give a number above 0"),
        (["--epsilon", "1", "--delta", "1"], "--delta 1: give a probability"),
    ],
)
def test_what_is_no_question_about_examples(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        CliRunner().invoke(app, ["privacy", "examples", "--examples", "9", "--rounds", "1", *arguments], catch_exceptions=False)


def test_a_device_shows_what_it_has_lost(tmp_path: Path) -> None:
    PrivacyBook(tmp_path).charge([Loss(CLIENT, 2.0)] * 4, "a", datetime(2026, 11, 26, tzinfo=UTC))
    (tmp_path / "guard.yaml").write_text("max_epsilon: 9.0\n")
    asked = CliRunner().invoke(app, ["client", "privacy", "--state", str(tmp_path), "--json"], catch_exceptions=False)
    told = json.loads(asked.stdout)
    assert told["client"] == {"results": 4, "epsilon": pytest.approx(epsilon_of(1.0, 1e-5)), "allowed": 9.0}
    assert told["example"] == {"results": 0, "epsilon": 0.0, "allowed": None}
    shown = CliRunner().invoke(app, ["client", "privacy", "--state", str(tmp_path)], catch_exceptions=False)
    assert "4.377" in shown.stdout
    with pytest.raises(ConfigError, match="is no folder"):
        CliRunner().invoke(app, ["client", "privacy", "--state", str(tmp_path / "none")], catch_exceptions=False)


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_where_clients_add_the_noise_it_is_counted_so(mode: str) -> None:
    arguments = ["plan", "--clients", "9", "--cohort", "9", "--rounds", "10", "--sampling", "none"]
    central, found = said(*arguments, "--noise", "1"), said(*arguments, "--noise", "1", "--mode", mode)
    assert (found["epsilon_models"] > central["epsilon_models"]) == (mode == "distributed")
    printed = CliRunner().invoke(app, ["privacy", *arguments, "--epsilon", "5", "--mode", mode], catch_exceptions=False).stdout
    run = parse(yaml.safe_load(printed[printed.index("run:") :])["run"], RunSettings, "what was printed")
    assert run.privacy is not None
    assert run.privacy.mode == mode
    with pytest.raises(ConfigError, match=f"--mode {mode} does not go with --sampling poisson: add --sampling none"):
        CliRunner().invoke(app, ["privacy", *arguments[:-1], "poisson", "--noise", "1", "--mode", mode], catch_exceptions=False)
