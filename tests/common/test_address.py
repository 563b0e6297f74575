from __future__ import annotations

import pytest
from choral.address import Address, HostPort
from choral.config import Settings, parse
from choral.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.5:8470", "10.0.0.5", 8470),
        ("localhost:0", "localhost", 0),
        ("site-7.example.org:65535", "site-7.example.org", 65535),
        ("[::1]:8470", "::1", 8470),
        ("[fe80::1]:1", "fe80::1", 1),
    ],
)
def test_reads_names_and_both_kinds_of_addresses(text: str, host: str, port: int) -> None:
    assert HostPort.parse(text) == HostPort(host, port)
    assert str(HostPort.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "8470",
            "host",
            "host:",
            ":8470",
            "host:65536",
            "host:123456",
            "host:-1",
            "host:80x",
            "::1:8470",
            "[host]:1",
            "[::1]",
        ),
        *("http://host:1", "host:1/path", "two words:1", "host:1\n", " host:1"),
    ],
)
def test_refuses_anything_else_and_shows_the_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"write host:port, for example 10\.0\.0\.5:8470") as refused:
        HostPort.parse(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.5:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_knows_what_only_this_machine_reaches(text: str, loopback: bool) -> None:
    assert HostPort.parse(text).is_loopback is loopback


@given(st.ip_addresses(), st.integers(0, 65535))
def test_text_and_value_round_trip(address: object, port: int) -> None:
    value = HostPort(str(address), port)
    assert HostPort.parse(str(value)) == value


class _Listener(Settings):
    listen: Address


def test_is_a_configuration_value() -> None:
    assert parse({"listen": "[::1]:8470"}, _Listener, "a.yaml").listen == HostPort("::1", 8470)
    assert _Listener(listen=HostPort("h", 1)).listen == HostPort("h", 1)


@pytest.mark.parametrize(("value", "shown"), [("nowhere", "'nowhere'"), (8470, "8470"), (None, "nothing")])
def test_a_wrong_configuration_value_is_named(value: object, shown: str) -> None:
    with pytest.raises(ConfigError, match="host:port") as refused:
        parse({"listen": value}, _Listener, "a.yaml")
    assert str(refused.value).startswith(f"a.yaml: listen: {shown} is not allowed")
