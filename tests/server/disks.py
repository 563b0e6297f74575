"""A real disk that is soon full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if not done or done.returncode != 0:
        if os.environ.get("CHORAL_REQUIRE_ALL") == "1":
            pytest.fail("a small disk cannot be mounted: run as root where mounting is allowed")
        pytest.skip("a small disk cannot be mounted: that takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)
