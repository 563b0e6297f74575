"""What members of a federation may be called: names become file names, log entries and certificate subjects."""

from __future__ import annotations

import re

NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
ALLOWED = "1 to 64 letters, digits, dots, dashes and underscores, not beginning with a dot"


def is_name(text: str) -> bool:
    """Whether somebody may be called so."""
    return re.fullmatch(NAME, text) is not None and not text.endswith("\n")
