"""Noise that clients add themselves, over real processes: in a secure sum, alone, and on each step of the training."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from choral.privacy.accounting import Release, epsilon
from choral.privacy.gaussian import epsilon_of, epsilon_of_integers
from choral.privacy.skellam import as_gaussian
from choral_server import failpoints
from e2e import exact
from e2e.federation import Federation, Process
from e2e.test_privacy import DELTA, PRIVATE_TASK, TERMS, spendings
from safetensors.numpy import load_file

ROUNDS, NOISE = 3, 3.0
PAIR = {"secure_aggregation": {"minimum_cohort": 2}}
EXAMPLES = {"epsilon": 50.0, "delta": DELTA, "noise": 1.0}
LOSSES = ROUNDS + 2  # the statistics before, and a last measurement


def configure(federation: Federation, run: dict[str, Any], rounds: int = ROUNDS, **others: Any) -> None:
    """The exact task of two clients, whose guards allow a sum of two."""
    exact.configure(federation, rounds, run=run, **others)
    federation.write_task(PRIVATE_TASK, "exact")


def client(federation: Federation, name: str, guard: str = "min_cohort: 2\n") -> Process:
    folder = federation.folder / name / "client"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "guard.yaml").write_text(guard)
    return exact.start_client(federation, name)


def book(federation: Federation, name: str) -> list[dict[str, Any]]:
    """What a device has written of its losses."""
    return [json.loads(line) for line in (federation.folder / name / "client" / "privacy.jsonl").read_text().splitlines()]


def told(federation: Federation, name: str, *more: object) -> dict[str, Any]:
    """What `choral client privacy` says."""
    asked = federation.command("client", "privacy", "--state", federation.folder / name / "client", "--json", *more)
    assert asked.code() == 0, asked.stderr
    found: dict[str, Any] = json.loads(asked.stdout)
    return found


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_both_count_what_the_devices_have_lost(quick: Federation, mode: str) -> None:
    configure(quick, {"privacy": TERMS | {"mode": mode}} | (PAIR if mode == "distributed" else {}), exit_when_done=False)
    coordinator = quick.start_coordinator()
    both = [client(quick, name, f"min_cohort: 2\nmax_epsilon: 20\ndelta: {DELTA:f}\n") for name in exact.CLIENTS]
    over = coordinator.saw("run over")
    assert over["state"] == "finished", over
    found = spendings(quick)
    assert {one["state"] for one in found["spendings"]} == {"spent"}
    assert {one["mode"] for one in found["spendings"]} == {mode}
    assert len(found["spendings"]) == LOSSES
    noise, whole = (as_gaussian(NOISE), True) if mode == "distributed" else (NOISE, False)
    assert found["budget"]["epsilon_models"] == pytest.approx(epsilon({Release(noise, whole=whole): LOSSES}, DELTA))
    for name in exact.CLIENTS:
        assert [(one["hidden"], one["noise"], one["whole"]) for one in book(quick, name)] == [("client", noise, whole)] * LOSSES
        count = epsilon_of_integers if whole else epsilon_of
        assert told(quick, name, "--delta", DELTA)["client"]["epsilon"] == pytest.approx(count(LOSSES * noise**-2, DELTA))
    versions = [load_file(quick.versions / f"{number:06}.safetensors") for number in range(1, ROUNDS + 2)]
    for before, after in pairwise(versions):
        assert any(not np.array_equal(before[key], after[key]) for key in before), "noise moves every version"
        assert all(np.isfinite(tensor).all() for tensor in after.values())
    parts = [part for round in quick.rows("rounds", "list") for part in round.get("parts", [])]
    assert not any(part.get("work") for part in parts)
    coordinator.terminate()
    assert coordinator.code() == 0
    for process in both:
        assert not process.events("work failed")


def test_a_device_that_has_lost_what_its_owner_allows_says_no(quick: Federation) -> None:
    """Enough for two results; a restart of the device does not begin anew."""
    limit = (epsilon_of(2 * NOISE**-2, DELTA) + epsilon_of(3 * NOISE**-2, DELTA)) / 2
    configure(quick, {"privacy": TERMS | {"mode": "local"}, "max_abandoned": 1}, 9, exit_when_done=False)
    coordinator = quick.start_coordinator()
    guard = f"max_epsilon: {limit}\ndelta: {DELTA:f}\n"
    alice, _ = [client(quick, name, guard) for name in exact.CLIENTS]
    declined = alice.saw("declined")
    assert "this device's guard allows no further loss of privacy (max_epsilon)" in declined["reason"]
    assert alice.saw("no privacy is left")["allowed"] == pytest.approx(limit)
    assert len(book(quick, "alice")) == 2
    coordinator.saw("run over", state="failed")
    alice.kill()
    again = client(quick, "alice", guard)
    again.saw("attending")
    with_room = quick.command("runs", "resume", "-c", quick.config)
    assert with_room.code() == 0, with_room.stderr
    assert "max_epsilon" in again.saw("declined")["reason"]
    assert len(book(quick, "alice")) == 2


def test_two_clients_do_not_share_a_state_folder(quick: Federation) -> None:
    configure(quick, {"start_with": 3})
    quick.start_coordinator()
    client(quick, "alice").saw("attending")
    second = exact.start_client(quick, "alice")
    assert second.code() == 2
    assert "another client runs with" in second.stderr


@pytest.mark.parametrize("secure", [False, True])
def test_single_examples_are_hidden(quick: Federation, secure: bool) -> None:
    configure(quick, {"example_privacy": EXAMPLES} | (PAIR if secure else {}), evaluation={"clients": False})
    processes = [quick.start_coordinator(), *(client(quick, name) for name in exact.CLIENTS)]
    assert [process.code() for process in processes] == [0, 0, 0]
    losses = book(quick, "alice")
    size, batch = 4, 2  # of six, two are held out
    assert [(one["hidden"], one["noise"], one["expected"], one["population"], one["steps"]) for one in losses] == [
        ("example", 1.0, 1, 1, 1),  # the statistics
        *[("example", 1.0, batch, size, size // batch)] * ROUNDS,
    ]
    assert told(quick, "alice", "--delta", DELTA)["example"]["epsilon"] <= EXAMPLES["epsilon"]


def test_the_budget_of_examples_is_kept(quick: Federation) -> None:
    configure(quick, {"example_privacy": EXAMPLES | {"epsilon": 9.0}, "max_abandoned": 1}, 99, evaluation={"clients": False})
    coordinator = quick.start_coordinator()
    clients = [client(quick, name) for name in exact.CLIENTS]
    over = coordinator.saw("run over", state="failed")
    assert "the run allows this client's examples to lose ε 9 (run.example_privacy), and this round would make it" in over["reason"]
    lost = [told(quick, name, "--delta", DELTA)["example"]["epsilon"] for name in exact.CLIENTS]
    assert 0 < max(lost) <= 9
    assert any(process.events("declined") for process in clients)


def test_a_crash_in_the_middle_of_a_sum_is_paid_for(quick: Federation) -> None:
    """What had arrived when the coordinator died is spent, as the devices have it; the round is made anew, and costs again."""
    configure(quick, {"privacy": TERMS | {"mode": "distributed"}} | PAIR, exit_when_done=False)
    doomed = quick.start_coordinator(environment={failpoints.VARIABLE: "upload-folded#5"})
    for name in exact.CLIENTS:
        client(quick, name)
    doomed.code()
    again = quick.start_coordinator()
    assert again.saw("run over")["state"] == "finished"
    found, losses = spendings(quick), book(quick, "alice")
    assert len(losses) >= LOSSES
    paid = [one for one in found["spendings"] if one["state"] == "spent"]
    assert len(paid) >= LOSSES
    again.terminate()
    assert again.code() == 0
