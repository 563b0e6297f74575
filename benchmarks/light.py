"""Many clients in one process, which speak the protocol as real ones do but hold no model: memory.py starts it.

Each fetches the model for its work and forgets the bytes as they come; all send the same update, once in memory for all of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from choral.errors import ChoralError, Unreachable
from choral.flat import describe
from choral.identity import read_credentials
from choral.manifest import Manifest
from choral.messages import Assignment, ComeBack, Hello, Receipt, UploadHeader
from choral.plan import Kind
from choral.task import load_task
from choral.wire import PROTOCOL_VERSION
from choral_client.transport import GrpcTransport, Transport

AGAIN_S = 0.5


@dataclass(frozen=True)
class Client:
    """One of them."""

    hello: Hello
    transport: Transport
    payload: memoryview
    digest: bytes

    async def live(self) -> None:
        """Attend until the run is over."""
        async with asyncio.TaskGroup() as parts:
            while True:
                farewell = await self.attend(parts)
                if farewell.after_s is None:
                    return
                await asyncio.sleep(farewell.after_s)

    async def attend(self, parts: asyncio.TaskGroup) -> ComeBack:
        """One attendance. Raises Unreachable: it ended without a farewell."""
        async with self.transport.attend(self.hello) as stream:
            async for message in stream.heard():
                if isinstance(message, Assignment):
                    parts.create_task(self.take_part(message))
                elif isinstance(message, ComeBack):
                    return message
        raise Unreachable(f"{self.hello.client}: the coordinator ended the stream without a farewell")

    async def take_part(self, assignment: Assignment) -> None:
        """Fetch the model and send an update, however often either breaks off."""
        offset = 0
        while offset < assignment.version.size_bytes:
            try:
                async for piece in self.transport.download(assignment.version, offset):
                    offset += len(piece)
            except ChoralError as error:
                await self.bear(error)
        header = UploadHeader(
            assignment=assignment.id,
            client=self.hello.client,
            examples=self.hello.examples,
            kind=Kind.TRAINING,
            payload_bytes=len(self.payload),
            held_out=(),
            work=(),
            digest=self.digest,
        )
        while True:
            try:
                await self.transport.upload(header, self.payload)
                return
            except ChoralError as error:
                await self.bear(error)
            try:
                answer = await self.transport.resume(header)
            except ChoralError as error:
                await self.bear(error)
            else:
                if isinstance(answer, Receipt):
                    return
                header = replace(header, offset=answer)

    async def bear(self, error: ChoralError) -> None:
        """Wait a little. Raises what will not be otherwise next time."""
        if not error.retryable:
            raise error
        print(f"{self.hello.client}: {error}", file=sys.stderr)
        await asyncio.sleep(AGAIN_S)


async def main(address: str, folder: Path, first: int, count: int, task_name: str) -> None:
    """Be so many clients, with the certificates in `folder`."""
    task = load_task(task_name)
    manifest: Manifest = describe(task.initial_model(0))
    payload = np.random.default_rng(first).standard_normal(manifest.size, dtype=np.float32)
    payload *= np.float32(0.001)
    digest = hashlib.sha256(payload.data).digest()
    async with asyncio.TaskGroup() as clients:
        for number in range(first, first + count):
            name = f"client-{number}"
            credentials = read_credentials(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")
            hello = Hello(PROTOCOL_VERSION, name, f"{name}-here", task.name, task.version, manifest, 2, "a benchmark")
            transport = GrpcTransport(address, credentials, name)
            clients.create_task(Client(hello, transport, payload.data.cast("B"), digest).live())


if __name__ == "__main__":
    address, folder, first, count, task_name = sys.argv[1:]
    try:
        asyncio.run(main(address, Path(folder), int(first), int(count), task_name))
    except* ChoralError as errors:
        sys.exit(f"{errors.exceptions[0]}")
