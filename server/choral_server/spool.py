"""Uploads on disk, from the first verified chunk until a version that contains them is published.

spool/RUN/ROUND/CLIENT.DIGEST.part      arriving: as long as what has been verified
spool/RUN/ROUND/CLIENT.DIGEST.upload    whole and verified
spool/RUN/ROUND/sum                     an accumulator; the uploads that it contains are deleted
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from choral.arrival import Arrival
from choral.durable import remove_leftovers
from choral.errors import CorruptTransfer, OutOfSpace, Unreachable
from choral.messages import UploadHeader

from choral_server import failpoints
from choral_server.failpoints import Step
from choral_server.intake import digest_of
from choral_server.offload import offload
from choral_server.rounds import OPEN_PARTS, Part, PartState, Round
from choral_server.troubles import Troubles

DISK = "disk"
_PROBE_BYTES = 64 << 10
_ANOTHER = "the result arrived whole, but not with the digest that was announced: send it again from the start"


class RoundSpool:
    """The uploads of one round."""

    def __init__(self, folder: Path, troubles: Troubles) -> None:
        self._folder = folder
        self._troubles = troubles
        self._arrivals: dict[str, Arrival] = {}
        self._parts: dict[str, Path] | None = None  # the newest of each client

    @property
    def sum_path(self) -> Path:
        """Where an accumulator is kept."""
        return self._folder / "sum"

    def path(self, client: str, digest: bytes) -> Path:
        """Where the whole upload of a client with this payload is kept."""
        return self._folder / f"{client}.{digest.hex()[:16]}.upload"

    def held(self, header: UploadHeader) -> int:
        """How many bytes of this upload arrived in an earlier attempt."""
        if self.path(header.client, header.digest).exists():
            return header.payload_bytes
        part = self._part(header)
        return min(part.stat().st_size, header.payload_bytes) if part.exists() else 0

    async def store(self, header: UploadHeader, pieces: AsyncIterator[bytes]) -> Path:
        """Write the pieces behind the first `header.offset` bytes; the path of the whole upload, verified.

        A client has one attempt at a time; a new one takes over. What was verified stays for the next attempt, unless the whole is
        something else. Nothing is made durable: what a power cut takes is asked for again.

        Raises CorruptTransfer: another number of bytes came than announced, or they are not those announced; Unreachable: another
        attempt took over, or the round ended; OutOfSpace: they cannot be written.
        """
        path, part = self.path(header.client, header.digest), self._part(header)
        if header.offset == header.payload_bytes and path.exists():  # only the answer was lost
            return path
        with self._writable():
            await self._stop_others(header.client)
            self._make_room(part, header.client)
            async with self._arrival(header, part) as arrival:
                async for piece in pieces:
                    await arrival.add(piece)
                received, digest = await arrival.whole()
                if received != header.payload_bytes:
                    raise CorruptTransfer(f"{received} bytes arrived where {header.payload_bytes} were announced: send the rest")
                if digest != header.digest:
                    part.unlink()
                    raise CorruptTransfer(_ANOTHER)
                part.replace(path)
        failpoints.reach(Step.UPLOAD_SPOOLED.value)
        return path

    async def store_whole(self, header: UploadHeader, content: bytes) -> Path:
        """Write an upload that came in one piece. Raises CorruptTransfer, Unreachable or OutOfSpace, as `store`."""
        path, part = self.path(header.client, header.digest), self._part(header)
        if len(content) != header.payload_bytes:
            raise CorruptTransfer(f"{len(content)} bytes arrived where {header.payload_bytes} were announced: send the rest")
        if hashlib.sha256(content).digest() != header.digest:
            raise CorruptTransfer(_ANOTHER)
        with self._writable():
            await self._stop_others(header.client)
            self._make_room(part, header.client)
            part.write_bytes(content)
            part.replace(path)
        failpoints.reach(Step.UPLOAD_SPOOLED.value)
        return path

    async def _stop_others(self, client: str) -> None:
        if (before := self._arrivals.pop(client, None)) is not None:
            await before.give_way()

    def _make_room(self, part: Path, client: str) -> None:
        """A result has one payload: what came before with another digest is not gone on with."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if (
            self._parts is None
        ):  # what earlier processes left; looked for once, or a round of n clients would look n times at n files
            self._parts = {other.name.rsplit(".", 2)[0]: other for other in self._folder.glob("*.part")}
        if (before := self._parts.get(client)) is not None and before != part:
            before.unlink(missing_ok=True)
        self._parts[client] = part

    @asynccontextmanager
    async def _arrival(self, header: UploadHeader, part: Path) -> AsyncIterator[Arrival]:
        arrival = self._arrivals[header.client] = Arrival(part, header.offset)
        try:
            yield arrival
        finally:
            try:
                await arrival.close()
            finally:
                if self._arrivals.get(header.client) is arrival:
                    del self._arrivals[header.client]

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """A disk that does not take an upload is a trouble of ours. Raises OutOfSpace; Unreachable: the round has ended."""
        try:
            yield
        except FileNotFoundError as error:
            raise Unreachable("the round ended while the result arrived: ask what became of it") from error
        except OSError as error:
            reason = f"{self._folder} cannot be written ({error.strerror})"
            self._troubles.found(DISK, reason)
            raise OutOfSpace(
                f"the coordinator cannot store the result now: {reason}; it is taken as soon as that is mended"
            ) from error
        self._troubles.over(DISK)

    async def holds(self, part: Part, size_bytes: int) -> bool:
        """Whether the upload of an accepted part, of about `size_bytes`, is here as it was accepted."""
        path = self.path(part.client, part.digest)
        return path.exists() and await offload(size_bytes, digest_of, path) == part.digest

    def probe(self) -> None:
        """Look whether the disk takes something again, and say so."""
        probe = self._folder / ".probe"
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(_PROBE_BYTES))
            self._troubles.over(DISK)
        probe.unlink(missing_ok=True)

    def keep(self, parts: Iterable[Part]) -> None:
        """Delete what no one of these parts, accepted or open, needs and no client can go on with.

        What is whole and was not accepted is, like a part, verified when its client goes on with it: it was never durable.
        """
        wanted = {self.sum_path}
        for part in parts:
            if part.state is PartState.ACCEPTED:
                wanted.add(self.path(part.client, part.digest))
            else:
                self._make_partial(part.client)
        if self._folder.exists():
            remove_leftovers(self._folder)
            for path in set(self._folder.iterdir()) - wanted - set(self._folder.glob("*.part")):
                path.unlink()

    def lose(self, part: Part) -> None:
        """The upload of an accepted part is not what it was: what is there of it is a part, to be verified."""
        self._make_partial(part.client)

    def _make_partial(self, client: str) -> None:
        for upload in list(self._uploads_of(client)):
            upload.replace(upload.with_suffix(".part"))

    def drop(self, parts: Iterable[Part]) -> None:
        """Delete the uploads of these parts."""
        for part in parts:
            self.path(part.client, part.digest).unlink(missing_ok=True)

    def discard(self, path: Path) -> None:
        """Delete an upload that does not count."""
        path.unlink(missing_ok=True)
        self._remove_if_empty()

    def clear(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._remove_if_empty()
        failpoints.reach(Step.SPOOL_CLEARED.value)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):  # others are there, or nothing is
            self._folder.rmdir()
        with suppress(OSError):
            self._folder.parent.rmdir()

    def _part(self, header: UploadHeader) -> Path:
        return self.path(header.client, header.digest).with_suffix(".part")

    def _uploads_of(self, client: str) -> Iterable[Path]:
        return self._folder.glob(f"{client}.{'?' * 16}.upload")


class Spool:
    """The folder in which uploads are kept, by run and round."""

    def __init__(self, folder: Path, troubles: Troubles) -> None:
        self._folder = folder
        self._troubles = troubles

    def of(self, run: str, number: int) -> RoundSpool:
        """The uploads of one round."""
        return RoundSpool(self._folder / run / str(number), self._troubles)

    def keep_only(self, unfinished: Round | None) -> None:
        """At the start: delete whatever does not belong to the round that goes on."""
        for run in self._folder.glob("*"):
            for folder in [*run.iterdir()] if run.is_dir() else []:
                if unfinished is None or (run.name, folder.name) != (unfinished.run, str(unfinished.number)):
                    shutil.rmtree(folder, ignore_errors=True)
        if unfinished is not None:
            wanted = [part for part in unfinished.parts.values() if part.state in OPEN_PARTS | {PartState.ACCEPTED}]
            self.of(unfinished.run, unfinished.number).keep(wanted)
