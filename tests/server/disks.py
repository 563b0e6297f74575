"""A real disk that is soon full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A new folder that is a disk of its own."""
    folder.mkdir()
    mount = shutil.which("mount")
    options = f"size={size_bytes}"
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if not done or done.returncode != 0:
        if os.environ.get("CHORAL_REQUIRE_ALL") == "1":
            pytest.fail("a small disk cannot be mounted: run as root where mounting is allowed")
        pytest.skip("a small disk cannot be mounted: that takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte of a disk free; the file to delete, to have all back."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    with disk(tmp_path / "disk", 1 << 20) as folder:
        yield folder
