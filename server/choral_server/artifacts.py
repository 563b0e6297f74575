"""Where versions are kept: a folder, or an object store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from choral.durable import remove_leftovers, write_durably
from choral.errors import ArtifactsGone, ConfigError, UnknownArtifact

from choral_server.offload import offload

_PROBE = ".choral-probe"


class Artifacts(Protocol):
    """Files by key, such as runs/run/versions/000001.safetensors. Raises ArtifactsGone where the store does not answer."""

    async def put(self, key: str, content: bytes) -> None:
        """Keep `content` under `key`, in place of what was there: whole or not at all, and for good when this returns."""

    async def get(self, key: str) -> bytes:
        """What is kept under `key`. Raises UnknownArtifact."""

    async def delete(self, key: str) -> None:
        """Keep nothing under `key`."""

    async def list(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, sorted; it ends in a slash."""

    def location(self, key: str) -> str:
        """Where that is, for people: a path or a URL."""

    def local(self, key: str) -> Path | None:
        """The file itself, if the store is a folder."""


class FolderArtifacts:
    """Files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, key: str, content: bytes) -> None:
        path = self._folder / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            await offload(len(content), write_durably, path, content)
        except OSError as error:
            raise ArtifactsGone(f"{path} cannot be written ({error.strerror})") from error

    async def get(self, key: str) -> bytes:
        path = self._folder / key
        try:
            return await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError as error:
            raise UnknownArtifact(f"{path} does not exist") from error
        except OSError as error:
            raise ArtifactsGone(f"{path} cannot be read ({error.strerror})") from error

    async def delete(self, key: str) -> None:
        (self._folder / key).unlink(missing_ok=True)

    async def list(self, prefix: str) -> list[str]:
        folder = self._folder / prefix
        if not folder.is_dir():
            return []
        remove_leftovers(folder)
        return sorted(f"{prefix}{path.name}" for path in folder.iterdir() if path.is_file() and not path.is_symlink())

    def location(self, key: str) -> str:
        return str(self._folder / key)

    def local(self, key: str) -> Path | None:
        return self._folder / key


async def open_artifacts(url: str | None, folder: Path) -> Artifacts:
    """The store at `url`, or `folder` if there is none. Raises ConfigError: it is no such URL, or the store cannot be used."""
    if url is None:
        return FolderArtifacts(folder)
    scheme = urlsplit(url).scheme
    if scheme != "s3":
        raise ConfigError(f"artifacts: {scheme or url!r} is not known; give s3://bucket/prefix, or nothing for the state folder")
    try:
        from choral_server.s3 import S3Artifacts
    except ImportError as error:
        raise ConfigError("artifacts: S3 needs obstore: pip install 'choral[s3]'") from error
    store = S3Artifacts.at(url)
    try:
        await store.put(_PROBE, b"")
        await store.delete(_PROBE)
    except ArtifactsGone as error:
        raise ConfigError(f"artifacts: {error}: look whether the bucket exists and AWS_* credentials may write to it") from error
    return store
