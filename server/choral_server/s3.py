"""Versions in an object store that speaks S3."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from choral.errors import ArtifactsGone, ConfigError, UnknownArtifact
from obstore.exceptions import BaseError
from obstore.store import S3Store

from choral_server.offload import offload

_ALLOWED = ("endpoint", "region")
_SILENT_S = 30.0  # for as long one request, with at most a piece of the content, may take
_UP_BYTES, _UP_AT_A_TIME = 5 << 20, 4  # S3 takes no smaller parts
_DOWN_BYTES = 8 << 20
_INSTANCE_ROLES = "169.254.169.254"  # asked for credentials when the environment has none


class S3Artifacts:
    """Objects below a prefix of a bucket. Credentials come from the usual AWS_* variables."""

    def __init__(self, store: S3Store, url: str, endpoint: str) -> None:
        self._store = store
        self._url = url
        self._endpoint = endpoint

    @classmethod
    def at(cls, url: str, silent_s: float = _SILENT_S) -> S3Artifacts:
        """The store at s3://bucket/prefix?endpoint=…&region=…. Raises ConfigError: that is not such a URL.

        A request that takes `silent_s` seconds has failed.
        """
        bucket, prefix, options = _parts(url)
        settings: dict[str, Any] = dict(options)
        # a request's time, not a transfer's: what is large goes in pieces
        client: Any = {"timeout": timedelta(seconds=silent_s), "connect_timeout": timedelta(seconds=silent_s)}
        if "endpoint" in options:
            client["allow_http"] = options["endpoint"].startswith("http://")
        retries: Any = {"max_retries": 0}  # our own patience says what it waits for
        try:
            store = S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=retries, **settings)
        except (BaseError, ValueError) as error:
            raise ConfigError(f"artifacts: s3://{bucket}/{prefix}: {_reason(error)}") from error
        return cls(store, f"s3://{bucket}/{prefix}".rstrip("/"), options.get("endpoint", ""))

    async def put(self, key: str, content: bytes) -> None:
        """Keep `content`; the server has acknowledged it when this returns."""
        await self._put(key, content)

    async def put_file(self, key: str, path: Path) -> None:
        """Keep the file at `path`, which stays where it is; of it, only the parts that are on their way are in memory."""
        await self._put(key, path)

    async def _put(self, key: str, content: bytes | Path) -> None:
        try:
            await obstore.put_async(self._store, key, content, chunk_size=_UP_BYTES, max_concurrency=_UP_AT_A_TIME)
        except (BaseError, OSError) as error:
            raise self._gone(key, "written", error) from error

    async def get(self, key: str) -> bytes:
        """What is kept under `key`."""
        content = bytearray()
        async for piece in self._pieces(key):
            content += piece
        return bytes(content)

    async def get_file(self, key: str, path: Path) -> None:
        """Write it to `path`, of which one piece at a time is in memory."""
        with path.open("wb", buffering=0) as file:
            async for piece in self._pieces(key):
                await offload(len(piece), file.write, piece)

    async def _pieces(self, key: str) -> AsyncIterator[bytes]:
        try:
            answer = await obstore.get_async(self._store, key)
            size = answer.meta["size"]
            if size <= _DOWN_BYTES:
                yield bytes(await answer.bytes_async())
                return
            for start in range(0, size, _DOWN_BYTES):
                yield bytes(await obstore.get_range_async(self._store, key, start=start, end=min(start + _DOWN_BYTES, size)))
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):  # whoever takes that for a version without its state would lose the state
                raise self._gone(key, "read", error) from error
            raise UnknownArtifact(f"{self.location(key)} does not exist") from error
        except (BaseError, OSError) as error:
            raise self._gone(key, "read", error) from error

    async def delete(self, key: str) -> None:
        """Keep nothing under `key`."""
        try:
            await obstore.delete_async(self._store, key)
        except (BaseError, OSError) as error:
            if not isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error):
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
        where = f" at {self._endpoint}" if self._endpoint else ""
        return ArtifactsGone(f"{self.location(key)} cannot be {done}{where} ({_reason(error)})")


def _parts(url: str) -> tuple[str, str, dict[str, str]]:
    """Bucket, prefix and options of a URL. Raises ConfigError, without what may be a password."""
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(pairs)
        endpoint = urlsplit(options.get("endpoint", "http://given.elsewhere"))
        _ = endpoint.port
    except ValueError:
        raise ConfigError("artifacts: is no URL: give s3://bucket/prefix?endpoint=https://host:port&region=name") from None
    if "@" in parts.netloc or "@" in endpoint.netloc:
        raise ConfigError("artifacts: the URL holds credentials: give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if not parts.netloc:
        raise ConfigError(f"artifacts: {url}: names no bucket; give s3://bucket/prefix")
    if unknown := sorted(set(options) - set(_ALLOWED)):
        raise ConfigError(f"artifacts: {unknown[0]!r} is not known in the URL; allowed are {' and '.join(_ALLOWED)}")
    if parts.fragment or len(pairs) != len(options) or not all(options.values()):
        raise ConfigError(f"artifacts: {url}: give each of {' and '.join(_ALLOWED)} once and with a value, and no #")
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname:
        raise ConfigError(f"artifacts: endpoint {options['endpoint']!r} is no address; give https://host:port")
    return parts.netloc, parts.path.strip("/"), options


def _reason(error: Exception) -> str:
    """Why, in a few words that are the same each time: how long a request took, and its id, are left out."""
    told = str(error)
    if _INSTANCE_ROLES in told:
        return "there are no credentials: AWS_ACCESS_KEY_ID is not set, and this machine has no role of its own"
    if (said := re.search(r"<Code>(.*?)</Code>(?:<Message>(.*?)</Message>)?", told)) is not None:
        return ": ".join(filter(None, said.groups()))
    return told.strip().partition("\n")[0].rpartition(" - ")[2][:200]
