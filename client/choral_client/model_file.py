"""The newest model that this client has, in a file, and the part of the next one that has arrived."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from contextlib import aclosing, suppress
from pathlib import Path

import structlog
from choral.codecs import abilities
from choral.errors import ChoralError, CorruptTransfer, Declined, InvalidMessage, Unreachable
from choral.forms import BF16, DELTA, patched, restored
from choral.messages import Form, VersionRef
from choral.wire import CHUNK_BYTES, brief

from choral_client.backoff import Patience
from choral_client.checkpoint import Expected
from choral_client.transport import Transport

log = structlog.get_logger()
MODEL = "model.safetensors"
_ATTEMPTS = 4


class ModelFile:
    """Fetches versions into `model.safetensors`: nothing gets there that is not `expected`, or fills the disk on the way.

    A version comes in the first form that is announced and known here, if its base is at hand, and otherwise as it is.

    Nothing is made durable: what is lost or damaged is found and fetched again.
    """

    def __init__(self, transport: Transport, folder: Path, patience: Patience, expected: Expected) -> None:
        self._transport = transport
        self._folder = folder
        self._path = folder / MODEL
        self._patience = patience
        self._expected = expected
        self._fetching = asyncio.Lock()
        self._held: tuple[VersionRef, bytes] | None = None

    def holds(self, version: VersionRef) -> bool:
        """Whether this version is at hand."""
        return self._held is not None and self._held[0] == version

    async def obtain(self, version: VersionRef) -> bytes:
        """The checkpoint of a version: the one held, or a download that is then held. One at a time.

        Tries again where the link broke; gives up after four attempts in which nothing arrived, or which arrived damaged. Raises
        Unreachable, CorruptTransfer or UnknownVersion; Declined: the disk is full or cannot be written, or it is or must be another
        model than the one installed.
        """
        if version.size_bytes > self._expected.largest_bytes:
            raise Declined(
                f"version {version.number} is announced with {version.size_bytes} bytes; "
                f"one of the model installed here has at most {self._expected.largest_bytes}"
            )
        async with self._fetching:
            if self._held is None or not self.holds(version):
                content = await self._kept(version) if self._held is None else None
                self._held = version, content if content is not None else await self._in_some_form(version)
            return self._held[1]

    async def _kept(self, version: VersionRef) -> bytes | None:
        """What an earlier start of this client has left, if it is this version, or what is made of one of its forms."""
        if _size(self._path) != version.size_bytes:
            return None
        with suppress(OSError):
            content = await asyncio.to_thread(self._path.read_bytes)
            wanted = {version.digest, *(form.digest for form in version.forms if form.name == BF16)}
            if await asyncio.to_thread(_digest, content) in wanted:
                return content
        return None

    async def _in_some_form(self, version: VersionRef) -> bytes:
        for form in version.forms:
            if not 0 < form.size_bytes < version.size_bytes or not await asyncio.to_thread(self._can_use, form):
                continue
            try:
                return await self._patiently(version, form)
            except (Unreachable, Declined):
                raise
            except ChoralError as error:
                log.warning("fetched whole instead", version=version.number, form=form.name, reason=brief(str(error)))
        return await self._patiently(version)

    def _can_use(self, form: Form) -> bool:
        if form.name == DELTA and "zstd" in abilities():
            with suppress(OSError):
                return _digest(self._base()) == form.base
        return form.name == BF16

    def _base(self) -> bytes:
        """The model that is here, whichever it is."""
        return self._held[1] if self._held is not None else self._path.read_bytes()

    async def _patiently(self, version: VersionRef, form: Form | None = None) -> bytes:
        kind = f"{form.name}." if form is not None else ""
        part = self._folder / f"model.{version.digest.hex()[:16]}.{kind}part"
        failures = 0
        while True:
            before = _size(part)
            try:
                return await self._fetch(version, part, form)
            except OSError as error:
                raise Declined(
                    f"version {version.number} cannot be kept in {self._folder} ({error.strerror}): "
                    "make room there, or give another folder as state"
                ) from error
            except ChoralError as error:
                if not (isinstance(error, Unreachable) and _size(part) > before):
                    failures += 1
                if not error.retryable or failures == _ATTEMPTS:
                    raise
                log.warning("download failed", version=version.number, reason=str(error), have_bytes=_size(part))
            await self._patience.pause(max(failures, 1))

    async def _fetch(self, version: VersionRef, part: Path, form: Form | None) -> bytes:
        """One attempt, from where the last one ended. A model of one chunk is written in one go, when all of it is there."""
        self._remove_others(part)
        have = _size(part)
        if have > (version.size_bytes if form is None else form.size_bytes):
            part.unlink()
            have = 0
        fresh = bytearray()  # arrived and not yet written
        try:
            async with aclosing(self._transport.download(version, have, form)) as pieces:
                async for piece in pieces:
                    fresh += piece
                    if len(fresh) > CHUNK_BYTES:
                        await asyncio.to_thread(_write, part, have, fresh)
                        have, fresh = have + len(fresh), bytearray()
        except (ChoralError, asyncio.CancelledError):
            with suppress(OSError):  # the next attempt meets the same, and says so
                _write(part, have, fresh)
            raise
        return await asyncio.to_thread(self._complete, part, have, fresh, version, form)

    def _complete(self, part: Path, have: int, fresh: bytearray, version: VersionRef, form: Form | None) -> bytes:
        """Write the rest and put the file in place of the last model, if it is the version; otherwise delete it."""
        _write(part, have, fresh)
        content = part.read_bytes() if have else bytes(fresh)
        try:
            if form is not None:
                content = self._made_of(form, content)
                part.write_bytes(content)
            if _digest(content) != (version.digest if form is None else form.digest):
                told = f"version {version.number} arrived with another digest than was announced: fetch it again"
                raise CorruptTransfer(told) if form is None else InvalidMessage(told)  # another attempt would give the same
            self._expected.check(part)
        except ChoralError:
            part.unlink(missing_ok=True)
            raise
        part.replace(self._path)
        return content

    def _made_of(self, form: Form, content: bytes) -> bytes:
        """The checkpoint file. Raises InvalidMessage: the form is none."""
        file = io.BytesIO(content)
        if form.name == BF16:
            return b"".join(restored(file, self._expected.rounded))
        return b"".join(patched(file, io.BytesIO(self._base())))

    def _remove_others(self, part: Path) -> None:
        for other in self._folder.glob("model*.part"):
            if other != part:
                other.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(content: bytes | bytearray) -> bytes:
    return hashlib.sha256(content).digest()


def _write(part: Path, offset: int, data: bytearray) -> None:
    """Put `data` at its place: doing so twice, as when an attempt is abandoned halfway, changes nothing."""
    if data:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            file.seek(offset)
            file.write(data)
