"""Whether the disk can take what a round may bring."""

from __future__ import annotations

import shutil
from pathlib import Path

_MARGIN_BYTES = 1 << 20


def shortage(folder: Path, needed_bytes: int) -> str | None:
    """Why `needed_bytes`, and a little more, cannot be written to the disk of `folder`; None: they can."""
    free = shutil.disk_usage(folder).free
    needed = needed_bytes + _MARGIN_BYTES
    if free >= needed:
        return None
    return f"{folder}: {free / 1e6:.1f} MB are free where a round may need {needed / 1e6:.1f} MB; make room"


def needed_bytes(uploads: int, upload_bytes: int, spool_bytes: int, version_bytes: int) -> int:
    """What a round may write: uploads, of which `spool_bytes` and one more are kept at a time, the sum, and the next version."""
    return min(uploads * upload_bytes, spool_bytes + upload_bytes) + 2 * upload_bytes + 2 * version_bytes
