"""Versions in an object store that speaks S3."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import obstore
from choral.errors import ArtifactsGone, ConfigError, UnknownArtifact
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

_ALLOWED = ("endpoint", "region")
_SILENT = timedelta(seconds=20)


class S3Artifacts:
    """Objects below a prefix of a bucket. Credentials come from the usual AWS_* variables."""

    def __init__(self, store: S3Store, url: str) -> None:
        self._store = store
        self._url = url

    @classmethod
    def at(cls, url: str) -> S3Artifacts:
        """The store at s3://bucket/prefix?endpoint=…&region=…. Raises ConfigError: that is not such a URL."""
        parts = urlsplit(url)
        options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if "@" in parts.netloc:
            raise ConfigError("artifacts: the URL holds credentials: give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        if not parts.netloc:
            raise ConfigError(f"artifacts: {url}: names no bucket; give s3://bucket/prefix")
        if unknown := sorted(set(options) - set(_ALLOWED)):
            raise ConfigError(f"artifacts: {unknown[0]!r} is not known in the URL; allowed are {' and '.join(_ALLOWED)}")
        settings: dict[str, Any] = dict(options)
        client: Any = {"timeout": _SILENT, "connect_timeout": _SILENT}
        if "endpoint" in options:
            settings.setdefault("region", "us-east-1")
            client["allow_http"] = options["endpoint"].startswith("http://")
        retries: Any = {"max_retries": 0, "retry_timeout": _SILENT}  # our own patience says what it waits for
        store = S3Store(parts.netloc, prefix=parts.path.strip("/") or None, client_options=client, retry_config=retries, **settings)
        return cls(store, f"s3://{parts.netloc}{parts.path.rstrip('/')}")

    async def put(self, key: str, content: bytes) -> None:
        """Keep `content`; the server has acknowledged it when this returns."""
        try:
            await obstore.put_async(self._store, key, content)
        except (BaseError, OSError) as error:
            raise self._gone(key, "written", error) from error

    async def get(self, key: str) -> bytes:
        """What is kept under `key`."""
        try:
            return bytes(await (await obstore.get_async(self._store, key)).bytes_async())
        except (NotFoundError, FileNotFoundError) as error:
            raise UnknownArtifact(f"{self.location(key)} does not exist") from error
        except (BaseError, OSError) as error:
            raise self._gone(key, "read", error) from error

    async def delete(self, key: str) -> None:
        """Keep nothing under `key`."""
        try:
            await obstore.delete_async(self._store, key)
        except (NotFoundError, FileNotFoundError):
            return
        except (BaseError, OSError) as error:
            raise self._gone(key, "deleted", error) from error

    async def list(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`."""
        try:
            return sorted([entry["path"] async for page in obstore.list(self._store, prefix) for entry in page])
        except (BaseError, OSError) as error:
            raise self._gone(prefix, "listed", error) from error

    def location(self, key: str) -> str:
        """The object's URL, without credentials or options."""
        return f"{self._url}/{key}"

    def local(self, key: str) -> Path | None:
        """There is no file."""
        return None

    def _gone(self, key: str, done: str, error: Exception) -> ArtifactsGone:
        return ArtifactsGone(f"{self.location(key)} cannot be {done} ({str(error).strip().partition(chr(10))[0][:200]})")
