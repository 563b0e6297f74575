"""When a round is due. Pure: the clock is an argument."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Self
from zoneinfo import ZoneInfo

from choral.config import Settings
from cronsim import CronSim, CronSimError
from pydantic import Field, model_validator


class Schedule(Settings):
    """Opens rounds at an interval or by a cron expression; with neither, as soon as a quorum attends."""

    interval_s: Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)] | None = None
    """seconds from the opening of one round to the opening of the next"""
    cron: str | None = None
    """five cron fields, for example "0 3 * * *" for three o'clock each night"""
    time_zone: str | None = None
    """IANA name of the zone in which `cron` is meant, for example Europe/Berlin; UTC if not given"""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.interval_s is not None and self.cron is not None:
            raise ValueError("give interval_s or cron, not both")
        if self.time_zone is not None and self.cron is None:
            raise ValueError("time_zone belongs to cron: give cron too, or remove time_zone")
        if self.cron is not None:
            if len(self.cron.split()) > 5:  # a sixth would mean seconds, or years
                raise ValueError(f"{self.cron!r} is no cron expression; write five fields: minute, hour, day, month, weekday")
            now = datetime.now(self.zone)
            try:
                next(CronSim(self.cron, now))
            except StopIteration:
                raise ValueError(f"{self.cron!r} means no day that there is in the next 50 years") from None
            except (CronSimError, ValueError, OverflowError) as error:
                raise ValueError(f"{self.cron!r} is no cron expression ({error}); five fields such as '0 3 * * *'") from error
        return self

    @property
    def zone(self) -> ZoneInfo:
        """The zone of `cron`."""
        try:
            return ZoneInfo(self.time_zone or "UTC")
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{self.time_zone!r} is no time zone; write an IANA name such as Europe/Berlin") from error


def next_due(schedule: Schedule, opened: datetime | None, started: datetime) -> datetime:
    """When the next round is due, given when the last one opened (None: none yet) and when the run started.

    With cron, the first moment after that, so that a start does not run a round at once; otherwise the first round is due at
    the start.
    """
    if schedule.cron is not None:
        return next(CronSim(schedule.cron, (opened or started).astimezone(schedule.zone)))
    if schedule.interval_s is not None and opened is not None:
        return opened + timedelta(seconds=schedule.interval_s)
    return opened or started
