"""The versions of a run: a safetensors file each, the server optimizer's state beside it, and the names `latest` and `best`.

They are kept in the artifact store. Where that is no folder, a copy on the local disk serves downloads; it can be lost.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import structlog
from choral.durable import remove_leftovers, write_durably
from choral.errors import ArtifactsGone, ConfigError, UnknownArtifact
from choral.messages import VersionRef

from choral_server import failpoints
from choral_server.artifacts import Artifacts
from choral_server.failpoints import Step
from choral_server.intake import digest_of
from choral_server.offload import offload

log = structlog.get_logger()
LATEST, BEST = "latest", "best"
_WEIGHTS, _OPTIMIZER = ".safetensors", ".optimizer.safetensors"


class Checkpoints:
    """The versions of `run`, of which the newest `keep` stay (None: all); `folder` has the copies, and the names."""

    def __init__(self, artifacts: Artifacts, folder: Path, run: str, keep: int | None = None) -> None:
        self._artifacts = artifacts
        self._prefix = f"runs/{run}/versions/"
        self._local = artifacts.local(self._prefix) or folder / self._prefix
        self._keep = keep
        remove_leftovers(self._local)

    def path(self, number: int) -> Path:
        """The local file of version `number`."""
        return self._local / f"{number:06d}{_WEIGHTS}"

    def location(self, number: int) -> str:
        """Where it is kept, for people."""
        return self._artifacts.location(self._key(number))

    async def numbers(self) -> list[int]:
        """Which versions are kept, the oldest first. Raises ArtifactsGone."""
        names = [key.removeprefix(self._prefix) for key in await self._artifacts.list(self._prefix)]
        stems = (name.removesuffix(_WEIGHTS) for name in names if name.endswith(_WEIGHTS))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    async def write(self, number: int, content: bytes, optimizer: bytes | None = None) -> VersionRef:
        """Store a version, the optimizer's state first, so that a version that is there is whole. Raises ArtifactsGone."""
        if optimizer is not None:
            await self._artifacts.put(self._key(number, _OPTIMIZER), optimizer)
        else:
            await self._artifacts.delete(self._key(number, _OPTIMIZER))  # that of an attempt that died, with another strategy
        await self._artifacts.put(self._key(number), content)
        await self._copy(number, content)
        failpoints.reach(Step.CHECKPOINT_WRITTEN.value)
        return await offload(len(content), _reference, number, content)

    async def fetch(self, number: int, expected: VersionRef | None = None) -> Path:
        """The local file of a version, fetched if it is not here. Raises ConfigError: it is gone or damaged; ArtifactsGone."""
        path = self.path(number)
        if path.exists() and (expected is None or await offload(expected.size_bytes, digest_of, path) == expected.digest):
            return path
        try:
            content = await self._artifacts.get(self._key(number))
        except UnknownArtifact as error:
            raise ConfigError(f"version {number} is missing ({error}): restore a backup, or give another run.name") from error
        if expected is not None and await offload(len(content), _reference, number, content) != expected:
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
        try:
            aside.unlink(missing_ok=True)
            aside.symlink_to(self.path(number).name)
            aside.replace(self._local / f"{name}{_WEIGHTS}")
        except OSError as error:  # the database says which is which: this is for people
            log.warning("name not moved", name=str(self._local / f"{name}{_WEIGHTS}"), version=number, reason=error.strerror)

    async def prune(self, wanted: set[int], latest: int) -> None:
        """Delete all but the newest `keep` versions, up to `latest`, and those in `wanted`.

        What a crash left beyond `latest` is written anew by the next version.
        """
        if self._keep is None:
            return
        for key in reversed(await self._artifacts.list(self._prefix)):  # weights before their optimizer's state: see `write`
            if self._can_go(key.removeprefix(self._prefix), wanted, latest):
                await self._artifacts.delete(key)
        for path in self._local.glob("[0-9]*"):  # copies
            if self._can_go(path.name, wanted, latest):
                path.unlink(missing_ok=True)

    def _can_go(self, name: str, wanted: set[int], latest: int) -> bool:
        number = name.partition(".")[0]
        if self._keep is None or not number.isdecimal() or int(number) in wanted:
            return False
        return int(number) <= latest - self._keep

    async def _copy(self, number: int, content: bytes) -> None:
        """Keep a local copy, if the store itself is not local."""
        if self._artifacts.local(self._key(number)) is not None:
            return
        path = self.path(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            await offload(len(content), write_durably, path, content)
        except OSError as error:
            raise ArtifactsGone(f"{path} cannot be written ({error.strerror})") from error

    def _key(self, number: int, suffix: str = _WEIGHTS) -> str:
        return f"{self._prefix}{number:06d}{suffix}"


def _reference(number: int, content: bytes) -> VersionRef:
    return VersionRef(number, hashlib.sha256(content).digest(), len(content))
