from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from choral_server.disk import needed_bytes, shortage

MIB = 1 << 20


def test_what_there_is_room_for_is_no_shortage(tmp_path: Path) -> None:
    assert shortage(tmp_path, 0) is None
    assert shortage(tmp_path, shutil.disk_usage(tmp_path).free // 2) is None


def test_a_shortage_names_folder_numbers_and_cure(tmp_path: Path) -> None:
    needed = 10**15
    told = shortage(tmp_path, needed)
    assert told is not None
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}: [0-9.]+ MB are free where a round may need {(needed + MIB) / 1e6:.1f} MB; make room", told
    )


def test_a_disk_that_fills_is_noticed_and_one_with_room_again_too(small_disk: Path) -> None:
    """It has 1 MiB, and so much is always left over."""
    wanted = -MIB // 2  # half of it
    assert shortage(small_disk, wanted) is None
    (small_disk / "other").write_bytes(bytes(700_000))
    told = shortage(small_disk, wanted)
    assert told is not None
    assert told.startswith(f"{small_disk}: 0.3 MB are free where a round may need 0.5 MB")
    (small_disk / "other").unlink()
    assert shortage(small_disk, wanted) is None


@pytest.mark.parametrize(
    ("uploads", "spool", "needed"),
    [
        (2, 1000, 2 * 100 + 2 * 100 + 2 * 130),  # all uploads fit into the spool
        (50, 1000, 1000 + 100 + 2 * 100 + 2 * 130),  # the spool, and the one that goes beyond it
        (50, 0, 100 + 2 * 100 + 2 * 130),  # one at a time
        (0, 1000, 2 * 100 + 2 * 130),
    ],
)
def test_what_a_round_may_write(uploads: int, spool: int, needed: int) -> None:
    """Uploads of 100 bytes and a version of 130; the sum has twice as many bytes as an upload."""
    assert needed_bytes(uploads, upload_bytes=100, spool_bytes=spool, version_bytes=130) == needed
