"""The versions of a run: a safetensors file each, the server optimizer's state beside it, and the names `latest` and `best`.

They are kept in the artifact store. Where that is no folder, a copy on the local disk serves downloads; it can be lost.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from choral.durable import write_durably
from choral.errors import ConfigError, UnknownArtifact
from choral.messages import VersionRef

from choral_server import failpoints
from choral_server.artifacts import Artifacts
from choral_server.failpoints import Step
from choral_server.offload import offload

LATEST, BEST = "latest", "best"
_WEIGHTS, _OPTIMIZER = ".safetensors", ".optimizer.safetensors"


class Checkpoints:
    """The versions of `run`, of which the newest `keep` stay (None: all); `folder` has the copies, and the names."""

    def __init__(self, artifacts: Artifacts, folder: Path, run: str, keep: int | None = None) -> None:
        self._artifacts = artifacts
        self._prefix = f"runs/{run}/versions/"
        self._local = artifacts.local(self._prefix) or folder / self._prefix
        self._keep = keep

    def path(self, number: int) -> Path:
        """The local file of version `number`."""
        return self._local / f"{number:06d}{_WEIGHTS}"

    def location(self, number: int) -> str:
        """Where it is kept, for people."""
        return self._artifacts.location(self._key(number))

    async def write(self, number: int, content: bytes, optimizer: bytes | None = None) -> VersionRef:
        """Store a version, the optimizer's state first, so that a version that is there is whole. Raises ArtifactsGone."""
        if optimizer is not None:
            await self._artifacts.put(self._key(number, _OPTIMIZER), optimizer)
        await self._artifacts.put(self._key(number), content)
        await self._copy(number, content)
        failpoints.reach(Step.CHECKPOINT_WRITTEN.value)
        return await offload(len(content), _reference, number, content)

    async def fetch(self, number: int, expected: VersionRef | None = None) -> Path:
        """The local file of a version, fetched if it is not here. Raises ConfigError: it is gone or damaged; ArtifactsGone."""
        path = self.path(number)
        content = await asyncio.to_thread(path.read_bytes) if path.exists() else None
        if content is None or (expected is not None and _reference(number, content) != expected):
            try:
                content = await self._artifacts.get(self._key(number))
            except UnknownArtifact as error:
                raise ConfigError(f"version {number} is missing ({error}): restore a backup, or give another run.name") from error
            if expected is not None and _reference(number, content) != expected:
                raise ConfigError(f"version {number} is damaged ({self.location(number)}): restore it from a backup")
            await self._copy(number, content)
        return path

    async def optimizer(self, number: int) -> bytes | None:
        """The server optimizer's state behind a version, if it has any."""
        try:
            return await self._artifacts.get(self._key(number, _OPTIMIZER))
        except UnknownArtifact:
            return None

    def point(self, name: str, number: int) -> None:
        """Let the file `name` in the folder mean version `number`, atomically."""
        aside = self._local / f".{name}.aside"
        aside.unlink(missing_ok=True)
        aside.symlink_to(self.path(number).name)
        aside.replace(self._local / f"{name}{_WEIGHTS}")

    async def prune(self, wanted: set[int], latest: int) -> None:
        """Delete all but the newest `keep` versions and those in `wanted`, and what a crash left beyond `latest`."""
        if self._keep is None:
            return
        kept = wanted | set(range(latest + 1 - self._keep, latest + 1))
        for key in await self._artifacts.list(self._prefix):
            number = key.removeprefix(self._prefix).partition(".")[0]
            if number.isdecimal() and int(number) not in kept:
                await self._artifacts.delete(key)
                self.path(int(number)).unlink(missing_ok=True)

    async def _copy(self, number: int, content: bytes) -> None:
        """Keep a local copy, if the store itself is not local."""
        if self._artifacts.local(self._key(number)) is None:
            self._local.mkdir(parents=True, exist_ok=True)
            await offload(len(content), write_durably, self.path(number), content)

    def _key(self, number: int, suffix: str = _WEIGHTS) -> str:
        return f"{self._prefix}{number:06d}{suffix}"


def _reference(number: int, content: bytes) -> VersionRef:
    return VersionRef(number, hashlib.sha256(content).digest(), len(content))
