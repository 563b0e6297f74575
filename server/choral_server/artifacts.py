"""Where versions are kept: a folder, or an object store."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Protocol

from choral.durable import make_folder_durably, sync_folder, write_durably
from choral.errors import ArtifactsGone, ConfigError, UnknownArtifact

from choral_server.offload import offload

_PROBE = "choral-probe"


class Artifacts(Protocol):
    """Files by key, such as runs/run/versions/000001.safetensors. Raises ArtifactsGone where the store does not answer."""

    async def put(self, key: str, content: bytes) -> None:
        """Keep `content` under `key`, in place of what was there: whole or not at all, and for good when this returns."""

    async def put_file(self, key: str, path: Path) -> None:
        """Keep the file at `path`, which is on the disk for good, as `put` keeps bytes; a store that is a folder takes it away."""

    async def get(self, key: str) -> bytes:
        """What is kept under `key`. Raises UnknownArtifact."""

    async def get_file(self, key: str, path: Path) -> None:
        """Write what is kept under `key` to a new file at `path`. Raises UnknownArtifact."""

    async def delete(self, key: str) -> None:
        """Keep nothing under `key`."""

    async def list(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, which ends in a slash; sorted."""

    def location(self, key: str) -> str:
        """Where that is, for people: a path or a URL."""

    def local(self, key: str) -> Path | None:
        """The file itself, if the store is a folder."""


class FolderArtifacts:
    """Files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, key: str, content: bytes) -> None:
        """Keep `content`; file and name are on the disk when this returns."""
        path = self._folder / key
        try:
            make_folder_durably(path.parent)
            await offload(len(content), write_durably, path, content)
        except OSError as error:
            raise ArtifactsGone(f"{path} cannot be written ({error.strerror})") from error

    async def put_file(self, key: str, path: Path) -> None:
        """Give the file at `path`, which is on the same disk, its name; it may have it already."""
        there = self._folder / key
        try:
            make_folder_durably(there.parent)
            path.replace(there)
            sync_folder(there.parent)
        except OSError as error:
            raise ArtifactsGone(f"{there} cannot be written ({error.strerror})") from error

    async def get(self, key: str) -> bytes:
        """What is kept under `key`."""
        path = self._folder / key
        try:
            return await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError as error:
            raise UnknownArtifact(f"{path} does not exist") from error
        except OSError as error:
            raise ArtifactsGone(f"{path} cannot be read ({error.strerror})") from error

    async def get_file(self, key: str, path: Path) -> None:
        """Copy the file."""
        there = self._folder / key
        try:
            await asyncio.to_thread(shutil.copyfile, there, path)
        except FileNotFoundError as error:
            raise UnknownArtifact(f"{there} does not exist") from error
        except OSError as error:
            raise ArtifactsGone(f"{there} cannot be copied to {path} ({error.strerror})") from error

    async def delete(self, key: str) -> None:
        """Keep nothing under `key`."""
        path = self._folder / key
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactsGone(f"{path} cannot be deleted ({error.strerror})") from error

    async def list(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`; names in it are links and do not count."""
        folder = self._folder / prefix
        try:
            files = [path for path in folder.rglob("[!.]*") if path.is_file() and not path.is_symlink()]
        except OSError as error:
            raise ArtifactsGone(f"{folder} cannot be listed ({error.strerror})") from error
        return sorted(path.relative_to(self._folder).as_posix() for path in files)

    def location(self, key: str) -> str:
        """The file's path."""
        return str(self._folder / key)

    def local(self, key: str) -> Path | None:
        """The file."""
        return self._folder / key


async def open_artifacts(url: str | None, folder: Path) -> Artifacts:
    """The store at `url`, or `folder` if there is none. Raises ConfigError: it is no such URL, or the store cannot be used."""
    if url is None:
        return FolderArtifacts(folder)
    scheme = url.partition("://")[0]
    if scheme != "s3":
        shown = "what is given" if "@" in scheme else repr(scheme)  # it may hold a password
        raise ConfigError(f"artifacts: {shown} is not known; give s3://bucket/prefix, or nothing for the state folder")
    try:
        from choral_server.s3 import S3Artifacts
    except ImportError as error:
        raise ConfigError("artifacts: S3 needs obstore: pip install 'choral[s3]'") from error
    store = S3Artifacts.at(url)
    try:
        await store.put(_PROBE, b"choral")
        await store.get(_PROBE)
        await store.delete(_PROBE)
    except (ArtifactsGone, UnknownArtifact) as error:
        raise ConfigError(
            f"artifacts: {error}: see that the bucket exists, and that the AWS_* credentials may read, write and delete in it"
        ) from error
    return store
