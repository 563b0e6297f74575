"""Versions on disk: one safetensors file each, plus the names `latest` and `best`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from choral.messages import VersionRef

LATEST, BEST = "latest", "best"


class Checkpoints:
    """The versions of one run, as files in a folder. A file is complete or absent: it is written aside and renamed."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._keep = keep

    def path(self, number: int) -> Path:
        """Where version `number` is kept."""
        return self._folder / f"{number:06d}.safetensors"

    def name(self, name: str) -> Path:
        """Where `latest` or `best` is found."""
        return self._folder / f"{name}.safetensors"

    def write(self, number: int, content: bytes) -> VersionRef:
        """Store a version."""
        aside = self._folder / f".{number:06d}.part"
        aside.write_bytes(content)
        aside.replace(self.path(number))
        return VersionRef(number, hashlib.sha256(content).digest(), len(content))

    def reference(self, number: int) -> VersionRef:
        """Number, digest and size of a stored version."""
        content = self.path(number).read_bytes()
        return VersionRef(number, hashlib.sha256(content).digest(), len(content))

    def point(self, name: str, number: int) -> None:
        """Let `name` mean version `number`, atomically."""
        aside = self._folder / f".{name}.part"
        aside.unlink(missing_ok=True)
        aside.symlink_to(self.path(number).name)
        aside.replace(self.name(name))

    def prune(self, wanted: set[int]) -> None:
        """Delete all but the newest `keep` versions and those in `wanted`."""
        if self._keep is None:
            return
        numbers = sorted(int(path.stem) for path in self._folder.glob("[0-9]*.safetensors"))
        for number in set(numbers[: -self._keep]) - wanted:
            self.path(number).unlink()
