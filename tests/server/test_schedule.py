from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from choral.config import parse
from choral.errors import ConfigError
from choral_server.schedule import Schedule, next_due
from pydantic import ValidationError

START = datetime(2025, 3, 1, 12, tzinfo=UTC)


def _due(cron: str, opened: str, zone: str | None = None, times: int = 1) -> list[str]:
    """When the next rounds are due, in UTC, each opened as soon as it is."""
    moment, due = datetime.fromisoformat(opened), []
    for _ in range(times):
        moment = next_due(Schedule(cron=cron, time_zone=zone), moment, START)
        due.append(moment.astimezone(UTC).strftime("%m-%d %H:%M"))
    return due


def test_without_a_schedule_a_round_is_always_due() -> None:
    assert next_due(Schedule(), None, START) == START
    opened = START + timedelta(hours=5)
    assert next_due(Schedule(), opened, START) == opened


def test_an_interval_counts_from_one_opening_to_the_next_and_begins_at_once() -> None:
    every = Schedule(interval_s=90.5)
    assert next_due(every, None, START) == START
    assert next_due(every, START, START) == START + timedelta(seconds=90.5)
    assert next_due(every, START + timedelta(days=3), START) == START + timedelta(days=3, seconds=90.5)


def test_cron_is_in_utc_unless_told_otherwise_and_does_not_fire_at_the_start() -> None:
    nightly = Schedule(cron="0 3 * * *")
    assert next_due(nightly, None, START) == datetime(2025, 3, 2, 3, tzinfo=UTC)
    assert next_due(nightly, None, datetime(2025, 3, 1, 3, tzinfo=UTC)) == datetime(2025, 3, 2, 3, tzinfo=UTC)
    assert next_due(nightly, datetime(2025, 3, 2, 3, 0, 7, tzinfo=UTC), START) == datetime(2025, 3, 3, 3, tzinfo=UTC)


def test_cron_in_a_zone_keeps_the_wall_clock_when_summer_time_begins() -> None:
    """Berlin went from +1 to +2 on 30 March 2025, at 02:00."""
    assert _due("30 9 * * *", "2025-03-28T12:00+00:00", "Europe/Berlin", 4) == [
        "03-29 08:30",
        "03-30 07:30",
        "03-31 07:30",
        "04-01 07:30",
    ]


def test_cron_in_a_zone_keeps_the_wall_clock_when_summer_time_ends() -> None:
    """Berlin went from +2 to +1 on 26 October 2025, at 03:00."""
    assert _due("30 9 * * *", "2025-10-24T12:00+00:00", "Europe/Berlin", 3) == ["10-25 07:30", "10-26 08:30", "10-27 08:30"]


def test_a_night_round_is_neither_lost_nor_doubled_where_its_hour_is() -> None:
    """02:30 did not exist on 30 March and came twice on 26 October: each night has one round."""
    nights = _due("30 2 * * *", "2025-03-28T12:00+00:00", "Europe/Berlin", 3)
    assert [night[:5] for night in nights] == ["03-29", "03-30", "03-31"]
    nights = _due("30 2 * * *", "2025-10-24T12:00+00:00", "Europe/Berlin", 3)
    assert [night[:5] for night in nights] == ["10-25", "10-26", "10-27"]


def test_cron_on_weekdays_and_at_steps() -> None:
    assert _due("0 8 * * mon", "2025-03-01T12:00+00:00", times=2) == ["03-03 08:00", "03-10 08:00"]
    assert _due("*/20 8-9 * * *", "2025-03-01T08:30+00:00", times=4) == ["03-01 08:40", "03-01 09:00", "03-01 09:20", "03-01 09:40"]


def test_the_moment_is_the_same_whatever_the_zone_of_the_clock() -> None:
    nightly = Schedule(cron="0 3 * * *", time_zone="America/New_York")
    here = next_due(nightly, START, START)
    there = next_due(nightly, START.astimezone(ZoneInfo("Asia/Tokyo")), START)
    assert here == there == datetime(2025, 3, 2, 8, tzinfo=UTC)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"interval_s": 5.0, "cron": "0 3 * * *"}, "give interval_s or cron, not both"),
        ({"time_zone": "Europe/Berlin"}, "time_zone belongs to cron: give cron too, or remove time_zone"),
        ({"interval_s": 5.0, "time_zone": "Europe/Berlin"}, "time_zone belongs to cron"),
        ({"cron": "0 3 * *"}, r"'0 3 \* \*' is no cron expression \(Wrong number of fields\); five fields such as '0 3 \* \* \*'"),
        ({"cron": "61 3 * * *"}, r"is no cron expression \(Bad minute\)"),
        ({"cron": "0 0 30 2 *"}, "is no cron expression"),  # there is no 30 February
        ({"cron": "@daily"}, "is no cron expression"),
        ({"cron": ""}, "is no cron expression"),
        ({"cron": "0 3 * * *", "time_zone": "Berlin"}, "'Berlin' is no time zone; write an IANA name such as Europe/Berlin"),
        ({"cron": "0 3 * * *", "time_zone": "../passwd"}, "is no time zone"),
        ({"cron": "0 3 * * *", "time_zone": "Europe"}, "is no time zone"),
    ],
)
def test_refuses_what_gives_no_schedule(content: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(content, Schedule, "choral.yaml")


def test_refuses_a_field_for_seconds() -> None:
    """Five fields are promised; a sixth would make a nightly round one of each second of a minute."""
    with pytest.raises(ValidationError, match="is no cron expression"):
        Schedule(cron="* * * * * *")


@pytest.mark.parametrize("interval_s", [0.0, -1.0, math.inf, math.nan, "60s"])
def test_refuses_an_interval_that_is_none(interval_s: object) -> None:
    with pytest.raises(ValidationError, match="interval_s"):
        Schedule(interval_s=interval_s)  # type: ignore[arg-type]


def test_a_cron_expression_that_never_comes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no day that there is|is no cron expression"):
        Schedule(cron="0 0 31 2,4,6 *")


def test_an_interval_beyond_all_dates_is_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 31536000"):
        Schedule(interval_s=1e300)
