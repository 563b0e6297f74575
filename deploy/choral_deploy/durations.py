"""Durations as people write them."""

from __future__ import annotations

import re

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def seconds(text: str) -> float:
    """Of 90s, 30m, 1.5h or 7d. Raises ConfigError."""
    from choral.errors import ConfigError

    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is no duration: write a number and a unit, for example 90s, 30m, 1h or 7d")
    return float(match[1]) * _UNITS[match[2]]
