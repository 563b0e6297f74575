from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from choral.config import parse
from choral.errors import ConfigError
from choral_client.config import ClientConfig

GOOD = {"server": "localhost:8470", "name": "alice", "task": "tasks:task", "data": "shard.csv"}
OWN = {"ca": "ca.pem", "certificate": "alice.pem", "key": "alice.key"}


def config(**changes: Any) -> ClientConfig:
    content = GOOD | changes
    return parse({key: value for key, value in content.items() if value is not None}, ClientConfig, "client.yaml")


def test_what_is_not_given() -> None:
    given = config()
    assert (str(given.server), given.data, given.ca, given.token) == ("localhost:8470", Path("shard.csv"), None, None)
    assert (given.holdout, given.follow, given.threads, given.first_contact_s) == (0.1, True, None, 60.0)
    assert given.folder == Path("choral-alice")
    assert config(state="here").folder == Path("here")


@pytest.mark.parametrize("name", ["alice", "a", "-", "site_7.ward-2", "x" * 64])
def test_names_that_are_allowed(name: str) -> None:
    assert config(name=name).name == name


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 65, "zoë", "alice\n"])
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(ConfigError, match=r"client\.yaml: name: .* is not allowed: .*unique in the federation"):
        config(name=name)


@pytest.mark.parametrize("server", ["localhost:8470", "127.0.0.1:1", "[::1]:1"])
def test_plaintext_is_for_this_machine(server: str) -> None:
    assert config(server=server, plaintext=True).plaintext


@pytest.mark.parametrize(
    "changes",
    [
        OWN,
        {"token": "token", "name": None, "state": "here"},
        {"server": None},
        {"server": None, "name": None, "state": "here"},
        {"certificate": "alice.pem", "key": "alice.key", "ca": "ca.pem", "state": "here"},
    ],
)
def test_how_a_client_may_be_known(changes: dict[str, Any]) -> None:
    config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name is missing: give the name under which this client enrolled, or state"),
        ({"ca": "ca.pem"}, "ca alone will not do: give ca, certificate and key, or none of them and enrol"),
        ({"key": "alice.key", "certificate": "alice.pem"}, "certificate and key alone will not do"),
        (OWN | {"plaintext": True}, "plaintext contradicts ca: remove one of them"),
        ({"token": "token", "plaintext": True}, "plaintext contradicts token: remove one of them"),
        (OWN | {"token": "token"}, "token contradicts ca, certificate and key"),
        (OWN | {"server": None}, "name and server are needed by a client that does not enrol"),
        ({"token": "token", "server": None}, "server is missing: a token does not say where the coordinator is"),
        ({"plaintext": True, "server": "10.0.0.5:1"}, "plaintext is allowed on loopback only, not to 10.0.0.5: enrol"),
        ({"holdout": 1.0}, "client.yaml: holdout: 1.0 is not allowed: less than 1"),
        ({"holdout": "0.1"}, "client.yaml: holdout: '0.1' is not allowed: a valid number"),
        ({"threads": 0}, "client.yaml: threads: 0 is not allowed: greater than or equal to 1"),
        ({"first_contact_s": 0}, "client.yaml: first_contact_s: 0 is not allowed: greater than 0"),
        ({"first_contact_s": float("inf")}, "client.yaml: first_contact_s: inf is not allowed: a finite number"),
        ({"server": "nowhere"}, "client.yaml: server: 'nowhere' is not allowed: 'nowhere' is no address; write host:port"),
        ({"data": None}, "client.yaml: data: is missing (this client's shard; the only data file that is opened)"),
        ({"hold_out": 0.2}, "client.yaml: hold_out: unknown key; did you mean holdout?"),
    ],
)
def test_what_is_not_allowed_is_named_with_its_cure(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(**changes)
    assert message in str(refused.value)
