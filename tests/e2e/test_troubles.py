"""What a coordinator needs is gone for a while: the run waits, says why, and ends with the bits of one that was not troubled."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e import exact
from e2e.federation import Federation, Process
from e2e.zygote import Zygote
from server.databases import Postgres
from server.disks import disk, fill
from server.object_store import ObjectStore, object_store

__all__ = ["object_store"]

ROUNDS = 4
STATISTICS = 1  # and the versions' numbers count it


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Any]:
    """What comes out when nothing is in the way."""
    return exact.undisturbed(tmp_path_factory.mktemp("calm"), zygote, ROUNDS)


@dataclass(frozen=True)
class Trouble:
    """What is gone, as the coordinator calls it; how it goes and comes back; and what the coordinator needs to use it."""

    subject: str
    go: Callable[[], object]
    come_back: Callable[[], object]
    settings: Mapping[str, Any]
    environment: Mapping[str, object]


@contextmanager
def no_database(request: pytest.FixtureRequest, federation: Federation) -> Iterator[Trouble]:
    server: Postgres = request.getfixturevalue("postgres")
    try:
        yield Trouble("database", lambda: server.stop("immediate"), server.start, {"database": server.new_database()}, {})
    finally:
        if not server.running:
            server.start()


@contextmanager
def no_object_store(request: pytest.FixtureRequest, federation: Federation) -> Iterator[Trouble]:
    store: ObjectStore = request.getfixturevalue("object_store")
    try:
        yield Trouble("artifacts", store.stop, store.start, {"artifacts": store.new_bucket()}, store.credentials())
    finally:
        if not store.running:
            store.start()


@contextmanager
def no_space(request: pytest.FixtureRequest, federation: Federation) -> Iterator[Trouble]:
    with disk(federation.folder / "state", 16 << 20) as folder:
        yield Trouble("disk", lambda: fill(folder), (folder / "ballast").unlink, {}, {})


@pytest.mark.parametrize("gone", [no_database, no_object_store, no_space])
def test_what_is_gone_for_a_while(gone: Any, request: pytest.FixtureRequest, quick: Federation, calm: dict[str, Any]) -> None:
    with gone(request, quick) as trouble:
        exact.configure(quick, ROUNDS, **trouble.settings)
        exact.pace(quick)
        gate = quick.folder / "gate"
        gate.write_text(str(2 * exact.BATCHES))
        coordinator = quick.start_coordinator(environment=trouble.environment)
        alice, bob = exact.start_client(quick, "alice", gate=gate), exact.start_client(quick, "bob")
        alice.saw("at the gate")
        before = (quick.versions / "latest.safetensors").readlink()
        trouble.go()
        gate.unlink()
        assert coordinator.saw("in trouble", subject=trouble.subject)["reason"]

        diagnosis = {row["subject"]: row for row in doctor(quick, 1)}
        assert not diagnosis[trouble.subject]["good"]
        assert diagnosis[trouble.subject]["cure"]
        assert (quick.versions / "latest.safetensors").readlink() == before  # nothing half-made is current
        assert not coordinator.events("round abandoned")

        trouble.come_back()
        coordinator.saw("trouble over", subject=trouble.subject)
        assert [process.code() for process in (coordinator, alice, bob)] == [0, 0, 0]
        assert not coordinator.events("round abandoned")
        assert models(exact.outcome(quick)) == models(calm)
    for process in quick.processes:
        assert "Traceback" not in process.stderr


def models(outcome: dict[str, Any]) -> dict[str, Any]:
    """Without the optimizer's state, of which an object store leaves no copy here."""
    return outcome | {"files": {name: digest for name, digest in outcome["files"].items() if "optimizer" not in name}}


def doctor(federation: Federation, code: int) -> list[dict[str, Any]]:
    """What `choral doctor` finds, with its exit code."""
    asked = federation.command("doctor", "-c", federation.config, "--json")
    assert asked.code() == code, asked.stderr + asked.stdout
    found: list[dict[str, Any]] = json.loads(asked.stdout)["findings"]
    return found


def test_no_round_begins_on_a_disk_that_could_not_take_it(quick: Federation) -> None:
    with disk(quick.folder / "state", 16 << 20) as folder:
        exact.configure(quick, ROUNDS)
        (folder / "ballast").write_bytes(bytes(15 << 20))
        coordinator = quick.start_coordinator()
        clients = [exact.start_client(quick, name) for name in exact.CLIENTS]
        coordinator.saw("in trouble", subject="disk")
        (finding,) = [row for row in doctor(quick, 1) if row["subject"] == "disk"]
        assert "MB are free where a round may need" in finding["found"]
        assert not coordinator.events("round done")
        (folder / "ballast").unlink()
        assert [process.code() for process in (coordinator, *clients)] == [0, 0, 0]


def test_of_two_coordinators_on_one_database_one_works(quick: Federation, postgres: Postgres, object_store: ObjectStore) -> None:
    shared = {"database": postgres.new_database(), "artifacts": object_store.new_bucket()}
    quick.configure(**shared, lease_s=1.0, exit_when_done=False)
    first = quick.start_coordinator(environment=object_store.credentials())
    first.saw("coordinator ready")
    second = quick.config.with_name("second.yaml")
    second.write_text(quick.config.read_text().replace("state: state", "state: state-2"))

    (quick.folder / "state-2").mkdir()
    for name in ("holder", "history.key"):  # a copy is another coordinator, which needs the key to go on with the history
        shutil.copy(quick.folder / "state" / name, quick.folder / "state-2" / name)
    refused = quick.start("second", "server", "-c", second, environment=object_store.credentials())
    assert refused.code() == 2
    assert "is in use by coordinator " in refused.stderr
    assert "stop that one, wait until it has been silent for so long, or give another database" in refused.stderr

    first.popen.send_signal(signal.SIGSTOP)  # as a machine that has lost its power or its network
    other = taken_over(quick, second, object_store.credentials())
    first.popen.send_signal(signal.SIGCONT)
    assert first.code() == 9
    assert first.err[-1].startswith("choral: another coordinator has taken over ")
    other.terminate()
    assert other.code() == 0


def taken_over(federation: Federation, config: Path, environment: Mapping[str, object]) -> Process:
    """The coordinator that works once the lease of the one before it has expired."""
    while True:
        started = federation.start("second", "server", "-c", config, "--log-format", "json", environment=environment)
        started.progress(1)
        if "coordinator ready" in started.stderr:
            return started
        assert started.code() == 2
        assert "whose lease lasts another" in started.stderr
