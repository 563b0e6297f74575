from __future__ import annotations

import importlib.util
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from choral import codecs
from choral.address import HostPort
from choral.config import parse
from choral.errors import ConfigError
from choral.plan import Training
from choral_server.config import ServerConfig, TrainingChanges, load
from choral_server.objective import Objective
from choral_server.schedule import Schedule
from choral_server.strategies import ServerOptimizer

LEAST: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "plaintext": True,
    "state": "state",
    "task": "choral.tasks.boston_housing:task",
    "run": {"rounds": 100, "cohort_size": 2},
}
TLS = {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem", "ca_key": "ca.key"}
BYO = {"certificate": "server.pem", "key": "server.key", "ca": "company.pem"}
GONE = object()


def _changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The least configuration with values set, or taken away, at dotted keys."""
    content = deepcopy(LEAST)
    for key, value in changes.items():
        node, (*above, last) = content, key.split(".")
        for part in above:
            node = node.setdefault(part, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    return content


def _config(changes: dict[str, Any] | None = None) -> ServerConfig:
    return parse(_changed(changes or {}), ServerConfig, "server.yaml")


def test_defaults() -> None:
    config = _config()
    assert config.listen == HostPort("127.0.0.1", 0)
    assert (config.heartbeat_s, config.drain_s, config.exit_when_done, config.tls) == (15.0, 8.0, False, None)
    assert (config.evaluation.clients, config.evaluation.test_set) == (True, None)
    run = config.run
    assert (run.name, run.seed, run.needed, run.over_selection, run.deadline_s) == ("run", 0, 2, 0.0, 600.0)
    assert (run.cap, run.max_abandoned, run.retry_s, run.keep_versions, run.start_with) == (2**20, 10, 1.0, None, None)
    assert (run.schedule, run.objective, run.strategy) == (Schedule(), Objective(), ServerOptimizer())
    assert (run.extension_s, run.stall_s, run.absence_s, run.quarantine_after, run.max_update_norm) == (None, 30.0, 10.0, 3, None)
    assert (config.database, config.lease_s, config.artifacts, config.spool_bytes) == (None, 30.0, None, 2**32)
    assert config.admin_socket == Path("state/admin.sock")


def test_the_quorum_is_the_cohort_unless_it_is_given() -> None:
    assert _config({"run.cohort_size": 5}).run.needed == 5
    assert _config({"run.cohort_size": 5, "run.quorum": 3}).run.needed == 3


def test_hyper_parameters_override_the_tasks_own() -> None:
    defaults = Training(epochs=5, batch_size=8, learning_rate=0.001)
    assert TrainingChanges().over(defaults) == defaults
    assert TrainingChanges(epochs=0).over(defaults) == Training(epochs=0, batch_size=8, learning_rate=0.001)
    changed = _config({"run.training": {"batch_size": 16, "learning_rate": 0.5}}).run.training.over(defaults)
    assert changed == Training(epochs=5, batch_size=16, learning_rate=0.5)


def test_paths_count_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _changed({"plaintext": GONE, "tls": {**TLS, "key": "/etc/choral/server.key"}, "evaluation.test_set": "data/test.csv"})
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/server.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = load(Path("conf/server.yaml"))
    home = tmp_path / "conf"
    assert config.tls is not None
    assert (config.tls.certificate, config.tls.key) == (home / "server.pem", Path("/etc/choral/server.key"))
    assert (config.tls.ca, config.tls.ca_key) == (home / "ca.pem", home / "ca.key")
    assert (config.state, config.evaluation.test_set) == (home / "state", home / "data/test.csv")
    assert config.admin_socket == home / "state/admin.sock"


def test_a_file_without_tls_or_test_set_loads(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(LEAST), encoding="utf-8")
    config = load(path)
    assert (config.tls, config.evaluation.test_set, config.state) == (None, None, tmp_path / "state")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("sqlite:///choral.db", "sqlite:///{home}/choral.db"),
        ("sqlite:///data/choral.db", "sqlite:///{home}/data/choral.db"),
        ("sqlite:////var/lib/choral.db", "sqlite:////var/lib/choral.db"),
        ("sqlite://", "sqlite://"),
        ("postgresql://choral@db.example.org/choral", "postgresql://choral@db.example.org/choral"),
        (None, "sqlite:///{home}/state/choral.db"),
    ],
)
def test_where_the_database_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, used: str) -> None:
    home = tmp_path / "conf"
    home.mkdir()
    (home / "server.yaml").write_text(yaml.safe_dump(_changed({"database": given})), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load(Path("conf/server.yaml")).database_url == used.format(home=home)


def test_the_default_database_is_named_by_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _config().database_url == f"sqlite:///{tmp_path}/state/choral.db"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # what protects the link
        (
            {"plaintext": GONE},
            "tls is missing: give tls.certificate, tls.key, tls.ca and tls.ca_key (`choral server init` makes them)",
        ),
        ({"enrolment": {}}, "enrolment needs the key of an authority: give tls.ca_key, or remove enrolment"),
        (
            {"plaintext": GONE, "tls": {**TLS, "operators": ["carol"]}},
            "tls.operators and tls.viewers are for an authority of yours",
        ),
        (
            {"plaintext": GONE, "tls": {**BYO, "operators": ["carol"], "viewers": ["carol"]}},
            "carol: in tls.operators and in tls.viewers",
        ),
        (
            {"plaintext": GONE, "tls": {**BYO, "operators": ["../carol"]}},
            "tls.operators.0: '../carol' is not allowed: 1 to 64 letters",
        ),
        ({"plaintext": GONE, "tls": TLS, "listen": "0.0.0.0:65535"}, "enrolment.listen is missing: there is no port after 65535"),
        ({"limits.sessions": 6, "limits.connections": 5}, "sessions 6 is more than connections 5; it can be at most that"),
        (
            {"limits.sessions": 1, "run.cohort_size": 2},
            "a round waits for 2 clients (run.quorum, run.start_with), and only 1 may attend at once: raise limits.sessions",
        ),
        ({"limits.calls": 1}, "limits.calls: 1 is not allowed: greater than or equal to 2"),
        ({"limits.chunk_bytes": 2**20 + 1}, "limits.chunk_bytes: 1048577 is not allowed"),
        ({"plaintext": False}, "tls is missing"),
        ({"tls": TLS}, "plaintext: true contradicts tls: remove one of them"),
        ({"listen": "0.0.0.0:8470"}, "plaintext: true is allowed on loopback only, not on 0.0.0.0: give tls"),
        ({"listen": "[::]:8470"}, "plaintext: true is allowed on loopback only, not on ::: give tls"),
        ({"listen": "coordinator.example.org:8470"}, "plaintext: true is allowed on loopback only"),
        ({"plaintext": GONE, "tls": {"certificate": "server.pem"}}, "tls.key: is missing (PEM file with its private key)"),
        # what is measured
        (
            {"run.objective.on": "test"},
            "run.objective.on is test, but there is no evaluation.test_set: give one, or say clients",
        ),
        (
            {"run.objective.on": "clients", "evaluation.clients": False},
            "run.objective.on is clients, but evaluation.clients is false: change one of them",
        ),
        (
            {"run.objective.patience_rounds": 3, "evaluation.clients": False},
            "run.objective.patience_rounds needs a measurement: give evaluation.test_set or evaluation.clients",
        ),
        # the round
        ({"run.quorum": 3}, "quorum 3 is more than cohort_size 2; it can be at most that"),
        ({"run.quorum": 0}, "run.quorum: 0 is not allowed: greater than or equal to 1"),
        ({"run.cohort_size": 0}, "run.cohort_size: 0 is not allowed: greater than or equal to 1"),
        ({"run.cohort_size": 10_001}, "run.cohort_size: 10001 is not allowed: less than or equal to 10000"),
        ({"run.cohort_size": GONE}, "run.cohort_size: is missing (results wanted per round: the aggregation goal)"),
        ({"run.rounds": 0}, "run.rounds: 0 is not allowed: greater than or equal to 1 (training rounds to complete)"),
        ({"run.rounds": GONE}, "run.rounds: is missing (training rounds to complete)"),
        ({"run.start_with": 0}, "run.start_with: 0 is not allowed"),
        ({"run.over_selection": -0.1}, "run.over_selection: -0.1 is not allowed: greater than or equal to 0"),
        ({"run.over_selection": 30}, "run.over_selection: 30 is not allowed: less than or equal to 10"),
        ({"run.deadline_s": 0}, "run.deadline_s: 0 is not allowed: greater than 0"),
        ({"run.deadline_s": "60s"}, "run.deadline_s: '60s' is not allowed: a valid number (seconds after which a round closes"),
        ({"run.deadline": 60}, "run.deadline: unknown key; did you mean deadline_s? Allowed here: name, rounds, seed, cohort_size"),
        ({"run.deadline_s": float("inf")}, "run.deadline_s: inf is not allowed"),
        ({"run.retry_s": float("nan")}, "run.retry_s: nan is not allowed"),
        ({"run.weight_cap": 0}, "run.weight_cap: 0 is not allowed"),
        ({"run.weight_cap": 2**41}, "run.weight_cap: 2199023255552 is not allowed"),
        ({"run.max_abandoned": 0}, "run.max_abandoned: 0 is not allowed"),
        ({"run.keep_versions": 0}, "run.keep_versions: 0 is not allowed"),
        ({"run.seed": 1.5}, "run.seed: 1.5 is not allowed: a valid integer"),
        ({"run.extension_s": -1}, "run.extension_s: -1 is not allowed: greater than or equal to 0"),
        ({"run.extension_s": float("inf")}, "run.extension_s: inf is not allowed"),
        ({"run.stall_s": 0}, "run.stall_s: 0 is not allowed: greater than 0"),
        ({"run.stall_s": None}, "run.stall_s: nothing is not allowed: a valid number"),
        ({"run.absence_s": -0.5}, "run.absence_s: -0.5 is not allowed: greater than or equal to 0"),
        ({"run.absence_s": 10**9}, "run.absence_s: 1000000000 is not allowed: less than or equal to 31536000"),
        ({"run.quarantine_after": 0}, "run.quarantine_after: 0 is not allowed: greater than or equal to 1"),
        ({"run.quarantine_after": "never"}, "run.quarantine_after: 'never' is not allowed: a valid integer"),
        ({"run.quarantine": 3}, "run.quarantine: unknown key; did you mean quarantine_after?"),
        ({"run.compression.upload": "gzip"}, "run.compression.upload: 'gzip' is not allowed: 'none', 'bf16', 'int8' or 'topk'"),
        ({"run.compression": {"upload": "topk", "topk_share": 0}}, "run.compression.topk_share: 0 is not allowed: greater than"),
        ({"run.compression": {"upload": "topk", "topk_share": 0.6}}, "run.compression.topk_share: 0.6 is not allowed: less than"),
        (
            {"run.compression": {"upload": "int8", "topk_share": 0.1}},
            "run.compression: topk_share is for upload: topk, and upload is int8: remove one of them",
        ),
        (
            {"run.compression": {"upload": "topk"}, "run.max_update_norm": 1.0},
            "max_update_norm contradicts compression.upload: topk, whose updates carry what earlier ones left out, too, and may be",
        ),
        ({"run.max_update_norm": 0}, "run.max_update_norm: 0 is not allowed: greater than 0"),
        ({"run.max_update_norm": float("inf")}, "run.max_update_norm: inf is not allowed"),
        # the schedule, strategy, training and objective in it
        ({"run.strategy": {"momentum": 0.9}}, "momentum 0.9 has no meaning for fedavg: say name: fedavgm, or remove momentum"),
        ({"run.strategy": {"name": "fedavg", "momentum": 0.0}}, "momentum 0 has no meaning for fedavg"),
        ({"run.strategy": {"name": "fedavgm", "momentum": 1}}, "run.strategy.momentum: 1 is not allowed: less than 1"),
        ({"run.strategy": {"name": "adam"}}, "run.strategy.name: 'adam' is not allowed: 'fedavg' or 'fedavgm'"),
        ({"run.strategy": {"learning_rate": 0}}, "run.strategy.learning_rate: 0 is not allowed: greater than 0"),
        ({"run.strategy": {"beta": 0.9}}, "run.strategy.beta: unknown key; Allowed here: name, learning_rate, momentum"),
        ({"run.strategy": "fedavgm"}, "run.strategy: 'fedavgm' is not allowed"),
        ({"run.schedule": {"interval_s": 5, "cron": "0 3 * * *"}}, "give interval_s or cron, not both"),
        ({"run.schedule": {"interval": 5}}, "run.schedule.interval: unknown key; did you mean interval_s?"),
        ({"run.schedule": {"time_zone": "UTC"}}, "time_zone belongs to cron: give cron too, or remove time_zone"),
        ({"run.training": {"epochs": -1}}, "run.training.epochs: -1 is not allowed: greater than or equal to 0"),
        ({"run.training": {"learning_rate": "1e-3"}}, "run.training.learning_rate: '1e-3' is not allowed: a valid number"),
        ({"run.training": {"lr": 0.1}}, "run.training.lr: unknown key"),
        ({"run.objective": {"mode": "least"}}, "run.objective.mode: 'least' is not allowed: 'min' or 'max'"),
        # the process
        ({"listen": "8470"}, "listen: '8470' is not allowed: '8470' is no address; write host:port, for example 10.0.0.5:8470"),
        ({"listen": GONE}, "listen: is missing"),
        ({"state": GONE}, "state: is missing"),
        ({"state": 7}, "state: 7 is not allowed"),
        ({"task": GONE}, "task: is missing (module:attribute of the task)"),
        ({"run": GONE}, "run: is missing"),
        ({"heartbeat_s": 0.05}, "heartbeat_s: 0.05 is not allowed: greater than or equal to 0.1"),
        ({"drain_s": -1}, "drain_s: -1 is not allowed"),
        ({"exit_when_done": "yes"}, "exit_when_done: 'yes' is not allowed: a valid boolean"),
        ({"lease_s": 0.5}, "lease_s: 0.5 is not allowed: greater than or equal to 1"),
        ({"lease_s": 3601}, "lease_s: 3601 is not allowed: less than or equal to 3600"),
        ({"spool_bytes": -1}, "spool_bytes: -1 is not allowed: greater than or equal to 0"),
        ({"spool_bytes": 1e9}, "spool_bytes: 1000000000.0 is not allowed: a valid integer"),
        ({"database": 5432}, "database: 5432 is not allowed: a valid string (URL of the database"),
        ({"artifacts": ["s3://bucket"]}, "artifacts: a list is not allowed: a valid string (URL of the object store"),
        ({"artefacts": "s3://bucket"}, "artefacts: unknown key; did you mean artifacts?"),
        ({"evaluation.test": "test.csv"}, "evaluation.test: unknown key; did you mean test_set? Allowed here: test_set, clients"),
        ({"lisen": "127.0.0.1:1"}, "lisen: unknown key; did you mean listen?"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(changes)
    assert told in str(refused.value)
    assert all(line.startswith("server.yaml: ") for line in str(refused.value).splitlines())


@pytest.mark.parametrize(
    "changes",
    [
        {"plaintext": GONE, "tls": TLS, "listen": "0.0.0.0:8470"},
        {"plaintext": GONE, "tls": TLS, "listen": "0.0.0.0:65535", "enrolment": {"listen": "0.0.0.0:1"}},
        {"plaintext": GONE, "tls": TLS, "enrolment": {"port": 443, "certificate_s": 3600}},
        {"plaintext": GONE, "tls": {**BYO, "operators": ["carol"], "viewers": ["dave"]}},
        {"plaintext": False, "tls": TLS},
        {"listen": "[::1]:0"},
        {"listen": "localhost:0"},
        {"run.objective.on": "test", "evaluation.test_set": "test.csv"},
        {"run.objective.on": "clients"},
        {"run.objective.patience_rounds": 3},
        {"run.objective.patience_rounds": 3, "evaluation": {"clients": False, "test_set": "test.csv"}},
        {"evaluation.clients": False},
        {"run.quorum": 2},
        {"run.quorum": 1, "run.start_with": 9},
        {"run.schedule": {"cron": "0 3 * * *", "time_zone": "Europe/Berlin"}},
        {"run.schedule": {"interval_s": 0.5}},
        {"run.strategy": {"name": "fedavgm"}},
        {"run.strategy": {"name": "fedavgm", "momentum": 0.0, "learning_rate": 0.1}},
        {"run.strategy": {"learning_rate": 0.5}},
        {"run.quarantine_after": None},
        {"run.quarantine_after": 1, "run.extension_s": 0, "run.absence_s": 0, "run.stall_s": 0.1},
        {"run.max_update_norm": 1e-9},
        {"run.max_update_norm": 1e-9, "run.compression": {"upload": "int8", "zstd": True}},
        {"run.compression": {"upload": "topk", "topk_share": 0.01}},
        {"run.compression": {"zstd": True, "download": "delta"}},
        {"lease_s": 1, "spool_bytes": 0, "database": "sqlite://", "artifacts": "s3://bucket/prefix"},
    ],
)
def test_what_can_work_is_not_refused(changes: dict[str, Any]) -> None:
    assert _config(changes).run.rounds == 100


@pytest.mark.parametrize("name", ["run", "2025-06.a_B", "x" * 64])
def test_names_of_runs(name: str) -> None:
    assert _config({"run.name": name}).run.name == name


@pytest.mark.parametrize("name", ["", "x" * 65, "..", ".hidden", "a/b", "a b", "Zürich", "a\n"])
def test_names_that_are_no_folders_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: .* is not allowed: 1 to 64 letters, digits, dots, dashes and underscores"):
        _config({"run.name": name})


@pytest.mark.parametrize(
    ("compression", "name"),
    [
        ({}, "float32"),
        ({"upload": "none", "zstd": True}, "float32+zstd"),
        ({"upload": "bf16"}, "bf16"),
        ({"upload": "int8", "zstd": True}, "int8+zstd"),
        ({"upload": "topk"}, "topk:0.05"),
        ({"upload": "topk", "topk_share": 0.0001, "zstd": True}, "topk:0.0001+zstd"),
    ],
)
def test_what_clients_are_asked_for(compression: dict[str, Any], name: str) -> None:
    codec = _config({"run.compression": compression}).run.compression.codec
    assert codec.name == name
    assert codecs.parse(name) == codec


def test_what_needs_a_package_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"zstd needs the extra compression: pip install 'choral\[compression\]'"):
        _config({"run.compression": {"upload": "int8", "zstd": True}})
    with pytest.raises(ConfigError, match="zstd needs the extra compression"):
        _config({"run.compression.download": "delta"})
    settings = _config({"run.compression": {"upload": "int8", "download": "bf16"}}).run.compression
    assert (settings.codec.name, settings.download) == ("int8", "bf16")
