"""Differential privacy over real processes: a budget that holds, whoever dies, and what operators see of it."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import yaml
from choral.privacy.accounting import Release, Sampling, epsilon, noise_for
from choral_server import failpoints
from e2e import exact
from e2e.federation import Federation, Process
from safetensors.numpy import load_file

ROUNDS, DELTA = 3, 1e-5
RANGES = [(0, 10), (0, 10)]
PRIVATE_TASK = exact.EXACT_TASK + f"task = replace(task, ranges={RANGES})\n"
EVERYBODY = Release(3.0, Sampling.NONE, 2, 2)
TERMS: dict[str, Any] = {"epsilon": 50.0, "delta": DELTA, "noise": 3.0, "metrics": {"loss": [0, 100], "mae": [0, 10]}}


def configure(
    federation: Federation,
    rounds: int = ROUNDS,
    run: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
    **privacy: Any,
) -> None:
    """The exact task, of which clients measure each version, privately. The coordinator stays when the run is over."""
    exact.configure(
        federation, rounds, run={"privacy": TERMS | privacy} | (run or {}), **{"exit_when_done": False} | (others or {})
    )
    federation.write_task(PRIVATE_TASK, "exact")


def spendings(federation: Federation, *arguments: object) -> dict[str, Any]:
    """What `choral privacy show` says, with rounds oldest first."""
    listing = federation.command("privacy", "show", "-c", federation.config, "--json", *arguments)
    assert listing.code() == 0, listing.stderr
    found: dict[str, Any] = json.loads(listing.stdout)
    found["spendings"].reverse()
    return found


def together(federation: Federation) -> None:
    """All clients start."""
    for name in exact.CLIENTS:
        exact.start_client(federation, name)


def end(coordinator: Process) -> None:
    """The coordinator of a run that is over ends well; its clients wait for the next one."""
    coordinator.terminate()
    assert coordinator.code() == 0


def test_a_run_ends_when_its_budget_is_spent(quick: Federation) -> None:
    """Enough for the statistics and two rounds of ten: both are made, the third is refused, and everybody ends well."""
    budget = (epsilon({EVERYBODY: 3}, DELTA) + epsilon({EVERYBODY: 4}, DELTA)) / 2
    configure(quick, 10, epsilon=budget)
    coordinator = quick.start_coordinator()
    together(quick)
    over = coordinator.saw("run over")
    assert over["state"] == "finished"
    assert over["reason"].startswith("the privacy budget is spent: ε is")
    found = spendings(quick)
    assert [one["kind"] for one in found["spendings"]] == ["ROUND_KIND_STATISTICS", *["ROUND_KIND_TRAINING"] * 2]
    assert {one["state"] for one in found["spendings"]} == {"spent"}
    for number, one in enumerate(found["spendings"]):
        assert one["epsilon_models"] == one["epsilon_coordinator"] == pytest.approx(epsilon({EVERYBODY: number + 1}, DELTA))
    assert found["budget"]["epsilon_models"] == found["spendings"][-1]["epsilon_models"] <= budget
    assert found["budget"]["rounds_left"] == "0"
    told = [event["told"] for event in quick.rows("events") if event["what"] == "privacy budget spent"]
    assert told == [over["reason"]]
    assert len(quick.rows("versions", "list")) == 4  # 0, the statistics', and two
    end(coordinator)
    again = quick.start_coordinator()  # nor is there more after a restart
    assert again.saw("run over")["reason"] == over["reason"]
    assert len(spendings(quick)["spendings"]) == 3
    end(again)


def test_a_round_that_is_abandoned_costs_nothing_and_a_rollback_gives_nothing_back(quick: Federation) -> None:
    configure(quick, 2, run={"max_abandoned": 99, "deadline_s": 0.2})
    coordinator = quick.start_coordinator()
    together(quick)
    coordinator.saw("run over")
    returned = [one for one in spendings(quick)["spendings"] if one["state"] == "returned"]
    spent = [one for one in spendings(quick)["spendings"] if one["state"] == "spent"]
    abandoned = [one for one in quick.rows("rounds", "list") if one["state"] == "ROUND_STATE_ABANDONED"]
    assert len(returned) == len(abandoned)
    assert spent[-1]["epsilon_models"] == pytest.approx(epsilon({EVERYBODY: len(spent)}, DELTA))
    end(coordinator)


@pytest.mark.parametrize(
    "death",
    [
        *("round-opened:before#2", "round-opened:after#2", "round-closed:before#2", "round-closed:after#2"),
        *("upload-folded#5", "sum-written#2", "checkpoint-written#4", "version-published:before#3", "version-published:after#3"),
    ],
)
def test_whenever_the_coordinator_dies_each_round_is_paid_for_once(quick: Federation, death: str) -> None:
    configure(quick, sampling="none", adaptive={})
    doomed = quick.start_coordinator(environment={failpoints.VARIABLE: death})
    together(quick)
    assert doomed.code() == -signal.SIGKILL
    again = quick.start_coordinator()
    again.saw("run over")
    found = spendings(quick)
    paid = [one for one in found["spendings"] if one["state"] == "spent"]
    assert len(paid) == ROUNDS + 2  # the statistics before, and a last measurement
    assert found["budget"]["epsilon_models"] == pytest.approx(epsilon({EVERYBODY: len(paid)}, DELTA))
    end(again)
    audit = quick.command("audit", "verify", "-c", quick.config)
    assert audit.code() == 0, audit.stdout + audit.stderr


def test_noise_is_never_the_same_again(quick: Federation) -> None:
    """The coordinator dies when a version is written and not yet known; after it, the same sum gets other noise."""
    configure(quick, 1, others={"exit_when_done": True})
    doomed = quick.start_coordinator(environment={failpoints.VARIABLE: "checkpoint-written#3"})
    together(quick)
    assert doomed.code() == -signal.SIGKILL
    drafts = [
        path for path in quick.versions.rglob("*") if path.is_file() and "000002" in path.name and "optimizer" not in path.name
    ]
    before = {path.name: path.read_bytes() for path in drafts}
    again = quick.start_coordinator()
    assert again.code() == 0
    after = (quick.versions / "000002.safetensors").read_bytes()
    assert before, "a draft was left"
    assert after not in before.values()


def test_who_is_drawn_decides_and_nobody_is_too_few(quick: Federation) -> None:
    """Poisson sampling of one in three on the average: rounds of none, one, two and three all count and make a version."""
    configure(
        quick,
        12,
        run={"cohort_size": 1, "strategy": {"name": "fedavg"}},
        others={"evaluation": {"clients": False}},
        sampling="poisson",
        metrics=None,
    )
    coordinator = quick.start_coordinator()
    together(quick)
    coordinator.saw("run over")
    rounds = [one for one in quick.rows("rounds", "list") if one["kind"] == "ROUND_KIND_TRAINING"]
    assert len(rounds) == 12
    assert {one["state"] for one in rounds} == {"ROUND_STATE_DONE"}
    found = spendings(quick)
    trained = [one for one in found["spendings"] if one["kind"] == "ROUND_KIND_TRAINING"]
    assert {(one["sampling"], one["expected"]) for one in trained} == {("poisson", "1")}
    releases: dict[Release, int] = {}
    for one in found["spendings"]:
        release = Release(one["noise"], Sampling(one["sampling"]), int(one["expected"]), int(one["population"]))
        releases[release] = releases.get(release, 0) + 1
        assert one["epsilon_models"] == pytest.approx(epsilon(releases, DELTA))
        assert one["epsilon_coordinator"] == pytest.approx(epsilon(releases, DELTA, amplified=False))
    first, second = (load_file(quick.versions / f"{number:06}.safetensors") for number in (2, 3))
    assert all((first[name] != second[name]).any() for name in first if "weight" in name)  # noise, whoever was drawn
    took_part = sum(part["client"] == "alice" and part["state"] == "accepted" for one in rounds for part in one["parts"])
    alice = spendings(quick, "--client", "alice")
    assert len([one for one in alice["spendings"] if one["kind"] == "ROUND_KIND_TRAINING"]) == took_part
    assert alice["epsilon_client"] <= found["budget"]["epsilon_coordinator"]
    end(coordinator)


def test_a_drawn_client_that_does_not_answer_changes_nothing_that_is_counted(quick: Federation) -> None:
    """Nobody is drawn in its place, and the round is made of whoever came: of nobody, here."""
    run = {"cohort_size": 1, "deadline_s": 0.5, "absence_s": 0.1, "strategy": {"name": "fedavg"}}
    configure(quick, 3, run=run, others={"evaluation": {"clients": False}}, sampling="fixed", metrics=None)
    exact.pace(quick)
    paced = (quick.folder / "exact.py").read_text()
    quick.write_task(f"{paced}task = replace(task, ranges={RANGES})\n", "exact")
    gate = quick.folder / "gate"
    gate.write_text("0")
    coordinator = quick.start_coordinator()
    for name in exact.CLIENTS:
        exact.start_client(quick, name, gate=gate)
    coordinator.saw("run over")
    rounds = [one for one in quick.rows("rounds", "list") if one["kind"] == "ROUND_KIND_TRAINING"]
    assert [(one["state"], len(one["parts"]), one["quorum"]) for one in rounds] == [("ROUND_STATE_DONE", 1, 0)] * 3
    assert not any(part["state"] == "accepted" for one in rounds for part in one["parts"])
    assert len({(quick.versions / f"{number:06}.safetensors").read_bytes() for number in range(1, 5)}) == 4  # noise alone
    end(coordinator)


def test_what_was_told_without_noise_is_not_forgotten(quick: Federation) -> None:
    configure(quick, 1, others={"exit_when_done": True})
    private = quick.config.read_text()
    content = yaml.safe_load(private)
    del content["run"]["privacy"]
    quick.config.write_text(yaml.safe_dump(content))
    plain = quick.start_coordinator()
    together(quick)
    assert plain.code() == 0
    quick.config.write_text(private)
    refused = quick.start_coordinator()
    assert refused.code() == 2
    assert "rounds in this database were done without noise" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_rounds_that_a_backup_does_not_know_are_charged(quick: Federation) -> None:
    budget = (epsilon({EVERYBODY: 12}, DELTA) + epsilon({EVERYBODY: 13}, DELTA)) / 2
    configure(
        quick, 20, epsilon=budget, metrics=None, others={"evaluation": {"clients": False}}, run={"schedule": {"interval_s": 3600}}
    )
    coordinator = quick.start_coordinator()
    coordinator.saw("coordinator ready")
    none = quick.command("privacy", "charge", 8, "-c", quick.config)
    assert none.code() == 2
    assert "no private training round is in the ledger" in none.stderr
    together(quick)
    coordinator.saw("round done", kind="training")
    charged = quick.command("privacy", "charge", 8, "-c", quick.config, "--reason", "a restored backup")
    assert charged.code() == 0, charged.stderr
    assert "charged 8 rounds" in charged.stdout
    found = spendings(quick)
    assert found["budget"]["epsilon_models"] == pytest.approx(epsilon({EVERYBODY: 10}, DELTA))
    assert found["budget"]["rounds_left"] == "2"
    (last,) = [one for one in found["spendings"] if one["round"] == "-1"]
    assert (last["rounds"], last["state"]) == ("8", "spent")
    assert "charged" in quick.command("privacy", "show", "-c", quick.config).stdout
    end(coordinator)
    audit = quick.command("audit", "verify", "-c", quick.config)
    assert audit.code() == 0, audit.stdout + audit.stderr
    again = quick.start_coordinator()
    again.saw("coordinator ready")
    assert spendings(quick)["budget"] == found["budget"]


def test_a_device_that_wants_a_bound_of_its_own_takes_part_in_nothing_that_rests_on_a_word(quick: Federation) -> None:
    configure(quick, 1)
    coordinator = quick.start_coordinator()
    guard = quick.folder / "alice" / "client" / "guard.yaml"
    guard.parent.mkdir(parents=True, exist_ok=True)
    guard.write_text("max_epsilon: 8.0\n")
    alice = exact.start_client(quick, "alice")
    exact.start_client(quick, "bob")
    assert "the coordinator's word" in alice.saw("declined")["reason"]
    coordinator.saw("round abandoned")


SUMMED = {"secure_aggregation": {"minimum_cohort": 2}}


@pytest.mark.parametrize(
    ("run", "changes", "told"),
    [
        ({}, {"privacy": TERMS | {"noise": 0}}, "run.privacy.noise: 0 is not allowed"),
        ({}, {"privacy": {"epsilon": 1.0}}, "run.privacy.delta: is missing"),
        ({"over_selection": 0.5}, {}, "over_selection 0.5 contradicts privacy"),
        ({"weight_cap": 100}, {}, "weight_cap 100 contradicts privacy"),
        ({"max_update_norm": 2.0}, {}, "max_update_norm 2 contradicts privacy"),
        (SUMMED, {}, "secure_aggregation contradicts privacy.mode central"),
        ({}, {"privacy": {**TERMS, "mode": "distributed"}}, "mode: distributed puts the noise into the sum of secure_aggregation"),
        (SUMMED, {"privacy": {**TERMS, "mode": "local"}}, "secure_aggregation contradicts privacy.mode local"),
        ({}, {"privacy": {**TERMS, "mode": "local", "sampling": "poisson"}}, "sampling: poisson contradicts mode: local"),
        ({}, {"privacy": {**TERMS, "mode": "local", "discrete": True}}, "discrete is for noise that the coordinator adds"),
        ({}, {"privacy": {**TERMS, "mode": "local", "adaptive": {}}}, "adaptive contradicts mode: local"),
        ({}, {"privacy": {**TERMS, "mode": "local", "noise": 9000.0}}, "lower one of the three"),
        ({}, {"privacy": {**TERMS, "honest": 0.5}}, "honest 0.5 is for mode: distributed"),
        (
            SUMMED,
            {"privacy": {**TERMS, "mode": "distributed", "accountant": "pld"}},
            "accountant: pld cannot account for the noise of",
        ),
        (
            {"secure_aggregation": {"minimum_cohort": 2, "clip": 3.0}},
            {"privacy": {**TERMS, "mode": "distributed"}},
            "secure_aggregation.clip contradicts privacy",
        ),
        ({"example_privacy": {"epsilon": 8.0, "delta": DELTA, "noise": 1.0}}, {}, "privacy contradicts example_privacy"),
        (
            {"example_privacy": {"epsilon": 8.0, "delta": DELTA, "noise": 1.0}},
            {"privacy": None},
            "evaluation.clients with run.example_privacy",
        ),
        ({}, {"privacy": {**TERMS, "metrics": None}}, "evaluation.clients with run.privacy"),
        ({}, {"privacy": {**TERMS, "metrics": {"loss": [0, 1]}}}, "clients of task exact measure loss, mae: give one for each"),
        ({}, {"privacy": {**TERMS, "metrics": {"loss": [1, 0], "mae": [0, 1]}}}, "metrics.loss: 1 to 0 is no range"),
        ({}, {"privacy": {**TERMS, "epsilon": 0.1}}, "one round with noise 3 costs ε"),
        (
            {},
            {"privacy": {**TERMS, "sampling": "fixed", "accountant": "pld"}},
            "accountant: pld cannot account for sampling: fixed",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused_at_the_start(
    quick: Federation, run: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    configure(quick)
    content = yaml.safe_load(quick.config.read_text())
    quick.config.write_text(yaml.safe_dump(content | {"run": content["run"] | run | changes}))
    coordinator = quick.start_coordinator()
    assert coordinator.code() == 2
    assert told in coordinator.stderr
    assert "Traceback" not in coordinator.stderr


def test_features_without_known_bounds_are_not_measured(quick: Federation) -> None:
    configure(quick)
    quick.write_task(exact.EXACT_TASK, "exact")
    coordinator = quick.start_coordinator()
    assert coordinator.code() == 2
    assert "give the Task its `ranges`" in coordinator.stderr


def test_a_plan_is_what_the_coordinator_then_does(quick: Federation) -> None:
    planned = quick.command(
        "privacy", "plan", "--clients", 2, "--cohort", 2, "--rounds", 5, "--epsilon", 4, "--sampling", "none", "--json"
    )
    found = json.loads(planned.stdout)
    everybody = lambda noise: {Release(noise, Sampling.NONE, 2, 2): 5}  # noqa: E731
    assert found["noise"] == noise_for(4.0, DELTA, everybody)
    assert found["epsilon_models"] == found["epsilon_coordinator"] == epsilon(everybody(found["noise"]), DELTA) <= 4.0
