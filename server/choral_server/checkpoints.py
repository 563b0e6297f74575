"""The versions of a run: a safetensors file each, the server optimizer's state beside it, and the names `latest` and `best`.

They are kept in the artifact store. Where that is no folder, a copy on the local disk serves downloads; it can be lost.
A version is written to the local disk first, aside, and then published: neither ever is in memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from choral.durable import aside, make_folder_durably, remove_leftovers, sync_folder
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

Make = Callable[[Path, Path], Awaitable[bytes]]
"""Writes a version's file, and that of the optimizer's state if there is any, for good; the SHA-256 of the first."""


@dataclass(frozen=True)
class Draft:
    """A version that lies aside: nobody knows of it yet."""

    version: VersionRef
    has_state: bool


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

    def here(self, number: int) -> tuple[Path, Path | None]:
        """The local files of the version that was published last: its own, and that of the optimizer's state, if it has any."""
        state = self._state_path(number)
        return self.path(number), state if state.exists() else None

    async def numbers(self) -> list[int]:
        """Which versions are kept, the oldest first. Raises ArtifactsGone."""
        names = [key.removeprefix(self._prefix) for key in await self._artifacts.list(self._prefix)]
        stems = (name.removesuffix(_WEIGHTS) for name in names if name.endswith(_WEIGHTS))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    async def draft(self, number: int, make: Make) -> Draft:
        """Write a version aside. Raises ArtifactsGone: the local disk does not take it."""
        weights, state = aside(self.path(number)), aside(self._state_path(number))
        with _writing(self.path(number)):
            make_folder_durably(self._local)
            state.unlink(missing_ok=True)  # that of a draft that was never published
            with _whole_or_gone(weights, state):
                digest = await make(weights, state)
            return Draft(VersionRef(number, digest, weights.stat().st_size), state.exists())

    async def publish(self, draft: Draft) -> VersionRef:
        """Store a draft, the optimizer's state first, so that a version that is there is whole. Raises ArtifactsGone."""
        number = draft.version.number
        if draft.has_state:
            await self._put(self._key(number, _OPTIMIZER), self._state_path(number))
        else:  # that of an attempt that died, with another strategy
            await self._artifacts.delete(self._key(number, _OPTIMIZER))
            self._state_path(number).unlink(missing_ok=True)
        await self._put(self._key(number), self.path(number))
        failpoints.reach(Step.CHECKPOINT_WRITTEN.value)
        return draft.version

    async def fetch(self, number: int, expected: VersionRef | None = None) -> Path:
        """The local file of a version, fetched if it is not here. Raises ConfigError: it is gone or damaged; ArtifactsGone."""
        path = self.path(number)
        if path.exists() and (expected is None or await _is(path, expected)):
            return path
        fetched = await self._fetched(self._key(number), path)
        if fetched is None:
            where = "does not exist): restore a backup, or give another run.name"
            raise ConfigError(f"version {number} is missing ({self.location(number)} {where}")
        if expected is not None and not await _is(fetched, expected):
            raise ConfigError(f"version {number} is damaged ({self.location(number)}): restore it from a backup")
        return self._taken(fetched, path)

    async def state(self, number: int) -> Path | None:
        """The local file of the server optimizer's state behind a version, if it has any. Raises ArtifactsGone."""
        path = self._state_path(number)
        fetched = await self._fetched(self._key(number, _OPTIMIZER), path)
        return self._taken(fetched, path) if fetched is not None else None

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

    async def _put(self, key: str, path: Path) -> None:
        """Keep what lies aside under `key` and at `path`; an earlier attempt may have come some of the way."""
        lying = aside(path) if aside(path).exists() else path
        await self._artifacts.put_file(key, lying)
        self._taken(lying, path)

    async def _fetched(self, key: str, path: Path) -> Path | None:
        """What is kept under `key`: `path` itself, or a new file beside it; None: nothing is."""
        if self._artifacts.local(key) is not None:
            return path if path.exists() else None
        with _writing(path):
            make_folder_durably(self._local)
            try:
                with _whole_or_gone(aside(path)):
                    await self._artifacts.get_file(key, aside(path))
            except UnknownArtifact:
                return None
        return aside(path)

    def _taken(self, lying: Path, path: Path) -> Path:
        """Give what lies aside its name; it may have it already."""
        if lying != path and lying.exists():
            with _writing(path):
                lying.replace(path)
                sync_folder(path.parent)
        return path

    def _state_path(self, number: int) -> Path:
        return self._local / f"{number:06d}{_OPTIMIZER}"

    def _key(self, number: int, suffix: str = _WEIGHTS) -> str:
        return f"{self._prefix}{number:06d}{suffix}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactsGone(f"{path} cannot be written ({error.strerror or error})") from error


@contextmanager
def _whole_or_gone(*paths: Path) -> Iterator[None]:
    """Leave nothing of files that are not written to their end: what fills a disk must not stay there."""
    try:
        yield
    except BaseException:
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


async def _is(path: Path, expected: VersionRef) -> bool:
    return await offload(expected.size_bytes, digest_of, path) == expected.digest
