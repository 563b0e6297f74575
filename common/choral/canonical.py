"""One text for one value, so that equal values have equal digests wherever and whenever they are written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def canonical(value: Mapping[str, Any]) -> str:
    """JSON in ASCII with sorted keys and no spaces: any string is escaped alike, whatever a database or a file makes of Unicode.

    Raises ValueError: NaN or an infinity, for which JSON has no numbers.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
