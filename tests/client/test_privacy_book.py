"""The book of what a device has lost: it is there before anything leaves, and stays."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from choral.errors import ConfigError, Declined
from choral.plan import ExamplePlan, Kind, Plan, PrivatePlan, SecurePlan, Training
from choral.privacy.accounting import Release, Sampling, epsilon
from choral.privacy.gaussian import epsilon_of, epsilon_of_integers
from choral.privacy.skellam import as_gaussian
from choral_client.guard_file import GuardFile
from choral_client.oversight import Oversight
from choral_client.privacy_book import CLIENT, EXAMPLE, NAME, Loss, PrivacyBook, losses_of
from choral_client.state_lock import alone_in

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
DELTA = 1e-5
TRAINING = Plan(Kind.TRAINING, "t", "1", Training(epochs=3, batch_size=4), 0, evaluate=False)
LOCAL = replace(TRAINING, private=PrivatePlan(2.0, 1, 1.0))
HIDING = ExamplePlan(1.5, 1.0, 8.0, DELTA)


def test_what_an_assignment_costs() -> None:
    secure = SecurePlan("run", 3, 4, 0.0, 1.0, 20, 32, 1)
    assert losses_of(TRAINING, 10) == ()
    assert losses_of(LOCAL, 10) == (Loss(CLIENT, 2.0),)
    assert losses_of(replace(LOCAL, secure=secure), 10) == (Loss(CLIENT, as_gaussian(2.0), whole=True),)
    examples = replace(TRAINING, examples=HIDING)
    assert losses_of(examples, 10) == (Loss(EXAMPLE, 1.5, False, 4, 10, 9),)
    assert losses_of(examples, 3) == (Loss(EXAMPLE, 1.5, False, 3, 3, 3),)
    assert losses_of(replace(examples, kind=Kind.STATISTICS), 10) == (Loss(EXAMPLE, 1.5),)
    assert losses_of(replace(examples, kind=Kind.EVALUATION), 10) == ()
    assert losses_of(replace(examples, training=Training(epochs=0)), 10) == ()


def test_it_adds_up_and_outlives_the_process(tmp_path: Path) -> None:
    for number in range(3):
        book = PrivacyBook(tmp_path)  # as after each restart
        assert book.epsilon(CLIENT, DELTA, losses_of(LOCAL, 1)) == pytest.approx(epsilon_of((number + 1) / 4, DELTA))
        book.charge(losses_of(LOCAL, 1), f"run/{number}/alice", NOON)
        assert book.epsilon(CLIENT, DELTA) == pytest.approx(epsilon_of((number + 1) / 4, DELTA))
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert [line["assignment"] for line in lines] == ["run/0/alice", "run/1/alice", "run/2/alice"]
    PrivacyBook(tmp_path).charge([Loss(CLIENT, 2.0, whole=True)], "a", NOON)
    assert PrivacyBook(tmp_path).epsilon(CLIENT, DELTA) == pytest.approx(epsilon_of_integers(1.0, DELTA))
    assert PrivacyBook(tmp_path).epsilon(EXAMPLE, DELTA) == 0.0


def test_examples_are_counted_as_they_were_drawn(tmp_path: Path) -> None:
    book, drawn = PrivacyBook(tmp_path), Loss(EXAMPLE, 1.1, False, 4, 100, 75)
    for number in range(2):
        book.charge([drawn], str(number), NOON)
    expected = epsilon({Release(1.1, Sampling.POISSON, 4, 100): 225}, DELTA)
    assert book.epsilon(EXAMPLE, DELTA, [drawn]) == pytest.approx(expected)
    assert PrivacyBook(tmp_path).epsilon(EXAMPLE, DELTA, [drawn]) == pytest.approx(expected)
    assert book.epsilon(EXAMPLE, DELTA) < epsilon({Release(1.1): 150}, DELTA)


def test_a_line_that_a_crash_has_cut_off_is_of_nothing_that_was_sent(tmp_path: Path) -> None:
    PrivacyBook(tmp_path).charge(losses_of(LOCAL, 1), "a", NOON)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes() + b'{"at": "2026-')
    book = PrivacyBook(tmp_path)
    assert len(book.losses()) == 1
    book.charge(losses_of(LOCAL, 1), "b", NOON)
    assert len(PrivacyBook(tmp_path).losses()) == 2
    path.write_bytes(b'{"at"')
    assert PrivacyBook(tmp_path).losses() == []


@pytest.mark.parametrize("content", [b"nonsense\n", b"{}\n", b'{"hidden": "client", "noise": -1}\n', b"[]\n", b"\xff\n"])
def test_what_cannot_be_read_is_not_taken_for_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(Declined, match=r"privacy.jsonl: how much privacy this device has lost cannot be read"):
        PrivacyBook(tmp_path).epsilon(CLIENT, DELTA)


def test_what_cannot_be_written_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(Declined, match=r"privacy.jsonl"):
        PrivacyBook(tmp_path).charge(losses_of(LOCAL, 1), "a", NOON)


def oversight(folder: Path, guard: str) -> Oversight:
    (folder / "guard.yaml").write_text(guard)
    return Oversight(GuardFile(folder), folder, now=lambda: NOON, examples=100)


def test_the_guard_caps_what_is_lost(tmp_path: Path) -> None:
    limit = (epsilon_of(2 / 4, DELTA) + epsilon_of(3 / 4, DELTA)) / 2
    watch = oversight(tmp_path, f"max_epsilon: {limit}\n")
    for number in range(2):
        watch.admit(LOCAL)
        watch.charge(LOCAL, str(number))
    with pytest.raises(Declined, match=r"allows no further loss of privacy \(max_epsilon\)"):
        watch.admit(LOCAL)
    with pytest.raises(Declined, match="max_epsilon"):
        watch.charge(LOCAL, "2")  # nor if the guard changed while it worked
    assert len(PrivacyBook(tmp_path).losses()) == 2
    with pytest.raises(Declined, match="the coordinator's word"):
        watch.admit(TRAINING)


def test_the_budget_of_examples_is_the_runs_and_the_owners(tmp_path: Path) -> None:
    asked = replace(TRAINING, examples=replace(HIDING, epsilon=epsilon({Release(1.5, Sampling.POISSON, 4, 100): 150}, DELTA)))
    watch = oversight(tmp_path, "{}\n")
    for number in range(2):
        watch.admit(asked)
        watch.charge(asked, str(number))
    with pytest.raises(Declined, match=r"the run allows this client's examples to lose ε .* \(run.example_privacy\)"):
        watch.admit(asked)
    strict = oversight(tmp_path, "max_example_epsilon: 0.01\n")
    with pytest.raises(Declined, match="max_example_epsilon"):
        strict.admit(asked)
    with pytest.raises(Declined, match=r"does not ask to hide it \(run.example_privacy\)"):
        strict.admit(LOCAL)


def test_one_client_at_a_time(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(ConfigError, match="another client runs with"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_a_result_that_was_paid_for_is_not_paid_for_twice_but_a_tighter_guard_keeps_it(tmp_path: Path) -> None:
    watch = oversight(tmp_path, f"max_epsilon: {epsilon_of(1 / 4, DELTA) * 1.01}\n")
    watch.admit(LOCAL)
    watch.charge(LOCAL, "a")
    watch.admit(LOCAL, paid=True)
    watch.permit_sending(False, (CLIENT,))
    with pytest.raises(Declined, match="max_epsilon"):
        oversight(tmp_path, "max_epsilon: 0.1\n").permit_sending(False, (CLIENT,))


@pytest.mark.parametrize("plan", [replace(TRAINING, evaluate=True), replace(TRAINING, kind=Kind.EVALUATION), replace(LOCAL)])
def test_what_is_measured_on_examples_hides_none_of_them(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(Declined, match=r"max_example_epsilon"):
        oversight(tmp_path, "max_example_epsilon: 9.0\n").admit(replace(plan, examples=HIDING))


def test_an_owner_counts_on_as_much_noise_as_it_says(tmp_path: Path) -> None:
    secure = SecurePlan("run", 4, 4, 0.0, 1.0, 20, 32, 1)
    watch = oversight(tmp_path, "{max_epsilon: 90.0, honest: 0.5}\n")
    watch.admit(replace(LOCAL, secure=secure, private=replace(LOCAL.private, clients=2)))  # type: ignore[type-var]
    with pytest.raises(
        Declined, match=r"noise that is divided among 3 clients of a sum of 4 or more; it allows at most 2 \(honest\)"
    ):
        watch.admit(replace(LOCAL, secure=secure, private=replace(LOCAL.private, clients=3)))  # type: ignore[type-var]
