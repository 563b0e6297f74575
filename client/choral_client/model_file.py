"""The newest model that this client has, in a file, and the part of the next one that has arrived."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from contextlib import ExitStack, aclosing, suppress
from io import BufferedIOBase
from pathlib import Path

import structlog
from choral.arrival import Arrival
from choral.codecs import abilities
from choral.durable import write_all
from choral.errors import ChoralError, CorruptTransfer, Declined, InvalidMessage, Unreachable
from choral.forms import BF16, DELTA, patched, restored
from choral.messages import Form, VersionRef
from choral.wire import brief

from choral_client.backoff import Patience
from choral_client.checkpoint import Expected
from choral_client.transport import Transport

log = structlog.get_logger()
MODEL = "model.safetensors"
_ATTEMPTS = 4


class ModelFile:
    """Fetches versions into `model.safetensors`: nothing gets there that is not `expected`, or fills the disk on the way.

    Nothing is made durable: what is lost or damaged is found and fetched again.
    """

    def __init__(self, transport: Transport, folder: Path, patience: Patience, expected: Expected) -> None:
        self._transport = transport
        self._folder = folder
        self._path = folder / MODEL
        self._patience = patience
        self._expected = expected
        self._fetching = asyncio.Lock()
        self._held: VersionRef | None = None
        self._digest = b""  # of the file: another than the version's, if it was made of a rounded form
        self._offered: VersionRef | None = None
        self._looked = False  # for what an earlier start of this client has left

    def offer(self, version: VersionRef) -> None:
        """A version was announced. If the announcement has the whole of it, it need not be fetched."""
        if version.content and version.size_bytes <= self._expected.largest_bytes:
            self._offered = version

    def holds(self, version: VersionRef) -> bool:
        """Whether this version is at hand."""
        return version in (self._held, self._offered)

    async def obtain(self, version: VersionRef, *, exactly: bool = False) -> BufferedIOBase:
        """The checkpoint of a version, open for reading: the one held, or a download that is then held. One at a time.

        `exactly`: the very file of which all are told the digest, and nothing rounded. What is made of a form has a digest that the
        coordinator may give each client another of.

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
            if not self._looked:
                self._looked = True
                self._held = await asyncio.to_thread(self._kept, version)
            wrong = exactly and self._digest != version.digest
            if self._held != version or wrong or not self._path.exists():
                await self._in_some_form(version, exactly)
                self._held = version
            return self._path.open("rb")  # and it stays what it is when the next version takes the place of this one

    def _kept(self, version: VersionRef) -> VersionRef | None:
        """This version, if an earlier start of this client has left it, or what is made of one of its forms."""
        with suppress(OSError):
            if self._path.stat().st_size == version.size_bytes:
                wanted = {version.digest, *(form.digest for form in version.forms if form.name == BF16)}
                self._digest = _digest_of(self._path)
                return version if self._digest in wanted else None
        return None

    async def _in_some_form(self, version: VersionRef, exactly: bool) -> None:
        for form in version.forms:
            if exactly and form.digest != version.digest:
                continue
            if not 0 < form.size_bytes < version.size_bytes or not await asyncio.to_thread(self._can_use, form):
                continue
            try:
                await self._patiently(version, form)
                return
            except (Unreachable, Declined):
                raise
            except ChoralError as error:
                log.warning("fetched whole instead", version=version.number, form=form.name, reason=brief(str(error)))
        await self._patiently(version)

    def _can_use(self, form: Form) -> bool:
        if form.name == DELTA and "zstd" in abilities():
            with suppress(OSError):
                return _digest_of(self._path) == form.base
        return form.name == BF16

    async def _patiently(self, version: VersionRef, form: Form | None = None) -> None:
        kind = f"{form.name}." if form is not None else ""
        part = self._folder / f"model.{version.digest.hex()[:16]}.{kind}part"
        failures = 0
        while True:
            before = _size(part)
            try:
                if self._offered == version:
                    return self._take(self._offered, part)
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

    def _take(self, offered: VersionRef, part: Path) -> None:
        """Write the version that came with its announcement; should it not be what was announced, it is fetched next time."""
        self._offered = None
        self._remove_others(part)
        part.write_bytes(offered.content)
        self._complete(part, hashlib.sha256(offered.content).digest(), offered.digest, offered.number)

    async def _fetch(self, version: VersionRef, part: Path, form: Form | None) -> None:
        """One attempt, from where the last one ended."""
        self._remove_others(part)
        have, size_bytes = _size(part), version.size_bytes if form is None else form.size_bytes
        if have > size_bytes:
            part.unlink()
            have = 0
        arrival = Arrival(part, have)
        try:
            async with aclosing(self._transport.download(version, have, form)) as pieces:
                async for piece in pieces:
                    await arrival.add(piece)
            _, digest = await arrival.whole()
        finally:
            await arrival.close()
            if _size(part) == 0 < size_bytes:
                part.unlink(missing_ok=True)
        if form is None:
            return self._complete(part, digest, version.digest, version.number)
        try:
            made, digest = await asyncio.to_thread(self._make, part, form)
            self._complete(made, digest, form.digest, version.number)
        except CorruptTransfer as error:
            raise InvalidMessage(str(error)) from error  # another attempt would give the same
        finally:
            part.unlink(missing_ok=True)

    def _make(self, part: Path, form: Form) -> tuple[Path, bytes]:
        """The checkpoint file that is made of a form, and its digest. Raises InvalidMessage: the form is none."""
        made, digest = part.with_name(f"model.made.{secrets.token_hex(4)}.part"), hashlib.sha256()  # a cancelled attempt may go on
        with part.open("rb") as file, ExitStack() as stack, made.open("wb", buffering=0) as into:
            if form.name == BF16:
                pieces = restored(file, self._expected.rounded)
            else:
                pieces = patched(file, stack.enter_context(self._path.open("rb")))
            for piece in pieces:
                write_all(into.fileno(), memoryview(piece))
                digest.update(piece)
        return made, digest.digest()

    def _complete(self, part: Path, digest: bytes, expected: bytes, number: int) -> None:
        """Put the file in place of the last model, if it is what was announced; otherwise delete it."""
        try:
            if digest != expected:
                raise CorruptTransfer(f"version {number} arrived with another digest than was announced: fetch it again")
            with part.open("rb") as file:
                self._expected.places(file)
        except ChoralError:
            part.unlink(missing_ok=True)
            raise
        with suppress(FileNotFoundError):
            self._path.unlink()  # ext4 flushes a file that takes the place of another; what a power cut takes is fetched again
        part.replace(self._path)
        self._digest = digest

    def _remove_others(self, part: Path) -> None:
        for other in self._folder.glob("model*.part"):
            if other != part:
                other.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
