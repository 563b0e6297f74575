"""The guard's decisions, key by key on both sides of each bound; its file; the day's work; work that is watched."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from choral.address import HostPort
from choral.config import parse
from choral.errors import ConfigError, Declined, TaskError
from choral.plan import Kind, Plan, SecurePlan, Training
from choral_client.day_book import DayBook
from choral_client.guard import Guard, IPAddress, Window, address_towards
from choral_client.guard_file import GuardFile
from choral_client.masking import Floor
from choral_client.oversight import Oversight
from choral_client.train import Stopped
from client.authorities import Authority

PATIENCE_S = 60.0
NOON = datetime(2026, 11, 25, 12, 0)
HOME = ipaddress.ip_address("192.168.1.7")
SECURE = SecurePlan("run/1", 3, 10, 0.0, 8.0, 24, 32, 4096)


def guard(**keys: Any) -> Guard:
    return parse(keys, Guard, "guard.yaml")


def plan(kind: Kind = Kind.TRAINING, epochs: int = 1, cohort: int = 10, task: str = "small", version: str = "1") -> Plan:
    return Plan(kind, task, version, Training(epochs=epochs), 0, evaluate=False, cohort=cohort)


def at(time: str) -> datetime:
    return datetime.combine(NOON, datetime.strptime(time, "%H:%M").time())


# Decisions


@pytest.mark.parametrize("kind", Kind)
def test_what_is_not_given_is_not_limited(kind: Kind) -> None:
    guard().check(plan(kind, epochs=100_000, cohort=0, task="any"), NOON, None)


@pytest.mark.parametrize(
    ("keys", "allowed", "refused", "reason"),
    [
        ({"tasks": {"small": ["1", "2"]}}, plan(version="2"), plan(version="3"), "allow task small 3; it allows small 1, small 2"),
        ({"tasks": {"small": ["1"]}}, plan(), plan(task="other"), "does not allow task other 1; it allows small 1 (tasks)"),
        ({"tasks": {"small": []}}, None, plan(), "does not allow task small 1; it allows no task (tasks)"),
        ({"max_epochs": 5}, plan(epochs=5), plan(epochs=6), "does not allow 6 epochs; it allows at most 5 (max_epochs)"),
        ({"max_epochs": 0}, plan(epochs=0), plan(epochs=1), "does not allow 1 epochs; it allows at most 0 (max_epochs)"),
        ({"max_epochs": 5}, plan(Kind.EVALUATION, epochs=6), None, ""),  # it trains nothing
        ({"max_epochs": 5}, plan(Kind.STATISTICS, epochs=6), None, ""),
        ({"min_cohort": 10}, plan(cohort=10), plan(cohort=9), "allow a cohort of 9; it allows at least 10 (min_cohort)"),
        ({"min_cohort": 1}, plan(cohort=1), plan(cohort=0), "allow a cohort of 0; it allows at least 1 (min_cohort)"),
        ({"secure_aggregation": False}, plan(), None, ""),
    ],
)
def test_a_plan_on_both_sides_of_a_bound(keys: dict[str, Any], allowed: Plan | None, refused: Plan | None, reason: str) -> None:
    if allowed is not None:
        guard(**keys).check(allowed, NOON, HOME)
    if refused is not None:
        with pytest.raises(Declined, match=re.escape(reason)):
            guard(**keys).check(refused, NOON, HOME)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    ("keys", "hidden", "reason"),
    [
        (
            {"max_epsilon": 8.0},
            "client",
            r"bounds the privacy that may be lost \(max_epsilon: 8\), and the coordinator does not ask for",
        ),
        (
            {"max_epsilon": 1.0e300},
            "client",
            "noise that the coordinator adds is the coordinator's word",
        ),  # however much may be lost
        ({"max_example_epsilon": 8.0}, "example", r"bounds what may be lost of a single example \(max_example_epsilon: 8\)"),
    ],
)
def test_what_has_no_noise_of_this_device_does_not_leave(kind: Kind, keys: dict[str, Any], hidden: str, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        guard(**keys).check(plan(kind), NOON, HOME)
    with pytest.raises(Declined, match=reason):
        guard(**keys).check_sending(NOON, HOME, masked=True)
    guard(**keys).check_sending(NOON, HOME, masked=True, hidden={hidden})
    guard(**keys).check_conditions(NOON, HOME)  # a version may still be fetched


@pytest.mark.parametrize("kind", Kind)
def test_a_device_that_shows_only_sums_sends_nothing_else_whatever_it_is(kind: Kind) -> None:
    asks, reason = guard(secure_aggregation=True), r"requires secure_aggregation, and the coordinator does not ask for it \(run\."
    with pytest.raises(Declined, match=reason):
        asks.check(plan(kind), NOON, HOME)
    with pytest.raises(Declined, match=reason):
        asks.check_sending(NOON, HOME, masked=False)
    asks.check(replace(plan(kind), secure=SECURE), NOON, HOME)
    asks.check_sending(NOON, HOME, masked=True)
    asks.check_conditions(NOON, HOME)
    guard().check_sending(NOON, HOME, masked=False)


@pytest.mark.parametrize(
    ("keys", "asked", "least"),
    [
        ({}, 2, 3),  # of two, each knows the other's
        ({}, 7, 7),
        ({"min_cohort": 2}, 2, 2),
        ({"min_cohort": 1}, 1, 2),  # the sum of one is its update
        ({"min_cohort": 5}, 3, 5),
    ],
)
def test_how_many_must_be_in_a_sum(keys: dict[str, Any], asked: int, least: int) -> None:
    assert guard(**keys).floor(replace(SECURE, least_clients=asked)) == Floor(least, 0.0)


def test_what_share_of_the_holders_must_reveal() -> None:
    assert guard(min_threshold=0.8).floor(SECURE) == Floor(3, 0.8)


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        (["09:00-17:00"], ["09:00", "12:30", "16:59"], ["08:59", "17:00", "00:00"]),
        (["22:00-06:00"], ["22:00", "23:59", "00:00", "05:59"], ["06:00", "21:59", "12:00"]),
        (["00:00-24:00"], ["00:00", "12:00", "23:59"], []),
        (["22:00-24:00", "05:30-06:00"], ["22:00", "23:59", "05:30"], ["00:00", "05:29", "06:00"]),
        ([], [], ["00:00", "12:00"]),
    ],
)
def test_hours(hours: list[str], inside: list[str], outside: list[str]) -> None:
    for time in inside:
        guard(hours=hours).check(plan(), at(time), HOME)
    for time in outside:
        told = re.escape(f"work at {time}; it allows {', '.join(hours) or 'no time of day'} (hours)")
        for check in (guard(hours=hours).check_conditions, partial(guard(hours=hours).check_sending, masked=True)):
            with pytest.raises(Declined, match=told):
                check(at(time), HOME)


@pytest.mark.parametrize(
    ("networks", "inside", "outside"),
    [
        (["192.168.1.0/24"], ["192.168.1.0", "192.168.1.255"], ["192.168.0.255", "192.168.2.0", "fd00::1"]),
        (["10.0.0.5/32", "fd00::/8"], ["10.0.0.5", "fdff::1"], ["10.0.0.6", "fe80::1"]),
        ([], [], ["127.0.0.1"]),
    ],
)
def test_networks(networks: list[str], inside: list[str], outside: list[str]) -> None:
    for address in inside:
        guard(networks=networks).check(plan(), NOON, ipaddress.ip_address(address))
    for address in outside:
        told = re.escape(f"work from {address}; it allows {', '.join(networks) or 'no network'} (networks)")
        for check in (guard(networks=networks).check_conditions, partial(guard(networks=networks).check_sending, masked=True)):
            with pytest.raises(Declined, match=told):
                check(NOON, ipaddress.ip_address(address))
    with pytest.raises(Declined, match="work without a way to the coordinator"):
        guard(networks=networks).check(plan(), NOON, None)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"max_epoch": 5}, "guard.yaml: max_epoch: unknown key; did you mean max_epochs?"),
        ({"max_epochs": -1}, "guard.yaml: max_epochs: -1 is not allowed"),
        ({"max_epochs": "5"}, "guard.yaml: max_epochs: '5' is not allowed"),
        ({"max_work_s": 0}, "guard.yaml: max_work_s: 0 is not allowed"),
        ({"max_work_s": float("inf")}, "guard.yaml: max_work_s: inf is not allowed"),
        ({"max_work_s_per_day": 86_401}, "guard.yaml: max_work_s_per_day: 86401 is not allowed"),
        ({"min_cohort": 0}, "guard.yaml: min_cohort: 0 is not allowed"),
        ({"secure_aggregation": "yes"}, "guard.yaml: secure_aggregation: 'yes' is not allowed"),
        ({"max_epsilon": 0}, "guard.yaml: max_epsilon: 0 is not allowed"),
        ({"tasks": ["small"]}, "guard.yaml: tasks: a list is not allowed"),
        ({"tasks": {"small": [1]}}, "guard.yaml: tasks.small.0: 1 is not allowed"),
        ({"hours": ["22-06"]}, "is no span of a day; write it in quotes"),
        ({"hours": ["24:00-06:00"]}, "is no span of a day"),
        ({"hours": ["22:60-06:00"]}, "is no span of a day"),
        ({"hours": ["22:00-24:01"]}, "is no span of a day"),
        ({"hours": ["06:00-06:00"]}, "begins when it ends; leave hours out to allow the whole day"),
        ({"hours": [1320]}, 'write it in quotes as "HH:MM-HH:MM"'),
        ({"networks": ["home"]}, "write a network as 192.168.1.0/24 or fd00::/8"),
        ({"networks": ["192.168.1.7/24"]}, "192.168.1.7/24 has host bits set"),
        ({"networks": [10]}, "write a network as 192.168.1.0/24"),
        ({"clients": ["bob"]}, "guard.yaml: clients: a list is not allowed"),
        ({"clients": {"bob": "ab"}}, "clients.bob: 'ab' is not allowed: a fingerprint is 64 hexadecimal digits: copy what"),
        ({"clients": {"bob": 7}}, "clients.bob: 7 is not allowed: write the fingerprint as text"),
        ({"clients": {"bob": "ed25519:" + "ab" * 32}}, "this is a key, not its fingerprint"),
        ({"clients": {"../bob": "ab" * 32}}, "guard.yaml: clients.../bob"),
        ({"authority": 7}, "guard.yaml: authority: 7 is not allowed"),
        ({"authority": "ca.pem", "clients": {}}, "guard.yaml: clients contradicts authority"),
    ],
)
def test_what_no_guard_can_say(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        guard(**keys)


def test_fingerprints_are_kept_as_they_are_compared() -> None:
    for text in ("ab" * 32, "AB" * 32, "sha256:" + "ab" * 32):
        assert guard(clients={"bob": text}).clients == {"bob": "ab" * 32}


def test_a_window_is_shown_as_it_was_written() -> None:
    for text in ("22:00-06:00", "00:05-24:00"):
        assert str(Window.parse(text)) == text


def test_the_address_on_the_way_to_the_coordinator() -> None:
    assert str(address_towards(HostPort("127.0.0.1", 8470))) == "127.0.0.1"
    assert address_towards(HostPort("no-such-host.invalid", 8470)) is None


def test_asking_for_the_address_sends_nothing() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", 0))
        there.setblocking(False)
        address_towards(HostPort("127.0.0.1", there.getsockname()[1]))
        with pytest.raises(BlockingIOError):
            there.recv(1)


UNSAID = {"max_epsilon", "max_example_epsilon", "honest", "delta", "authority"}
"""what the example has as comments"""


def test_the_example_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guard.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    assert set(yaml.safe_load(example[1])) == set(Guard.model_fields) - UNSAID
    guard(**yaml.safe_load(example[1])).check(
        replace(plan(task="boston_housing"), secure=SECURE), at("23:00"), ipaddress.ip_address("192.168.178.20")
    )


# The file


def epochs_of(file: GuardFile) -> int | None:
    return file.current().max_epochs


@pytest.mark.parametrize("named", [True, False])
def test_the_file_is_read_anew_when_it_changes(tmp_path: Path, named: bool) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text("max_epochs: 5")
    file = GuardFile(tmp_path if not named else tmp_path / "state", path if named else None)
    assert epochs_of(file) == 5
    path.write_text("max_epochs: 6")  # of the same length, perhaps at the same time
    assert epochs_of(file) == 6


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_is_broken_or_gone_allows_nothing_until_it_is_mended(tmp_path: Path, named: bool) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text("max_epochs: 5")
    file = GuardFile(tmp_path if not named else tmp_path / "state", path if named else None)
    for content, told in [
        ("max_epochs: many", "max_epochs: 'many' is not allowed"),
        ("", "holds nothing"),
        ("]", "is not valid YAML"),
        (None, r"cannot be read \(No such file or directory\): put the guard back, or start without one"),
    ]:
        path.unlink() if content is None else path.write_text(content)
        for _ in range(2):
            with pytest.raises(Declined, match=f"this device's guard cannot be used, so nothing is done: {path}: .*{told}"):
                file.current()
    path.write_text("max_epochs: 5")
    assert epochs_of(file) == 5


def test_a_file_that_comes_later_counts_from_then_on(tmp_path: Path) -> None:
    file = GuardFile(tmp_path)
    assert file.current() == Guard()
    (tmp_path / "guard.yaml").write_text("max_epochs: 5")
    assert epochs_of(file) == 5
    (tmp_path / "guard.yaml").unlink()
    with pytest.raises(Declined, match="put the guard back"):
        file.current()


def test_it_does_not_start_with_a_guard_that_it_cannot_keep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read"):
        GuardFile(tmp_path, tmp_path / "missing.yaml")
    (tmp_path / "guard.yaml").write_text("max_epoch: 5")
    with pytest.raises(ConfigError, match=r"guard\.yaml: max_epoch: unknown key"):
        GuardFile(tmp_path)


def test_the_path_of_an_authority_counts_from_the_guards_folder(tmp_path: Path) -> None:
    (tmp_path / "guard.yaml").write_text("authority: pki/their.pem")
    with pytest.raises(ConfigError, match=r"guard\.yaml: authority: .*/pki/their\.pem cannot be read"):
        GuardFile(tmp_path)
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki" / "their.pem").write_bytes(Authority.made().certificate)
    file = GuardFile(tmp_path)
    assert file.current().authority == tmp_path / "pki" / "their.pem"
    (tmp_path / "pki" / "other.pem").write_text("nonsense")
    (tmp_path / "guard.yaml").write_text(f"authority: {tmp_path}/pki/other.pem")
    with pytest.raises(Declined, match=r"authority: .*/pki/other\.pem holds no certificate in PEM form"):
        file.current()


# The day's work


def test_the_day_is_counted_across_restarts_and_begins_anew(tmp_path: Path) -> None:
    today, tomorrow = date(2026, 11, 25), date(2026, 11, 26)
    assert DayBook(tmp_path).worked_s(today) == 0.0
    DayBook(tmp_path).add(today, 2.5)
    DayBook(tmp_path).add(today, 1.5)
    assert DayBook(tmp_path).worked_s(today) == 4.0
    DayBook(tmp_path).add(today, -1.0)
    assert DayBook(tmp_path).worked_s(today) == 3.0
    assert DayBook(tmp_path).worked_s(tomorrow) == 0.0
    DayBook(tmp_path).add(tomorrow, -1.0)  # booked before midnight, given back after it
    assert DayBook(tmp_path).worked_s(tomorrow) == 0.0


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "[" * 100_000),
        *(f'{{"day": "2026-11-25", "worked_s": {value}}}' for value in ('"x"', "NaN", "9" * 400)),
    ],
)
def test_a_damaged_book_allows_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "work.json").write_text(content)
    with pytest.raises(Declined, match=r"work\.json: what this device has worked today cannot be read .*: remove the file"):
        DayBook(tmp_path).worked_s(date(2026, 11, 25))


def test_a_book_that_cannot_be_written_allows_nothing(tmp_path: Path) -> None:
    (tmp_path / ".work.json.aside").mkdir()
    with pytest.raises(Declined, match=r"work\.json: work cannot be written down .*: make room there"):
        DayBook(tmp_path).add(date(2026, 11, 25), 1.0)


# Work that is watched


def oversight(
    folder: Path,
    now: Callable[[], datetime] = lambda: NOON,
    address: Callable[[], IPAddress | None] = lambda: HOME,
    **keys: Any,
) -> Oversight:
    (folder / "guard.yaml").write_text(yaml.safe_dump(keys))
    return Oversight(GuardFile(folder), folder, address, now, tick_s=0.001)


def do(watched: Oversight, work: Callable[[threading.Event], None]) -> None:
    """Work under a guard."""
    stop = threading.Event()
    with watched.watching(plan(), stop):
        work(stop)


def until_stopped(stop: threading.Event) -> None:
    assert stop.wait(PATIENCE_S)
    raise Stopped


def heedless(stop: threading.Event) -> None:
    """Is told to stop, and goes on to its end."""
    assert stop.wait(PATIENCE_S)


def withdrawn(stop: threading.Event) -> None:
    raise Stopped


def failing(stop: threading.Event) -> None:
    raise TaskError("loss raised")


def test_work_within_its_time_is_not_disturbed(tmp_path: Path) -> None:
    stop = threading.Event()
    with oversight(tmp_path, max_work_s=3600.0, max_work_s_per_day=86_400.0).watching(plan(), stop):
        pass
    assert not stop.is_set()


def test_work_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(Declined, match=r"the work took longer than the 0\.05 s that this device's guard allows \(max_work_s\)"):
        do(oversight(tmp_path, max_work_s=0.05), until_stopped)


def test_work_that_cannot_be_stopped_is_declined_when_it_is_done(tmp_path: Path) -> None:
    with pytest.raises(Declined, match="the work took longer"):
        do(oversight(tmp_path, max_work_s=0.05), heedless)


def test_work_that_is_withdrawn_is_not_declined(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        do(oversight(tmp_path, max_work_s=3600.0), withdrawn)


def test_a_day_has_so_many_seconds_whatever_is_restarted(tmp_path: Path) -> None:
    told = r"this device's guard allows 0\.05 s of work a day \(max_work_s_per_day\), and they are used up for today"
    with pytest.raises(Declined, match=told):
        do(oversight(tmp_path, max_work_s_per_day=0.05), until_stopped)
    restarted = oversight(tmp_path, max_work_s_per_day=0.05)
    with pytest.raises(Declined, match=told):
        restarted.admit(plan())
    oversight(tmp_path, now=lambda: NOON + timedelta(days=1), max_work_s_per_day=0.05).admit(plan())


def test_time_is_booked_ahead_and_what_is_left_given_back(tmp_path: Path) -> None:
    watched = oversight(tmp_path, max_work_s_per_day=1000.0)
    watched._tick_s = 600.0
    with watched.watching(plan(), threading.Event()):
        assert (
            json.loads((tmp_path / "work.json").read_text())["worked_s"] >= 600.0
        )  # so much a client that is killed here has worked
    assert 0 < json.loads((tmp_path / "work.json").read_text())["worked_s"] < 600.0


def test_work_whose_code_fails_is_counted_and_its_error_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError):
        do(oversight(tmp_path, max_work_s_per_day=1000.0), failing)
    assert json.loads((tmp_path / "work.json").read_text())["worked_s"] > 0


def test_work_ends_with_its_hours(tmp_path: Path) -> None:
    times = iter([at("05:59")])
    with pytest.raises(Declined, match=r"does not allow work at 06:00; it allows 22:00-06:00 \(hours\)"):
        do(oversight(tmp_path, now=lambda: next(times, at("06:00")), hours=["22:00-06:00"]), until_stopped)


def test_work_ends_with_its_network(tmp_path: Path) -> None:
    places = iter([HOME])
    abroad = ipaddress.ip_address("100.64.0.1")
    with pytest.raises(Declined, match=r"does not allow work from 100\.64\.0\.1; it allows 192\.168\.1\.0/24 \(networks\)"):
        do(oversight(tmp_path, address=lambda: next(places, abroad), networks=["192.168.1.0/24"]), until_stopped)


def test_work_ends_when_its_owner_says_so(tmp_path: Path) -> None:
    def edited(stop: threading.Event) -> None:
        (tmp_path / "guard.yaml").write_text("max_epochs: 0")
        until_stopped(stop)

    with pytest.raises(Declined, match="does not allow 1 epochs"):
        do(oversight(tmp_path), edited)


def test_a_guard_that_fails_allows_nothing(tmp_path: Path) -> None:
    def broken() -> datetime:
        if threading.current_thread() is threading.main_thread():
            return NOON
        raise RuntimeError("no clock")

    with pytest.raises(Declined, match=r"this device's guard failed \(RuntimeError: no clock\), so nothing is done"):
        do(oversight(tmp_path, now=broken), until_stopped)


def test_the_address_is_asked_for_only_if_it_matters(tmp_path: Path) -> None:
    def never() -> None:
        raise AssertionError("it resolves a name")

    watched = oversight(tmp_path, address=never)
    watched.admit(plan())
    watched.permit_sending(masked=False)
    watched.permit_fetching()
