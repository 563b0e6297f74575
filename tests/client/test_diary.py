from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from choral.errors import ConfigError
from choral_client.diary import Diary, read
from structlog.testing import capture_logs


def test_the_last_note_is_read_with_its_age(tmp_path: Path) -> None:
    before = time.time()
    Diary(tmp_path).write("attending", run="boston")
    Diary(tmp_path).write("working", round=7)
    note = read(tmp_path)
    assert (note["doing"], note["round"]) == ("working", 7)
    assert "run" not in note
    assert before <= note["at"] <= time.time()
    assert 0 <= note["age_s"] <= time.time() - before + 0.1


def test_an_old_note_is_old(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"doing": "attending", "at": time.time() - 100}))
    assert read(tmp_path)["age_s"] >= 100


def test_only_the_note_is_left_in_the_folder(tmp_path: Path) -> None:
    Diary(tmp_path).write("attending")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_note_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    Diary(tmp_path).write("attending")
    (tmp_path / ".status.json.part").mkdir()
    with capture_logs() as logs:
        Diary(tmp_path).write("working")
    assert [entry["event"] for entry in logs] == ["status not written"]
    assert read(tmp_path)["doing"] == "attending"


def test_no_note(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"status\.json: does not exist; no client has run with this state folder"):
        read(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", '{"doing": "attending"'])
def test_a_damaged_note(tmp_path: Path, damage: str) -> None:
    (tmp_path / "status.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"status\.json: is damaged \(.*\): start the client again"):
        read(tmp_path)


@pytest.mark.parametrize("note", ["[]", "7", "{}", '{"doing": "x"}', '{"doing": 1, "at": 1}', "[" * 100_000])
@pytest.mark.parametrize("at", ["NaN", "Infinity", "null", '"x"', "9" * 4000, "9" * 5000])
def test_a_note_that_is_valid_and_no_note(tmp_path: Path, note: str, at: str) -> None:
    for content in (note, f'{{"doing": "x", "at": {at}}}'):
        (tmp_path / "status.json").write_text(content)
        with pytest.raises(ConfigError, match="is damaged"):
            read(tmp_path)
