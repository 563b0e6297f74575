"""The images and compose.yaml, built and run on a real engine: the one that `docker` finds, by DOCKER_HOST if that is set."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from choral_server.config import load

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "deploy" / "compose.yaml"
CLIENTS = ("alice", "bob")
ROUNDS = 30
USER = "10001"
PATIENCE_S = 180
BUILD_S = 1800
ENVIRONMENT = os.environ | {"CHORAL_TAG": "test"}  # the tags of whoever works here stay where they are
SITE = "/opt/choral/lib/python3.11/site-packages"


def run(*command: str | Path, timeout: float = PATIENCE_S) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-8000:]}"
    return done.stdout


def works(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True, timeout=60).returncode == 0


@pytest.fixture(scope="module")
def compose() -> tuple[str, ...]:
    """The compose command of the engine, which answers."""
    known = [("docker", "compose"), ("docker-compose",)]
    found = next((command for command in known if works(*command, "version")), None)
    missing = "no container engine answers `docker info`; start one, set DOCKER_HOST" if not works("docker", "info") else None
    missing = missing or ("neither `docker compose` nor docker-compose is installed" if found is None else None)
    if missing and os.environ.get("CHORAL_REQUIRE_ALL") == "1":
        pytest.fail(missing)
    if missing or found is None:
        pytest.skip(str(missing))
    return found


@pytest.fixture(scope="module")
def images(compose: tuple[str, ...]) -> dict[str, str]:
    """Tags of the two images, just built."""
    run(*compose, "-f", str(COMPOSE), "build", timeout=BUILD_S)
    return {name: f"choral-{name}:{ENVIRONMENT['CHORAL_TAG']}" for name in ("client", "coordinator")}


class Project:
    """compose.yaml under a name of its own."""

    def __init__(self, compose: tuple[str, ...]) -> None:
        self._compose = (*compose, "-p", f"choral-test-{secrets.token_hex(4)}", "-f", str(COMPOSE))

    def __call__(self, *arguments: str) -> str:
        return run(*self._compose, *arguments)

    def container(self, service: str) -> str:
        """Its id, whether it still runs or not."""
        return self("ps", "-aq", service).strip()

    def inspect(self, service: str) -> dict:
        return json.loads(run("docker", "inspect", self.container(service)))[0]

    def execute(self, service: str, *command: str) -> str:
        return run("docker", "exec", self.container(service), *command)

    def logs(self, service: str) -> str:
        return run("docker", "logs", self.container(service))

    def ended(self, service: str) -> int:
        """Wait for its end; the exit code."""
        return int(run("docker", "wait", self.container(service)))

    def wait_for(self, service: str, text: str) -> None:
        """Return once a line that this start of the service logs contains `text`."""
        since = self.inspect(service)["State"]["StartedAt"]
        seen = first_with(text, "docker", "logs", "--follow", "--since", since, self.container(service))
        assert seen, f"{service} never said {text!r}:\n{self.logs(service)[-8000:]}"

    def wait_until_healthy(self, service: str) -> None:
        container = self.container(service)
        since = self.inspect(service)["Created"]
        events = ("docker", "events", "--since", since, "--filter", f"container={container}", "--filter", "event=health_status")
        assert first_with("health_status: healthy", *events), self.inspect(service)["State"]["Health"]


def first_with(text: str, *command: str) -> bool:
    """Whether a line of the command's output contains `text`; the command is ended at the first that does, or after a while."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT) as process:
        alarm = threading.Timer(PATIENCE_S, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            return any(text in line for line in process.stdout)
        finally:
            alarm.cancel()
            process.kill()


@pytest.fixture
def project(compose: tuple[str, ...], images: dict[str, str]) -> Iterator[Project]:
    started = Project(compose)
    try:
        yield started
    finally:
        started("down", "--volumes", "--timeout", "2")


def test_the_compose_file_follows_the_specification() -> None:
    check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")
    run(*check, COMPOSE)


def test_this_compose_accepts_the_file(compose: tuple[str, ...]) -> None:
    run(*compose, "-f", str(COMPOSE), "config", "--quiet")


def test_the_coordinators_configuration_is_one_that_a_killed_client_does_not_stop() -> None:
    config = load(COMPOSE.parent / "compose" / "choral.yaml")
    assert (config.run.rounds, config.run.cohort_size, config.run.quorum, config.run.start_with) == (ROUNDS, 2, 1, 2)
    assert config.exit_when_done


def test_neither_image_holds_the_code_of_the_other(images: dict[str, str]) -> None:
    packages = {name: run("docker", "run", "--rm", "--entrypoint", "ls", tag, SITE).split() for name, tag in images.items()}
    here = {name: {package for package in found if package.startswith("choral_")} for name, found in packages.items()}
    assert here == {"client": {"choral_client", "choral_deploy"}, "coordinator": {"choral_server", "choral_deploy"}}


def test_commands_whose_code_is_absent_are_not_offered(images: dict[str, str]) -> None:
    offered = {name: run("docker", "run", "--rm", tag, "--help") for name, tag in images.items()}
    theirs = {"client": {"client"}, "coordinator": {"server", "runs", "rounds", "clients", "versions"}}
    every = {"demo"} | theirs["client"] | theirs["coordinator"]
    for name, text in offered.items():
        commands = {line.split()[1] for line in text.splitlines() if line.startswith("│ ") and line[2] != " "}
        assert commands & every == theirs[name]


def test_images_start_as_an_unprivileged_user_and_hold_no_tools_of_the_build(images: dict[str, str]) -> None:
    for tag in images.values():
        assert run("docker", "run", "--rm", "--entrypoint", "id", tag, "-u").strip() == USER
        look = "import importlib.util as u; print([name for name in ('pip', 'hatchling', 'matplotlib') if u.find_spec(name)])"
        assert run("docker", "run", "--rm", "--entrypoint", "python", tag, "-c", look).strip() == "[]"


def test_up_trains_to_the_end_and_each_client_sees_only_its_own_shard(project: Project) -> None:
    project("up", "--detach")
    project.wait_for("coordinator", f"rounds=1/{ROUNDS}")
    operate = ("choral", "runs", "--config", "/etc/choral/choral.yaml")
    project.execute("coordinator", *operate[:2], "pause", *operate[2:])  # or it might be over while we look around

    assert "serving" in project.execute("coordinator", "choral", "server", "health", "--config", "/etc/choral/choral.yaml")
    for service in ("coordinator", *CLIENTS):
        project.wait_until_healthy(service)
        assert project.execute(service, "id", "-u").strip() == USER
        assert project.inspect(service)["NetworkSettings"]["Ports"] in (
            {},
            {"8470/tcp": None, "8471/tcp": None},
        )  # nothing is published
    rows = {}
    for client in CLIENTS:
        find = (
            r"find / \( -path /proc -o -path /sys \) -prune -o \( -name '*.csv' -o -name '*.key' -o -name choral_server \) -print"
        )
        look = f"{find} 2>&1 | grep -v 'Permission denied'; echo; ls /etc/choral; echo; cat /data/shard.csv"
        found, mounted, shard = project.execute(client, "sh", "-c", look).split("\n\n")
        own = {"/data/shard.csv", "/var/lib/choral/identity/tls.key", "/var/lib/choral/identity/signing.key"}
        assert (set(found.split()), mounted.split()) == (own, ["token"])
        rows[client] = set(shard.splitlines()[1:])
        writable = {mount["Destination"]: mount["RW"] for mount in project.inspect(client)["Mounts"] if mount["Type"] == "volume"}
        assert writable == {"/data": False, "/etc/choral": False, "/var/lib/choral": True}
    assert [len(rows[client]) for client in CLIENTS] == [202, 202]
    assert not rows["alice"] & rows["bob"]

    project.execute("coordinator", *operate[:2], "resume", *operate[2:])
    assert {service: project.ended(service) for service in ("setup", "invite", "coordinator", *CLIENTS)} == {
        "setup": 0,
        "invite": 0,
        "coordinator": 0,
        "alice": 0,
        "bob": 0,
    }
    assert f"rounds={ROUNDS}/{ROUNDS}" in project("logs", "--no-color", "coordinator")
    assert "run=boston state=finished" in project.logs("coordinator")

    project("up", "--detach")  # a run that is over stays so
    project.wait_for("coordinator", f"run over                 reason='{ROUNDS} rounds completed' run=boston state=finished")
    assert [project.ended(service) for service in ("coordinator", *CLIENTS)] == [0, 0, 0]
    assert project.logs("coordinator").count(f" rounds={ROUNDS}/{ROUNDS} ") == 2  # its last round, and its last measurement


def test_the_run_survives_a_killed_client(project: Project) -> None:
    project("up", "--detach")
    project.wait_for("coordinator", f"rounds=3/{ROUNDS}")
    run("docker", "kill", project.container("bob"))
    assert project.ended("bob") == 128 + 9
    assert project.ended("coordinator") == 0
    assert project.ended("alice") == 0
    told = project.logs("coordinator")
    last = next(line for line in told.splitlines() if f"rounds={ROUNDS}/{ROUNDS}" in line and "kind=training" in line)
    assert "accepted=1 " in last  # by the one who is left
    assert f"reason='{ROUNDS} rounds completed'" in told


def test_a_stopped_federation_ends_in_order_and_goes_on_where_it_was(project: Project) -> None:
    project("up", "--detach")
    project.wait_for("coordinator", f"rounds=3/{ROUNDS}")
    project("stop")
    assert [project.ended(service) for service in ("coordinator", *CLIENTS)] == [0, 0, 0]  # 137 if SIGTERM had not reached them
    assert "draining" in project.logs("coordinator")
    project("up", "--detach")
    assert project.ended("coordinator") == 0
    told = project.logs("coordinator")
    assert told.count(f" rounds=1/{ROUNDS} ") == 1  # not from the beginning again
    assert f"reason='{ROUNDS} rounds completed' run=boston " in told
