"""What goes wrong before anything is trained: the message names the thing, the value and the cure, and the exit code says no."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from choral_server.trust import make_authority
from e2e.federation import BOSTON, SMALL_TASK, Federation, Process


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator that waits for more clients than there are."""
    with Federation(tmp_path_factory.mktemp("f")) as federation:
        federation.coordinator(run={"rounds": 1, "cohort_size": 2, "start_with": 99})
        yield federation


def ends_with(process: Process, code: int, *words: str) -> None:
    """It ends with this code and one message, which holds these words, and no traceback."""
    assert process.code() == code, process.stderr
    assert "Traceback" not in process.stderr
    (message,) = [line for line in process.err if line.startswith("choral: ")]
    for word in words:
        assert word in message


# The coordinator


def test_a_port_that_is_taken(federation: Federation) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        federation.configure(listen=address)
        ends_with(federation.start_coordinator(), 5, f"listen: {address} cannot be used: another process has the port")


def test_a_state_folder_that_another_coordinator_uses(idle: Federation) -> None:
    ends_with(idle.start_coordinator(), 2, f"state: {idle.folder / 'state'} is in use by a coordinator: stop it")
    with idle.admin():  # the other one is none the worse for it
        assert idle.command("server", "health", "-c", idle.config).code() == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lissten": "x"}, ["choral.yaml: lissten: unknown key; did you mean listen?"]),
        ({"run": {"deadline": 5}}, ["choral.yaml: run.deadline: unknown key; did you mean deadline_s?"]),
        (
            {"run": {"rounds": "three"}},
            ["choral.yaml: run.rounds: 'three' is not allowed: a valid integer", "training rounds to complete"],
        ),
        ({"run": {"quorum": 3}}, ["choral.yaml: run: ", "quorum 3 is more than cohort_size 2"]),
        ({"task": None}, ["choral.yaml: task: is missing (module:attribute of the task)"]),
        ({"listen": "8470"}, ["choral.yaml: listen: '8470' is not allowed: '8470' is no address; write host:port"]),
        ({"tls": None}, ["tls is missing: give tls.certificate, tls.key, tls.ca and tls.ca_key"]),
    ],
)
def test_a_configuration_that_is_not_allowed(federation: Federation, changes: dict, words: list[str]) -> None:
    federation.configure(**changes)
    ends_with(federation.start_coordinator(), 2, *words)


def test_a_configuration_that_does_not_exist(federation: Federation) -> None:
    ends_with(federation.start_coordinator(), 2, f"{federation.config}: cannot be read (No such file or directory)")
    gone = federation.command("runs", "list", "-c", federation.config)
    ends_with(gone, 2, f"{federation.config}: cannot be read")


def test_operators_without_a_coordinator(federation: Federation) -> None:
    federation.configure()
    for words in (["runs", "list"], ["server", "health"], ["runs", "watch"]):
        ends_with(federation.command(*words, "-c", federation.config), 7, "no coordinator runs with this configuration: ")


def test_a_socket_that_a_killed_coordinator_left_behind(federation: Federation) -> None:
    federation.coordinator().end()
    assert (federation.folder / "state" / "admin.sock").exists()
    ends_with(federation.command("runs", "list", "-c", federation.config), 7, "no coordinator answers at ")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"task": "nowhere:task"}, 3, ["task 'nowhere:task': no module nowhere in ", " or among the installed packages"]),
        ({"task": "small:taks"}, 3, ["task 'small:taks': small has no attribute taks; tasks in it: task"]),
        (
            {"tls": {"certificate": "other.pem"}},
            6,
            ["other.pem cannot be read (No such file or directory)", "`choral server init`"],
        ),
        ({"evaluation": {"test_set": "gone.csv"}}, 4, ["gone.csv: does not exist; give the path of a CSV or Parquet file"]),
        (
            {"run": {"objective": {"metric": "f1"}}},
            2,
            ["run.objective.metric: 'f1' is not measured by task small; it has loss, mae"],
        ),
    ],
)
def test_a_coordinator_that_cannot_start(federation: Federation, changes: dict, code: int, words: list[str]) -> None:
    federation.configure(**changes)
    ends_with(federation.start_coordinator(), code, *words)


def test_a_state_folder_of_another_task(federation: Federation) -> None:
    coordinator = federation.coordinator()
    coordinator.terminate()
    assert coordinator.code() == 0
    federation.configure(task=BOSTON)
    ends_with(federation.start_coordinator(), 2, "trains task small 1, not boston_housing 1: give run.name another value")


# The client's files and tasks

SHARDS = {
    "missing": (None, "does not exist; give the path of a CSV or Parquet file"),
    "empty": ("", "is empty; a header line and at least one row are needed"),
    "without rows": ("a,b,y\n", "has no rows; at least one example is needed"),
    "ragged": ("a,b,y\n1,2,3\n4,5,6,7\n", "its rows do not all have as many fields as the header"),
    "non-numeric": ("a,b,y\n1,2,3\n4,five,6\n", "row 2, column b holds 'five', which is not a finite number"),
    "without a column": ("a,c,y\n1,2,3\n", "column b is missing; the file has a, c, y"),
    "with an empty cell": ("a,b,y\n1,2,3\n1,2,3\n4,,6\n", "row 3, column b is empty: fill it in or remove the row"),
    "with a NaN": ("a,b,y\nNaN,2,3\n", "row 1, column a is empty: fill it in or remove the row"),
    "short of a field": ("a,b,y\n1,2,3\n4,5\n", "row 2, column y is empty: fill it in or remove the row"),
}


@pytest.mark.parametrize("fault", SHARDS)
def test_a_shard_that_cannot_be_used(federation: Federation, fault: str) -> None:
    content, words = SHARDS[fault]
    shard = federation.folder / "shard.csv"
    if content is not None:
        shard.write_text(content)
    federation.address = "127.0.0.1:1"
    ends_with(federation.client("alice", shard), 4, f"{shard}: {words}")


@pytest.mark.parametrize(
    ("task", "source", "words"),
    [
        ("nowhere:task", None, "task 'nowhere:task': no module nowhere in "),
        ("small:model", None, "task 'small:model': small has no attribute model; tasks in it: task"),
        ("small:Descent", None, "task 'small:Descent': is a type; a choral.Task is expected"),
        ("small", None, "task 'small': write it as module:attribute, for example choral.tasks.boston_housing:task"),
        (
            "bad:task",
            "import nosuchmodule",
            "task 'bad:task': importing bad raised ModuleNotFoundError: No module named 'nosuchmodule'",
        ),
        ("bad:task", "def load(path):\n    raise KeyError(path.name)\n", "load('{shard}') raised KeyError: 'shard.csv'"),
        ("bad:task", "def model():\n    raise ZeroDivisionError('no layers')\n", "model() raised ZeroDivisionError: no layers"),
    ],
)
def test_a_task_that_cannot_be_used(federation: Federation, task: str, source: str | None, words: str) -> None:
    if source is not None:
        changes = ", ".join(f"{word}={word}" for word in ("load", "model") if f"def {word}" in source)
        federation.write_task(
            f"from dataclasses import replace\nimport small\n{source}\ntask = replace(small.task, {changes})\n", "bad"
        )
    federation.address = "127.0.0.1:1"
    shard = federation.write_shard("alice")
    ends_with(federation.client("alice", shard, task), 3, words.format(shard=shard))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"--server": "localhost"}, ["command line: server: 'localhost' is not allowed", "write host:port"]),
        ({"--name": "al/ice"}, ["command line: name: 'al/ice' is not allowed"]),
        ({"--holdout": 1}, ["command line: holdout: 1.0 is not allowed: less than 1"]),
        ({"--threads": 0}, ["command line: threads: 0 is not allowed: greater than or equal to 1"]),
    ],
)
def test_a_flag_that_is_not_allowed(federation: Federation, flags: dict, words: list[str]) -> None:
    federation.address = "127.0.0.1:1"
    ends_with(federation.client("alice", flags=flags), 2, *words)


def test_a_client_without_what_it_needs_to_be_known(federation: Federation) -> None:
    federation.address = "127.0.0.1:1"
    gone = federation.folder / "gone.pem"
    own = {"--ca": gone, "--certificate": gone, "--key": gone}
    ends_with(federation.client("alice", flags=own), 6, f"{gone} cannot be read (No such file or directory)")
    ends_with(
        federation.client("alice", flags={"--token": gone}), 6, f"token: {gone} cannot be read", "give the file that holds the"
    )
    arguments = ["client", "--name", "bob", "--server", "127.0.0.1:1", "--task", "small:task", "--data", "x.csv"]
    ends_with(federation.start("bob", *arguments), 6, "choral-bob: this client has not enrolled: `choral client enrol TOKEN")


# The client at the coordinator's door


def test_a_server_that_cannot_be_reached(federation: Federation) -> None:
    with socket.socket() as closed:  # bound, so that nobody else has the port, and not listening
        closed.bind(("127.0.0.1", 0))
        federation.address = f"127.0.0.1:{closed.getsockname()[1]}"
        alice = federation.client("alice", flags={"--first-contact-s": 0.5})
        ends_with(alice, 7, f"no coordinator answers at {federation.address}")


def test_a_coordinator_that_another_authority_vouches_for(idle: Federation, tmp_path: Path) -> None:
    make_authority(tmp_path / "other", ["localhost", "127.0.0.1"])
    state = tmp_path / "alice"
    idle.vouch("alice", state)
    (state / "identity" / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    alice = idle.client("alice", flags={"--state": state, "--first-contact-s": 0.5})
    ends_with(alice, 6, f"the coordinator at {idle.address} shows a certificate that the given CA did not sign", "--host")


def test_a_coordinator_under_a_name_that_its_certificate_does_not_hold(federation: Federation, tmp_path: Path) -> None:
    make_authority(tmp_path / "elsewhere", ["elsewhere.example"])
    home = tmp_path / "elsewhere"
    tls = {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem", "ca_key": "ca.key"}
    federation.coordinator(tls={key: str(home / name) for key, name in tls.items()})
    alice = federation.client("alice", flags={"--first-contact-s": 0.5})
    ends_with(alice, 6, "shows a certificate that the given CA did not sign for that name", "--host")


def test_a_file_that_is_no_certificate(idle: Federation, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("not a certificate")
    own = {"--ca": nonsense, "--certificate": nonsense, "--key": nonsense, "--first-contact-s": 0.5}
    ends_with(idle.client("alice", flags=own), 6, str(nonsense))


def test_a_model_that_is_not_the_coordinators(idle: Federation, tmp_path: Path) -> None:
    idle.write_task(SMALL_TASK.replace("nn.Linear(2, 1)", "nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))"), folder=tmp_path)
    ends_with(
        idle.client("alice", folder=tmp_path),
        8,
        "the model of client alice is not the coordinator's: entry 0 is 0.weight F32 [3, 2] (averaged) "
        "where weight F32 [1, 2] (averaged) is expected: install the same version of the task's code",
    )


def test_a_task_that_is_not_the_coordinators(idle: Federation, tmp_path: Path) -> None:
    idle.write_task(SMALL_TASK.replace('name="small"', 'name="small", version="2"'), folder=tmp_path)
    words = (
        "this coordinator trains version 1 of task small; client alice has version 2: install the same version of the task's code"
    )
    ends_with(idle.client("alice", folder=tmp_path), 8, words)


def test_a_name_that_another_client_has(idle: Federation) -> None:
    first = idle.client("nora")
    first.saw("attending")
    shutil.copytree(idle.folder / "nora" / "client" / "identity", idle.folder / "second" / "identity")  # copied, with its keys
    second = idle.client("nora", flags={"--first-contact-s": 0.5, "--state": idle.folder / "second"})
    ends_with(second, 8, "a client named nora attends already, from ipv4:127.0.0.1:", "give this one another name")
    assert first.popen.poll() is None
