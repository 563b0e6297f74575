from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from choral.config import Settings, parse, read, read_mapping
from choral.errors import ConfigError
from pydantic import Field, ValidationError, model_validator


class Brew(Settings):
    """What the tests configure."""

    minutes: Annotated[float, Field(gt=0, le=60)] = 3.0
    """how long
    it steeps"""
    sort: Literal["green", "black"] = "black"
    """the leaves"""
    cups: int = 1
    """cups at once"""


class Kettle(Settings):
    """The outer mapping."""

    water_l: float
    """litres of water"""
    brew: Brew = Brew()
    """how it is made"""
    spare: Brew | None = None
    """the second pot"""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.brew.cups > 4 * self.water_l:
            raise ValueError("water_l is too little for brew.cups")
        return self


def _told(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read(path, Kettle)
    return str(refused.value)


def test_reads_a_file_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "k.yaml"
    path.write_text("water_l: 1\nspare: {sort: green}\n", encoding="utf-8")
    assert read(path, Kettle) == Kettle(water_l=1.0, brew=Brew(), spare=Brew(sort="green"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # unknown keys, at each level, with and without a near one
        ("watr_l: 1", "{f}: watr_l: unknown key; did you mean water_l? Allowed here: water_l, brew, spare"),
        ("water_l: 1\nhoney: 1", "{f}: honey: unknown key; Allowed here: water_l, brew, spare"),
        ("water_l: 1\nbrew: {minute: 2}", "{f}: brew.minute: unknown key; did you mean minutes? Allowed here: minutes, sort, cups"),
        ("water_l: 1\nspare: {cup: 2}", "{f}: spare.cup: unknown key; did you mean cups? Allowed here: minutes, sort, cups"),
        # wrong types and units: the field's own description says what is meant
        ("water_l: 1\nbrew: {minutes: 60s}", "{f}: brew.minutes: '60s' is not allowed: a valid number (how long it steeps)"),
        ("water_l: 1\nbrew: {minutes: true}", "{f}: brew.minutes: True is not allowed: a valid number (how long it steeps)"),
        ("water_l: '1'", "{f}: water_l: '1' is not allowed: a valid number (litres of water)"),
        ("water_l: 1\nbrew: {cups: 1.5}", "{f}: brew.cups: 1.5 is not allowed: a valid integer (cups at once)"),
        ("water_l:", "{f}: water_l: nothing is not allowed: a valid number (litres of water)"),
        ("water_l: [1]", "{f}: water_l: a list is not allowed: a valid number (litres of water)"),
        # values out of range
        ("water_l: 1\nbrew: {minutes: 0}", "{f}: brew.minutes: 0 is not allowed: greater than 0 (how long it steeps)"),
        ("water_l: 1\nbrew: {minutes: 61}", "{f}: brew.minutes: 61 is not allowed: less than or equal to 60 (how long it steeps)"),
        ("water_l: 1\nbrew: {sort: rooibos}", "{f}: brew.sort: 'rooibos' is not allowed: 'green' or 'black' (the leaves)"),
        # missing, and combinations that cannot work
        ("brew: {cups: 1}", "{f}: water_l: is missing (litres of water)"),
        ("water_l: 1\nbrew: {cups: 5}", "{f}: water_l is too little for brew.cups"),
    ],
)
def test_says_file_key_value_and_what_is_allowed(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "k.yaml"
    told = _told(path, text)
    assert expected.format(f=path) in told.splitlines()


def test_names_every_error_of_a_file(tmp_path: Path) -> None:
    told = _told(tmp_path / "k.yaml", "water_l: much\nbrew: {cups: none}\nsugar: 1\n").splitlines()
    assert len(told) == 3
    assert [line.split(": ")[1] for line in told] == ["water_l", "brew.cups", "sugar"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds nothing; a mapping of keys to values is expected"),
        ("- 1\n- 2\n", "holds a list; a mapping of keys to values is expected"),
        ("just words", "holds 'just words'; a mapping of keys to values is expected"),
        ("water_l: [1\n", "is not valid YAML"),
        ("water_l: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_refuses_what_is_no_mapping(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "k.yaml"
    assert _told(path, text).startswith(f"{path}: {expected}")


def test_a_yaml_error_names_the_line(tmp_path: Path) -> None:
    assert "line 3" in _told(tmp_path / "k.yaml", "water_l: 1\nbrew:\n  cups: 1: 2\n")


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as refused:
            read(path, Kettle)
        assert str(refused.value).startswith(f"{path}: ")


def test_refuses_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "k.yaml"
    path.write_bytes("water_l: 1 # für Tee\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 14\)"):
        read(path, Kettle)


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse({"water_l": 1.0}, Kettle, "k.yaml").water_l = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: " + b"[" * 10_000, "more than 32 levels"),
        (b"a: " + b"{a: " * 10_000, "more than 32 levels"),
        (b"a: &a {x: 1}\nb: {<<: [*a, *a]}", "an alias"),  # by nine at a time, ten lines are billions
        (b"a: &x [*x]", "an alias"),
        (b"? [a]\n: b", "a key must be a name"),
        (b"a: 2001-99-99", "this cannot be read"),
        (b"a: !!int ''", "this cannot be read"),
        (b"a: !!timestamp x", "this cannot be read"),
        (b"a: " + b"1" * 5000, "this cannot be read"),
        (b"a: 0x" + b"f" * 5000, "a number of 20000 bits"),
        (b"a: 1" + b":59" * 50, "bits; at most 63"),
        (b'a: "\\ud800"', "half a character"),
        (b'a: "x\\0"', "a NUL"),
        (b"!!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_hostile_yaml_is_refused_in_words(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        read_mapping(path)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_bytes(b"a: 1\n" + b"#" * (1 << 16))
    with pytest.raises(ConfigError, match="is longer than 65536 bytes"):
        read_mapping(path)
