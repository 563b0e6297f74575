"""The `choral` command as a process: what it offers, and what its small commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import choral
import pandas as pd
import pytest
from choral_server.config import load

CLI = [sys.executable, "-m", "choral_deploy.cli"]

WITHOUT = """
import runpy, sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


absent = sys.argv.pop(1)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
runpy.run_module("choral_deploy.cli", run_name="__main__", alter_sys=True)
"""
"""The command, with a package that is not installed."""

SERVER = {"server", "authority", "runs", "rounds", "clients", "versions", "shards"}
CLIENT = {"client"}
BOTH = {"demo"}


def run(*arguments: object, without: str | None = None, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    start = CLI if without is None else [sys.executable, "-c", WITHOUT, without]
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, cwd=folder, timeout=120)


def offered(help_text: str) -> set[str]:
    """The commands that a help page lists."""
    words = [line.strip("│ ").split() for line in help_text.splitlines() if line.startswith("│ ")]
    return {line[0] for line in words if line and line[0] in SERVER | CLIENT | BOTH}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(flag: str) -> None:
    done = run(flag)
    assert done.returncode == 0
    assert offered(done.stdout) == SERVER | CLIENT | BOTH


@pytest.mark.parametrize(("absent", "left"), [("choral_server", CLIENT), ("choral_client", SERVER)])
def test_a_command_whose_package_is_absent_is_not_offered(absent: str, left: set[str]) -> None:
    done = run("--help", without=absent)
    assert done.returncode == 0, done.stderr
    assert offered(done.stdout) == left
    for command in (SERVER | CLIENT | BOTH) - left:
        refused = run(command, without=absent)
        assert refused.returncode == 2
        assert f"No such command '{command}'" in refused.stderr


def test_what_is_left_works(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"doing": "finished", "at": 0}))
    status = run("client", "status", tmp_path, without="choral_server")
    assert (status.returncode, json.loads(status.stdout)["doing"]) == (0, "finished")
    dealt = run("shards", "boston_housing", "--out", tmp_path, "--client", "alice", without="choral_client")
    assert dealt.returncode == 0, dealt.stderr


def test_the_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"choral {choral.__version__}\n")


def test_shards_are_dealt(tmp_path: Path) -> None:
    done = run("shards", "boston_housing", "--out", tmp_path / "data", "--client", "alice", "--client", "bob", "--seed", 3)
    assert done.returncode == 0, done.stderr
    paths = dict(line.split("\t") for line in done.stdout.splitlines())
    assert paths == {
        "test": str(tmp_path / "data" / "test.csv"),
        "alice": str(tmp_path / "data" / "alice" / "shard.csv"),
        "bob": str(tmp_path / "data" / "bob" / "shard.csv"),
    }
    assert {name: len(pd.read_csv(path)) for name, path in paths.items()} == {"test": 102, "alice": 202, "bob": 202}
    again = run("shards", "boston_housing", "--out", tmp_path / "other", "--client", "alice", "--client", "bob", "--seed", 3)
    assert again.returncode == 0
    assert (tmp_path / "data/bob/shard.csv").read_bytes() == (tmp_path / "other/bob/shard.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["iris", "--client", "a"],
            "choral: data set 'iris' is not bundled; choose one of boston_housing, breast_cancer, digits\n",
        ),
    ],
)
def test_shards_that_cannot_be_dealt(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("shards", *arguments, "--out", tmp_path / "data")
    assert (done.returncode, done.stderr) == (2, message)
    assert not (tmp_path / "data").exists()


def test_a_coordinator_is_prepared_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = run(
        "server", "init", home, "--host", "10.0.0.5", "--host", "trainer.example", "--clients", 3, "--rounds", 7, "--port", 9000
    )
    assert done.returncode == 0, done.stderr
    assert f"choral server token NAME --config {home / 'choral.yaml'}" in done.stdout
    assert {path.name: path.stat().st_mode & 0o077 for path in home.glob("*.key")} == {"ca.key": 0, "server.key": 0}
    config = load(home / "choral.yaml")
    assert (str(config.listen), config.run.cohort_size, config.run.rounds) == ("0.0.0.0:9000", 3, 7)
    assert config.tls is not None
    assert (config.tls.certificate, config.state) == (home / "server.pem", home / "state")
    assert (config.tls.ca_key, str(config.enrolment_address)) == (home / "ca.key", "0.0.0.0:9001")

    before = {path.name: path.read_bytes() for path in home.iterdir()}
    again = run("server", "init", home, "--host", "10.0.0.5")
    assert again.returncode == 2
    assert again.stderr == f"choral: {home / 'choral.yaml'} exists already: choose another folder\n"
    (home / "choral.yaml").unlink()
    again = run("server", "init", home, "--host", "10.0.0.5")
    assert again.returncode == 6
    assert again.stderr.startswith(f"choral: {home / 'ca.pem'} exists already: choose another folder")
    assert {path.name: path.read_bytes() for path in home.iterdir()} | {"choral.yaml": b""} == before | {"choral.yaml": b""}


def test_a_host_that_is_none_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run("server", "init", tmp_path / "home", "--host", "zoë.example")
    assert done.returncode == 6
    assert done.stderr.startswith("choral: host 'zoë.example' is neither an IP address nor a DNS name")
    assert list(tmp_path.rglob("*.pem")) == list(tmp_path.rglob("*.key")) == list(tmp_path.rglob("*.yaml")) == []


def test_paths_in_a_clients_file_count_from_the_file_and_flags_win(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "client.yaml").write_text(
        "server: 127.0.0.1:1\nname: alice\ntask: choral.tasks.boston_housing:task\ndata: shard.csv\nplaintext: true\n"
    )
    from_file = run("client", "-c", home / "client.yaml", folder=tmp_path)
    assert from_file.returncode == 4
    assert from_file.stderr.endswith(f"choral: {home / 'shard.csv'}: does not exist; give the path of a CSV or Parquet file\n")
    from_flag = run("client", "-c", home / "client.yaml", "--data", "other.csv", folder=tmp_path)
    assert from_flag.returncode == 4
    assert from_flag.stderr.endswith("choral: other.csv: does not exist; give the path of a CSV or Parquet file\n")
    assert (tmp_path / "choral-alice").is_dir()


def test_a_client_does_not_start_with_a_guard_that_it_cannot_keep(tmp_path: Path) -> None:
    (tmp_path / "client.yaml").write_text(
        "server: 127.0.0.1:1\nname: alice\ntask: choral.tasks.boston_housing:task\ndata: shard.csv\nplaintext: true\n"
        "guard: ours.yaml\n"
    )
    missing = run("client", "-c", tmp_path / "client.yaml", folder=tmp_path)
    assert missing.returncode == 2
    assert f"choral: {tmp_path / 'ours.yaml'}: cannot be read (No such file or directory)" in missing.stderr
    (tmp_path / "theirs.yaml").write_text("max_epoch: 5\n")
    broken = run("client", "-c", tmp_path / "client.yaml", "--guard", "theirs.yaml", folder=tmp_path)
    assert broken.returncode == 2
    assert "choral: theirs.yaml: max_epoch: unknown key; did you mean max_epochs?" in broken.stderr
    (tmp_path / "choral-alice" / "guard.yaml").write_text("min_cohort: none\n")  # found without being named
    (tmp_path / "ours.yaml").write_text("{}\n")
    assert run("client", "-c", tmp_path / "client.yaml", folder=tmp_path).returncode == 4  # only the one that is named counts
    flags = ["--name", "alice", "--server", "127.0.0.1:1", "--task", "choral.tasks.boston_housing:task", "--data", "shard.csv"]
    found = run("client", *flags, "--plaintext", folder=tmp_path)
    assert found.returncode == 2
    assert "guard.yaml: min_cohort: 'none' is not allowed" in found.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen([*CLI, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(60)
